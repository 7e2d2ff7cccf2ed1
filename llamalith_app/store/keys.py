"""What requests with an Idempotency-Key were answered: the same again for the same request, for KEEP.

Written in the transaction of what the request made, so that both are there or neither. Knows no job and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select

from llamalith_app.errors import KeyReused
from llamalith_app.store.tables import KeyRow

T = TypeVar("T")

ANSWER_TTL = timedelta(hours=24)


class Key(NamedTuple):
    owner_id: int
    key: str
    """As its caller chose it; of no other caller."""
    digest: str
    """Of the whole request: another one under the same key is refused."""


def stored_answer(connection: Connection, key: Key, now: datetime, answer: type[T]) -> T | None:
    """The answer of before; None: there was none. Raises KeyReused where it was another request's."""
    seen = connection.execute(
        select(KeyRow.digest, KeyRow.answer).where(_matches(key), KeyRow.created_at > now - ANSWER_TTL)
    ).first()
    if seen is None:
        return None
    if seen.digest != key.digest:
        raise KeyReused(key.key)
    return msgspec.json.decode(seen.answer, type=answer)


def answer_once(connection: Connection, key: Key | None, now: datetime, answer: type[T], make: Callable[[], T]) -> T:
    """What `make` answers, or answered before. What it raises is not kept: the next try is a new one."""
    if key is None:
        return make()
    if (found := stored_answer(connection, key, now, answer)) is not None:
        return found
    made = make()
    connection.execute(delete(KeyRow).where(_matches(key)))
    connection.execute(
        insert(KeyRow).values(
            owner_id=key.owner_id,
            key=key.key,
            digest=key.digest,
            answer=msgspec.json.encode(made).decode(),
            created_at=now,
        )
    )
    return made


def has_expired_keys(connection: Connection, now: datetime) -> bool:
    """There is something to forget."""
    return (
        connection.execute(select(KeyRow.key).where(KeyRow.created_at <= now - ANSWER_TTL).limit(1)).first() is not None
    )


def delete_expired(connection: Connection, now: datetime, limit: int) -> int:
    """Deletes so many, the oldest, of those that nobody is answered by any more, and those of the same moment as the
    last of them; how many."""
    until = now - ANSWER_TTL
    last = (
        select(KeyRow.created_at)
        .where(KeyRow.created_at <= until)
        .order_by(KeyRow.created_at)
        .offset(limit - 1)
        .limit(1)
    )
    # Not by their names: SQLite would go through all keys of their owners for that.
    return connection.execute(
        delete(KeyRow).where(KeyRow.created_at <= (connection.execute(last).scalar() or until))
    ).rowcount


def _matches(key: Key) -> ColumnElement[bool]:
    return and_(KeyRow.owner_id == key.owner_id, KeyRow.key == key.key)
