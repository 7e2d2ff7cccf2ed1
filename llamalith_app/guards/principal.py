"""The one guard of the application: who is asking, or 401.

A route is closed unless it carries `opt=OPEN`. Owns the order of credentials; knows no route and no row.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Literal

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from llamalith_app.errors import NotAuthenticated
from llamalith_app.store.users import ADMIN_ID

OPEN = {"open": True}
"""A route's `opt` that lets everybody in."""

Connection = ASGIConnection[Any, Any, Any, Any]


class Principal(msgspec.Struct, frozen=True):
    """Whose rows a request may see and write."""

    user_id: int
    door: Literal["token"]


class PrincipalGuard:
    """Puts the principal into the request's state, or raises NotAuthenticated."""

    def __init__(self, api_token: str) -> None:
        # Digests: of one length whatever was sent, and compare_digest takes no text beyond ASCII.
        self._digest = _digest(api_token.encode())

    async def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        if handler.opt.get("open"):
            return
        tokens = _tokens(connection)
        if not tokens or not all(hmac.compare_digest(_digest(token), self._digest) for token in tokens):
            raise NotAuthenticated("Invalid or missing token")
        connection.state.principal = Principal(user_id=ADMIN_ID, door="token")


def _tokens(connection: Connection) -> list[bytes]:
    """Every credential that was sent; all must be right, so that nobody disagrees on which of them counts."""
    tokens = []
    for name, value in connection.scope["headers"]:
        if name == b"x-api-token":
            tokens.append(value.strip())
        elif name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            tokens.append(token.strip() if scheme.lower() == b"bearer" else b"")
    return tokens


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
