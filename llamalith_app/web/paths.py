"""Encoded slashes in a path: part of a name, never a border between two.

Servers decode the whole path before it is routed, so that `a%2Fb` looks like two parts. Here such a slash is carried
through the routing as a mark that no decoded text can hold, and put back after it.
"""

from __future__ import annotations

from urllib.parse import unquote

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

MARK = "\udc2f"
"""A lone surrogate: UTF-8 has none."""


class MarkedSlashes:
    """Around all that runs in this process."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path") or b""
        if scope["type"] == ScopeType.HTTP and b"%2f" in raw.lower():
            parts = raw.partition(b"?")[0].decode("latin-1").split("/")
            # A copy: the server makes its own use of the path, and cannot encode the mark.
            scope = {**scope, "path": "/".join(unquote(part).replace("/", MARK) for part in parts)}
        await self.app(scope, receive, send)


def restored(app: ASGIApp) -> ASGIApp:
    """Around each handler."""

    async def with_slashes(scope: Scope, receive: Receive, send: Send) -> None:
        if MARK in scope["path"]:
            scope["path"] = readable(scope["path"])
            scope["path_params"] = {name: readable(value) for name, value in scope["path_params"].items()}
        await app(scope, receive, send)

    return with_slashes


def readable(path: str) -> str:
    return path.replace(MARK, "/")
