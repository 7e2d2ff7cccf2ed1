"""One line a request, and what every answer carries: the request's id, taken from `X-Request-ID` if that is sane and
made here else, and over https Strict-Transport-Security where that is configured.

Wraps the whole application, so that what no route matches is logged too. Logs the route's pattern, never the path,
the query or a body. What scripts ask for again and again is a line of level debug as long as it succeeds; what was
refused or failed tells the client's address and why.
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

SANE = re.compile(rb"\A[A-Za-z0-9._-]{1,128}\Z")

log = structlog.get_logger(__name__)


REFUSED = 400
"""Statuses from here on are refusals and failures."""


def is_head(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """A HEAD is answered as the GET that it stands for (envelope.py); what changes something must tell them apart."""
    return connection.scope.get("sent_method") == "HEAD"


class RequestLog:
    def __init__(self, app: ASGIApp, *, hsts: str = "") -> None:
        """`hsts`: seconds of Strict-Transport-Security and what follows them; empty: none is sent."""
        self.app = app
        self._hsts = [(b"strict-transport-security", f"max-age={hsts}".encode())] if hsts else []

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
        scope["sent_method"] = method  # type: ignore[typeddict-unknown-key]
        # Browsers must not heed it over plain http, where anybody could have written it.
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
            if status >= REFUSED:
                client = scope.get("client")
                fields |= {"address": client[0] if client else "none", "why": scope.get("problem", "none")}
            is_background = getattr(scope.get("route_handler"), "opt", {}).get("background", False)
            (log.debug if is_background and status < REFUSED else log.info)("request", **fields)
            structlog.contextvars.clear_contextvars()
