"""Sessions of browsers: begun at login, looked up by each request, ended at logout or by age.

The only writer of sessions. Knows digests of tokens, but no token and no cookie (`guards/sessions.py`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, insert, select, update

from llamalith_app.store.tables import SessionRow

IDLE_TIMEOUT = timedelta(hours=12)
"""A session ends this long after `seen_at`."""
MAX_AGE = timedelta(days=7)
"""A session ends this long after its login."""


def _alive(created_after: object, seen_after: object) -> ColumnElement[bool]:
    return and_(SessionRow.created_at > created_after, SessionRow.seen_at > seen_after)


_FIND = select(SessionRow.user_id, SessionRow.seen_at).where(
    SessionRow.digest == bindparam("of_digest"), _alive(bindparam("created_after"), bindparam("seen_after"))
)


def begin(connection: Connection, digest: str, user_id: int, now: datetime) -> None:
    """Stores a new session. Also deletes the sessions that have ended by age."""
    connection.execute(delete(SessionRow).where(~_alive(now - MAX_AGE, now - IDLE_TIMEOUT)))
    connection.execute(insert(SessionRow).values(digest=digest, user_id=user_id, created_at=now, seen_at=now))


def active_session(connection: Connection, digest: str, now: datetime) -> tuple[int, datetime] | None:
    """The user's id and the session's `seen_at`. None: there is no such session, or it has ended."""
    ages = {"created_after": now - MAX_AGE, "seen_after": now - IDLE_TIMEOUT}
    row = connection.execute(_FIND, {"of_digest": digest, **ages}).first()
    return None if row is None else (row.user_id, row.seen_at)


def touch(connection: Connection, digest: str, now: datetime) -> None:
    connection.execute(update(SessionRow).where(SessionRow.digest == digest).values(seen_at=now))


def end(connection: Connection, digest: str) -> None:
    connection.execute(delete(SessionRow).where(SessionRow.digest == digest))
