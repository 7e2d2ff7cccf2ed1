"""ASGI middleware around the whole application: refuses invalid requests early, and adds security headers to answers.

Before the application sees a request, its size, duplicate headers and the Host are checked. HEAD is answered as GET
without the body. The headers in HEADERS are added to every answer, errors and files included, unless the answer sets
them itself. Does not know routes or sessions.
"""

from __future__ import annotations

import re
from collections import Counter

import msgspec
import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from llamalith_app.contracts.problems import Problem
from llamalith_app.guards.hosts import Hosts
from llamalith_app.web import openai_errors
from llamalith_app.web.paths import is_openai

MAX_HEADER_BYTES = 32 * 1024
"""All headers together. `web/server.py` reads at most twice as much."""
MAX_URL_BYTES = 8 * 1024
MAX_QUERY_FIELDS = 50
"""Limited because Litestar caches the last thousand parsed URLs and queries."""
HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")
SINGLE_HEADERS = {
    name.lower().encode(): name
    for name in (
        *("Host", "Content-Length", "Content-Type", "Content-Encoding", "Authorization", "X-API-Token"),
        *("Idempotency-Key", "Last-Event-ID", "X-CSRF-Token"),
    )
}
"""Headers that may come only once. Of two, a proxy and this server might use different ones."""
PROBES = ("/healthz", "/readyz")
"""Answered under every Host: a health check uses the address, and the answers reveal nothing."""

log = structlog.get_logger(__name__)

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self';"
    " connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
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
    """The middleware. `hosts`: the Hosts that are answered."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self.app = app
        self._hosts = hosts

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
                # uvicorn frames the answer by the method, so it must see HEAD again.
                scope["method"] = method
                there = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in HEADERS.items() if name not in there),
                ]
            elif without_body and message["type"] == "http.response.body":
                # Ends here even if the handler streams for ever.
                message["body"], message["more_body"], ended = b"", False, True
            await send(message)

        if refused := _refusal(scope, self._hosts):
            client = scope["client"]
            address = client[0] if client else ""
            log.warning("request refused", status=refused.status, address=address, reason=refused.detail)
            await _answer(scope["path"], refused, send_with_headers)
            return
        if without_body:
            scope["method"] = "GET"
        await self.app(scope, receive, send_with_headers)


def problem(status: int, word: str, title: str, detail: str, request_id: str) -> Problem:
    """The problem to answer with when no handler has seen the request."""
    return Problem(
        type=f"about:llamalith/{word}",
        title=title,
        status=status,
        detail=detail,
        request_id=request_id,
        error=detail if status == 400 else None,
    )


def _refusal(scope: HTTPScope, hosts: Hosts) -> Problem | None:
    """Why the request is refused; None if it is valid."""
    request_id = str(scope.get("request_id", ""))
    headers = scope["headers"]

    def bad_input(detail: str) -> Problem:
        return problem(400, "bad-input", "Bad input", detail, request_id)

    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        detail = f"The headers are too large: at most {MAX_HEADER_BYTES // 1024} KiB together."
        return problem(431, "headers-too-large", "Headers too large", detail, request_id)
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        detail = f"The address is too long: at most {MAX_URL_BYTES // 1024} KiB with its query."
        return problem(414, "uri-too-long", "Address too long", detail, request_id)
    if scope["query_string"].count(b"&") >= MAX_QUERY_FIELDS:
        return bad_input(f"The query has too many fields: at most {MAX_QUERY_FIELDS}.")
    counted = Counter(name for name, _ in headers)
    if twice := [shown for name, shown in SINGLE_HEADERS.items() if counted[name] > 1]:
        return bad_input(f"{twice[0]}: stands twice in the headers; send it once.")
    host = next((value for name, value in headers if name == b"host"), None)
    if host is None and scope["http_version"] != "1.0":
        return bad_input("Host: missing; HTTP/1.1 needs it.")
    if host and ((found := HOST.fullmatch(host)) is None or int(found[1] or 0) > 65535):
        return bad_input("Host: expected a name or an address, and a port after a colon if there is one.")
    if scope["path"] not in PROBES and not hosts.allow((host or b"").decode()):
        detail = "Host: nothing is answered under this one; LLAMALITH_ALLOWED_HOSTS names those that are."
        return problem(421, "misdirected-request", "Misdirected request", detail, request_id)
    return None


async def _answer(path: str, refused: Problem, send: Send) -> None:
    shown: msgspec.Struct = refused
    media_type = b"application/problem+json"
    if is_openai(path):
        word = refused.type.rpartition("/")[2]
        shown, media_type = openai_errors.body(refused.status, word, refused.detail), b"application/json"
    body = msgspec.json.encode(shown)
    headers = [(b"content-type", media_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
