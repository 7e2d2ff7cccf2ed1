"""Sessions of browsers: opened at login, found by each request, ended at logout or by their age.

The only writer of sessions. Knows digests of tokens and neither tokens nor cookies (`guards/sessions.py`).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, insert, select, update

from llamalith_app.store.tables import SessionRow

IDLE = timedelta(hours=12)
ABSOLUTE = timedelta(days=7)


def _alive(created_after: object, seen_after: object) -> ColumnElement[bool]:
    return and_(SessionRow.created_at > created_after, SessionRow.seen_at > seen_after)


_FIND = select(SessionRow.user_id, SessionRow.seen_at).where(
    SessionRow.digest == bindparam("of_digest"), _alive(bindparam("created_after"), bindparam("seen_after"))
)


def begin(connection: Connection, digest: str, user_id: int, now: datetime) -> None:
    """Also forgets the sessions that have ended by their age."""
    connection.execute(delete(SessionRow).where(~_alive(now - ABSOLUTE, now - IDLE)))
    connection.execute(insert(SessionRow).values(digest=digest, user_id=user_id, created_at=now, seen_at=now))


def find(connection: Connection, digest: str, now: datetime) -> tuple[int, datetime] | None:
    """The user's id and when the session was last used; None: no such session, or it has ended."""
    ages = {"created_after": now - ABSOLUTE, "seen_after": now - IDLE}
    row = connection.execute(_FIND, {"of_digest": digest, **ages}).first()
    return None if row is None else (row.user_id, row.seen_at)


def touch(connection: Connection, digest: str, now: datetime) -> None:
    connection.execute(update(SessionRow).where(SessionRow.digest == digest).values(seen_at=now))


def end(connection: Connection, digest: str) -> None:
    connection.execute(delete(SessionRow).where(SessionRow.digest == digest))
