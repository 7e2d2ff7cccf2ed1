"""One line a request, and its id: taken from `X-Request-ID` if that is sane, made here else, given back in the answer.

Wraps the whole application, so that what no route matches is logged too. Logs the route's pattern, never the path,
the query or a body.
"""

from __future__ import annotations

import re
import secrets
import time

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

SANE = re.compile(rb"\A[A-Za-z0-9._-]{1,128}\Z")

log = structlog.get_logger(__name__)


class RequestLog:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        request_id = next(
            (value.decode() for name, value in scope["headers"] if name == b"x-request-id" and SANE.match(value)),
            None,
        ) or secrets.token_hex(8)
        scope["request_id"] = request_id  # type: ignore[typeddict-unknown-key]
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        status, method = 500, scope["method"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            principal = scope.get("state", {}).get("principal")
            log.info(
                "request",
                method=method,
                route=scope.get("path_template") or "none",
                status=int(status),
                ms=round((time.perf_counter() - started) * 1000, 2),
                principal="none" if principal is None else f"{principal.door}:{principal.user_id}",
            )
            structlog.contextvars.clear_contextvars()
