"""Sessions of browsers: the cookie, its token, and the token that forms carry.

Owns the secrets' use: the record holds only a keyed digest of each token and the scheme it was issued for, made with
SECRET_KEY and the password's hash, so that a change of either ends every session. Knows no route and no password.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie

from llamalith_app.errors import StorageUnavailable
from llamalith_app.guards.cookies import cookie, is_https, own_cookie
from llamalith_app.store import sessions
from llamalith_app.store.database import Database
from llamalith_app.store.users import ADMIN_ID

COOKIE = "llamalith_session"
"""Its name over plain http. A session that began there opens nothing over https, as it may have been read or planted on
its way; nor the other way round."""
LOOK_S = 15.0
"""How long a stream may go on for a session that has ended elsewhere or has run out."""
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

log = structlog.get_logger(__name__)

Connection = ASGIConnection[Any, Any, Any, Any]


class Session(NamedTuple):
    user_id: int
    csrf_token: str
    """What its forms carry; derived from the token, so it is never stored."""


class Sessions:
    def __init__(self, database: Database, *, secret_key: str, password_hash: str) -> None:
        self._database = database
        self._secret_key = secret_key.encode()
        self._password_hash = password_hash
        self._touches: set[asyncio.Task[None]] = set()
        self._one_ended = asyncio.Event()

    async def begin(self, connection: Connection) -> tuple[Cookie, Session]:
        """A session under a new random token, never under one that the client brought; that one ends."""
        await self.end(connection)
        token = secrets.token_urlsafe(32)
        await self._database.write(sessions.begin, self._digest(connection, token), ADMIN_ID, datetime.now(UTC))
        cookie = self._cookie(connection, token, int(sessions.ABSOLUTE.total_seconds()))
        return cookie, Session(ADMIN_ID, self._keyed("csrf", token))

    async def find(self, connection: Connection, *, keep_alive: bool = True) -> Session | None:
        """`keep_alive` False: asked by a script in the background, which must not hold a session open for ever."""
        token = cookie(connection, COOKIE)
        if TOKEN.fullmatch(token) is None:
            return None
        digest, now = self._digest(connection, token), datetime.now(UTC)
        found = await self._database.read(sessions.find, digest, now)
        if found is None:
            return None
        user_id, seen_at = found
        if keep_alive and now - seen_at > sessions.TOUCH_EVERY:
            # Beside the answer: a database that cannot be written now is no reason to refuse to read it.
            touch = asyncio.create_task(self._touch(digest, now))
            self._touches.add(touch)
            touch.add_done_callback(self._touches.discard)
        return Session(user_id, self._keyed("csrf", token))

    async def end(self, connection: Connection) -> Cookie:
        """The session is over for whoever holds its token; the cookie takes it out of this browser."""
        token = cookie(connection, COOKIE)
        if TOKEN.fullmatch(token) is not None:
            await self._database.write(sessions.end, self._digest(connection, token))
            self._one_ended.set()
            self._one_ended = asyncio.Event()
        return self._cookie(connection, "", 0)

    async def over(self, connection: Connection) -> None:
        """Returns when the connection's session has ended: at once at a logout in this process, else within LOOK_S."""
        while True:
            one_ended = self._one_ended
            try:
                if await self.find(connection, keep_alive=False) is None:
                    return
            except StorageUnavailable as error:
                log.warning("a session cannot be looked at now", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await one_ended.wait()

    async def _touch(self, digest: str, now: datetime) -> None:
        try:
            await self._database.write_lightly(sessions.touch, digest, now)
        except StorageUnavailable as error:
            log.warning("a session's use is not noted", reason=str(error))

    def _digest(self, connection: Connection, token: str) -> str:
        # The scheme is part of it: the cookie's name binds browsers only, and a stolen token can be sent under either.
        scheme = "https" if is_https(connection) else "http"
        return self._keyed(f"session over {scheme}", f"{token}\0{self._password_hash}")

    def _keyed(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret_key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()

    @staticmethod
    def _cookie(connection: Connection, value: str, max_age: int) -> Cookie:
        return own_cookie(connection, COOKIE, value, max_age, path="/")
