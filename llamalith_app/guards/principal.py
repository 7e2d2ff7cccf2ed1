"""The application's one guard: it authenticates each request before its handler runs.

A route accepts a token or a session unless its `opt` says otherwise: `OPEN` accepts everybody, `PAGE` only sessions.
Owns the order in which credentials and CSRF are checked. Knows no route and no database row.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from llamalith_app.contracts.principal import Principal
from llamalith_app.errors import (
    CrossSite,
    LoginNeeded,
    NotAuthenticated,
    SessionUnreadable,
    StaleForm,
    StorageUnavailable,
)
from llamalith_app.guards.forms import anonymous_fields, file_form, form_fields, has_file_form, has_form
from llamalith_app.guards.origin import SAFE_METHODS, is_foreign, is_same_origin
from llamalith_app.guards.sessions import Session, Sessions
from llamalith_app.store.users import ADMIN_ID

OPEN = {"open": True}
PAGE = {"page": True}
BACKGROUND = {"background": True}
"""Polled by scripts: such a request does not keep a session alive, and is logged at level info only if it fails."""
BACKGROUND_PAGE = PAGE | BACKGROUND

CSRF_FIELD = "csrf_token"
CSRF_HEADER = "x-csrf-token"

Connection = ASGIConnection[Any, Any, Any, Any]


class PrincipalGuard:
    """Puts the principal into the request's state.

    Raises NotAuthenticated, LoginNeeded, CrossSite, StaleForm, or StorageUnavailable if the session cannot be read;
    for a form on a page that last one is SessionUnreadable, which carries the form's fields.
    """

    def __init__(self, api_token: str, sessions: Sessions) -> None:
        # Digests have the same length whatever was sent, and compare_digest refuses text that is not ASCII.
        self._token_digest = _digest(api_token.encode())
        self._sessions = sessions

    async def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        if handler.opt.get("open"):
            return
        is_page = bool(handler.opt.get("page"))
        if not is_page and (tokens := _tokens(connection)):
            connection.state.principal = self._by_token(tokens)
            return
        try:
            session = await self._sessions.find(connection, keep_alive=not handler.opt.get("background"))
        except StorageUnavailable as error:
            if is_page and has_form(connection):
                raise SessionUnreadable(str(error), await anonymous_fields(connection) or {}) from None
            raise
        if session is None and not is_page:
            raise NotAuthenticated("Invalid or missing token")
        unsafe = connection.scope["method"] not in SAFE_METHODS  # type: ignore[typeddict-item]
        if unsafe and is_foreign(connection):
            raise CrossSite("This request was sent by another site, or by another port of this host.")
        if session is None:
            raise LoginNeeded(await _fields_before_login(connection) if unsafe else {})
        if unsafe and not is_same_origin(connection):
            await _require_csrf_token(connection, session, is_page=is_page)
        connection.state.principal = Principal(session.user_id, "session", session.csrf_token)

    def _by_token(self, tokens: list[bytes]) -> Principal:
        if not all(hmac.compare_digest(_digest(token), self._token_digest) for token in tokens):
            raise NotAuthenticated("Invalid or missing token")
        return Principal(ADMIN_ID, "token")


async def _fields_before_login(connection: Connection) -> dict[str, str] | None:
    """None: the form is too long to be read, as one with a file always is."""
    if has_file_form(connection):
        return None
    return await anonymous_fields(connection) if has_form(connection) else {}


async def _require_csrf_token(connection: Connection, session: Session, *, is_page: bool) -> None:
    """For a client that sends neither Origin nor Sec-Fetch-Site. Raises StaleForm."""
    fields = {}
    if is_page and has_form(connection):
        fields = await form_fields(connection)
    elif is_page and has_file_form(connection):
        fields = (await file_form(connection)).fields
    given = fields.get(CSRF_FIELD) or connection.headers.get(CSRF_HEADER) or ""
    if not hmac.compare_digest(given.encode(errors="replace"), session.csrf_token.encode()):
        connection.state.session = session
        raise StaleForm(fields)


def _tokens(connection: Connection) -> list[bytes]:
    """Every token in the request. All of them must be right, so that it does not matter which one a proxy has checked.

    Credentials of another scheme, such as a proxy's own Basic login, are ignored.
    """
    tokens = []
    for name, value in connection.scope["headers"]:
        if name == b"x-api-token":
            tokens.append(value.strip())
        elif name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                tokens.append(token.strip())
    return tokens


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
