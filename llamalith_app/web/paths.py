"""Keeps encoded slashes (`%2F`) in a path from separating path segments.

Servers decode the whole path before routing, so `a%2Fb` would look like two segments. `MarkedSlashes` replaces such a
slash by a character that no decoded text can contain; `restore_slashes` puts it back after routing. Also knows which
paths are those of OpenAI clients.
"""

from __future__ import annotations

from urllib.parse import unquote

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

MARK = "\udc2f"
"""A lone surrogate, which UTF-8 cannot encode."""


OPENAI = "/v1/"


class MarkedSlashes:
    """ASGI middleware around the whole application: marks the slashes before routing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path") or b""
        if scope["type"] == ScopeType.HTTP and b"%2f" in raw.lower():
            parts = raw.partition(b"?")[0].decode("latin-1").split("/")
            # A copy, because the server uses the path too and cannot encode the mark.
            scope = {**scope, "path": "/".join(unquote(part).replace("/", MARK) for part in parts)}
        await self.app(scope, receive, send)


def restore_slashes(app: ASGIApp) -> ASGIApp:
    """ASGI middleware around each handler: puts the slashes back into the path and its parameters."""

    async def with_slashes(scope: Scope, receive: Receive, send: Send) -> None:
        if MARK in scope["path"]:
            scope["path"] = unmarked(scope["path"])
            scope["path_params"] = {name: unmarked(value) for name, value in scope["path_params"].items()}
        await app(scope, receive, send)

    return with_slashes


def is_openai(path: str) -> bool:
    """Whether OpenAI clients call this path: they read errors in a shape of their own."""
    return path.removeprefix("/chat").startswith(OPENAI)


def unmarked(path: str) -> str:
    """The path with its slashes put back."""
    return path.replace(MARK, "/")
