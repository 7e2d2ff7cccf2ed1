"""Browser sessions: the session cookie with its token, and the CSRF token derived from it.

Called by the guard, the login and the event streams. The database holds only a digest of each token and of the scheme
that it was issued for, keyed with SECRET_KEY and the password's hash: changing either of them ends every session. Knows
no route and no password.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import structlog
from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie

from llamalith_app.errors import StorageUnavailable
from llamalith_app.guards.cookies import cookie_value, is_https, make_cookie
from llamalith_app.store import sessions
from llamalith_app.store.database import Database
from llamalith_app.store.users import ADMIN_ID

COOKIE = "llamalith_session"
"""Its name over plain http. Over https the name has a prefix, so a session of one scheme is not valid on the other: a
cookie sent over plain http may have been read or planted on its way."""
TOUCH_S = 300.0
"""How exactly a session's last use is stored: a write for each request would cost more than the request."""
POLL_S = 15.0
"""How long a stream may outlive its session if that was ended by another process or expired."""
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

log = structlog.get_logger(__name__)

Connection = ASGIConnection[Any, Any, Any, Any]


class Session(NamedTuple):
    user_id: int
    csrf_token: str
    """Carried by the session's forms. Derived from the session token, so it is never stored."""


class Sessions:
    """`poll_s`: how often `wait_until_ended` reads the session again, in seconds."""

    def __init__(
        self,
        database: Database,
        *,
        secret_key: str,
        password_hash: str,
        poll_s: float = POLL_S,
        touch_s: float = TOUCH_S,
    ) -> None:
        self._database = database
        self._poll_s = poll_s
        self._touch_after = timedelta(seconds=touch_s)
        self._secret_key = secret_key.encode()
        self._password_hash = password_hash
        self._touches: set[asyncio.Task[None]] = set()
        self._session_ended = asyncio.Event()

    async def begin(self, connection: Connection) -> tuple[Cookie, Session]:
        """Starts a session under a new random token; returns its cookie. Raises StorageUnavailable.

        The session that the client came with ends: a token chosen by the client is never used.
        """
        await self.end(connection)
        token = secrets.token_urlsafe(32)
        await self._database.write(sessions.begin, self._digest(connection, token), ADMIN_ID, datetime.now(UTC))
        cookie = self._cookie(connection, token, int(sessions.ABSOLUTE.total_seconds()))
        return cookie, Session(ADMIN_ID, self._keyed("csrf", token))

    async def find(self, connection: Connection, *, keep_alive: bool = True) -> Session | None:
        """The session of the request's cookie; None if there is no valid one. Raises StorageUnavailable.

        `keep_alive` is False for a script that polls, which must not keep a session open for ever.
        """
        token = cookie_value(connection, COOKIE)
        if TOKEN.fullmatch(token) is None:
            return None
        digest, now = self._digest(connection, token), datetime.now(UTC)
        found = await self._database.read(sessions.find, digest, now)
        if found is None:
            return None
        user_id, seen_at = found
        if keep_alive and now - seen_at > self._touch_after:
            # In a task of its own: a database that cannot be written now is no reason to refuse a read.
            touch = asyncio.create_task(self._touch(digest, now))
            self._touches.add(touch)
            touch.add_done_callback(self._touches.discard)
        return Session(user_id, self._keyed("csrf", token))

    async def end(self, connection: Connection) -> Cookie:
        """Ends the session for everybody who holds its token. Returns the cookie that deletes it in this browser."""
        token = cookie_value(connection, COOKIE)
        if TOKEN.fullmatch(token) is not None:
            await self._database.write(sessions.end, self._digest(connection, token))
            self._session_ended.set()
            self._session_ended = asyncio.Event()
        return self._cookie(connection, "", 0)

    async def wait_until_ended(self, connection: Connection) -> None:
        """Returns when the connection's session has ended: at once after a logout in this process, else within
        `poll_s`."""
        while True:
            session_ended = self._session_ended
            try:
                if await self.find(connection, keep_alive=False) is None:
                    return
            except StorageUnavailable as error:
                log.warning("a session cannot be read now", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await session_ended.wait()

    async def _touch(self, digest: str, now: datetime) -> None:
        try:
            await self._database.write_lightly(sessions.touch, digest, now)
        except StorageUnavailable as error:
            log.warning("a session's last use cannot be stored", reason=str(error))

    def _digest(self, connection: Connection, token: str) -> str:
        # The scheme is part of it: the cookie's name binds browsers only, and a stolen token can be sent under either.
        scheme = "https" if is_https(connection) else "http"
        return self._keyed(f"session over {scheme}", f"{token}\0{self._password_hash}")

    def _keyed(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret_key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()

    @staticmethod
    def _cookie(connection: Connection, value: str, max_age: int) -> Cookie:
        return make_cookie(connection, COOKIE, value, max_age, path="/")
