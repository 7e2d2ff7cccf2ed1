"""Idempotency keys: stores the answer of a request with a key, and returns it to each repetition for ANSWER_TTL.

The answer is written in the transaction of the request's own writes, so that both are stored or neither. Knows no job
and no HTTP.
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
    """As its caller chose it. Each owner has keys of its own."""
    digest: str
    """Of the whole request. A different request under the same key is refused."""


def stored_answer(connection: Connection, key: Key, now: datetime, answer: type[T]) -> T | None:
    """The stored answer of this request. None: there is none. Raises KeyReused where the key has another request's."""
    seen = connection.execute(
        select(KeyRow.digest, KeyRow.answer).where(_matches(key), KeyRow.created_at > now - ANSWER_TTL)
    ).first()
    if seen is None:
        return None
    if seen.digest != key.digest:
        raise KeyReused(key.key)
    return msgspec.json.decode(seen.answer, type=answer)


def answer_once(connection: Connection, key: Key | None, now: datetime, answer: type[T], make: Callable[[], T]) -> T:
    """The stored answer, else what `make` returns, which is stored then. Where `make` raises, nothing is stored.

    Raises KeyReused. `key` None: only calls `make`.
    """
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
    """Whether `delete_expired` would delete something."""
    return (
        connection.execute(select(KeyRow.key).where(KeyRow.created_at <= now - ANSWER_TTL).limit(1)).first() is not None
    )


def delete_expired(connection: Connection, now: datetime, limit: int) -> int:
    """Deletes the `limit` oldest keys that have expired, and those that were stored at the same moment as the last of
    these. Returns how many."""
    until = now - ANSWER_TTL
    last = (
        select(KeyRow.created_at)
        .where(KeyRow.created_at <= until)
        .order_by(KeyRow.created_at)
        .offset(limit - 1)
        .limit(1)
    )
    # By age, not by primary key: for that, SQLite would scan all keys of their owners.
    return connection.execute(
        delete(KeyRow).where(KeyRow.created_at <= (connection.execute(last).scalar() or until))
    ).rowcount


def _matches(key: Key) -> ColumnElement[bool]:
    return and_(KeyRow.owner_id == key.owner_id, KeyRow.key == key.key)
