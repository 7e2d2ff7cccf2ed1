"""ASGI middleware that logs one line for each request and adds `X-Request-ID` to each answer.

The id is the client's if it is well-formed, else a new one. Over https Strict-Transport-Security is added if it is
configured. Wraps the whole application, so requests without a matching route are logged too. Logs the route's pattern,
never the path, the query or a body. A polled request that succeeds is logged at level debug; a refused or failed one
with the client's address and the reason.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

VALID_ID = re.compile(rb"\A[A-Za-z0-9._-]{1,128}\Z")

log = structlog.get_logger(__name__)


FIRST_ERROR_STATUS = 400
"""The first HTTP status that means a refusal or a failure."""


def is_head(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Whether the client sent HEAD. Handlers see it as GET (`web/envelope.py`); one that changes something must ask."""
    return connection.scope.get("sent_method") == "HEAD"


class RequestLog:
    def __init__(self, app: ASGIApp, *, hsts: str = "") -> None:
        """`hsts`: the value of Strict-Transport-Security after `max-age=`; if it is empty, the header is not sent."""
        self.app = app
        self._hsts = [(b"strict-transport-security", f"max-age={hsts}".encode())] if hsts else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        request_id = next(
            (value.decode() for name, value in scope["headers"] if name == b"x-request-id" and VALID_ID.match(value)),
            None,
        ) or secrets.token_hex(8)
        scope["request_id"] = request_id  # type: ignore[typeddict-unknown-key]
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        status, method = 500, scope["method"]
        scope["sent_method"] = method  # type: ignore[typeddict-unknown-key]
        # Over plain http anybody on the way could have written the header, so browsers must ignore it there.
        hsts = self._hsts if scope["scheme"] == "https" else []

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *hsts]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            principal = scope.get("state", {}).get("principal")
            fields = {
                "method": method,
                "route": scope.get("path_template") or "none",
                "status": int(status),
                "ms": round((time.perf_counter() - started) * 1000, 2),
                "principal": "none" if principal is None else f"{principal.door}:{principal.user_id}",
            }
            if status >= FIRST_ERROR_STATUS:
                client = scope.get("client")
                fields |= {"address": client[0] if client else "none", "why": scope.get("problem", "none")}
            is_background = getattr(scope.get("route_handler"), "opt", {}).get("background", False)
            (log.debug if is_background and status < FIRST_ERROR_STATUS else log.info)("request", **fields)
            structlog.contextvars.clear_contextvars()
