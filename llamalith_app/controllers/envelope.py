"""What surrounds every request and every answer, whoever makes it, errors and files included.

Refuses headers that are too long to be looked at and hosts that are none, answers HEAD as GET without its body, and
tells browsers what may run, who may frame it and what may be kept. An answer that says something else under one of
these names keeps what it says.
"""

from __future__ import annotations

import re

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from llamalith_app.contracts.problems import Problem

MAX_HEADER_BYTES = 32 * 1024
"""Of all headers together. uvicorn has no limit of its own."""
HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    # Not no-referrer: browsers would send `Origin: null` from our own forms.
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Envelope:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        without_body = method == "HEAD"
        ended = False

        async def send_with_headers(message: Message) -> None:
            nonlocal ended
            if ended:
                return
            if message["type"] == "http.response.start":
                # The server ends a HEAD's answer otherwise than a GET's.
                scope["method"] = method
                there = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in HEADERS.items() if name not in there),
                ]
            elif without_body and message["type"] == "http.response.body":
                # What would go on for ever, a stream, ends here.
                message["body"], message["more_body"], ended = b"", False, True
            await send(message)

        if problem := _refusal(scope):
            await _answer(problem, send_with_headers)
            return
        if without_body:
            scope["method"] = "GET"
        await self.app(scope, receive, send_with_headers)


def _refusal(scope: Scope) -> Problem | None:
    request_id = str(scope.get("request_id", ""))
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        return Problem(
            type="about:llamalith/headers-too-large",
            title="Headers too large",
            status=431,
            detail=f"The headers are too large: at most {MAX_HEADER_BYTES // 1024} KiB together.",
            request_id=request_id,
        )
    for name, value in scope["headers"]:
        if name == b"host" and value:
            host = HOST.fullmatch(value)
            if host is None or int(host[1] or 0) > 65535:
                return Problem(
                    type="about:llamalith/bad-input",
                    title="Bad input",
                    status=400,
                    detail="Host: expected a name or an address, and a port after a colon if there is one.",
                    request_id=request_id,
                )
    return None


async def _answer(problem: Problem, send: Send) -> None:
    body = msgspec.json.encode(problem)
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
