"""Who works: worker processes that came, beat and went. The only writer of their rows."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from llamalith_app.store.tables import WorkerRow

ALIVE_S = 15
"""Seconds of wall clock after its last beat for which a worker counts as there."""


class Sibling(NamedTuple):
    id: int
    lock_path: str


def register(
    connection: Connection,
    *,
    host: str,
    pid: int,
    lock_path: str,
    models: list[str],
    n_slots: int,
    now: datetime,
) -> int:
    return connection.execute(
        insert(WorkerRow)
        .values(
            host=host,
            pid=pid,
            lock_path=lock_path,
            models=json.dumps(models),
            n_slots=n_slots,
            heartbeat=0,
            started_at=now,
            seen_at=now,
        )
        .returning(WorkerRow.id)
    ).scalar_one()


def heartbeat(connection: Connection, worker_id: int, now: datetime, engines: str | None = None) -> None:
    """`engines`: what the worker tells of them, as JSON."""
    connection.execute(
        update(WorkerRow)
        .where(WorkerRow.id == worker_id)
        .values(heartbeat=WorkerRow.heartbeat + 1, seen_at=now, engines=engines)
    )


def told(connection: Connection, now: datetime) -> list[str]:
    """What each worker that is alive told of its engines."""
    return [text for text in connection.execute(select(WorkerRow.engines).where(*_alive(now))).scalars() if text]


def served(connection: Connection, now: datetime) -> set[str]:
    """The models of all workers that are alive."""
    lists = connection.execute(select(WorkerRow.models).where(*_alive(now))).scalars()
    return {model for models in lists for model in json.loads(models)}


def _alive(now: datetime) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return WorkerRow.ended_at.is_(None), WorkerRow.seen_at > now - timedelta(seconds=ALIVE_S)


def end(connection: Connection, worker_id: int, now: datetime) -> None:
    connection.execute(
        update(WorkerRow).where(WorkerRow.id == worker_id, WorkerRow.ended_at.is_(None)).values(ended_at=now)
    )


def not_ended(connection: Connection) -> list[Sibling]:
    return [
        Sibling(*row)
        for row in connection.execute(select(WorkerRow.id, WorkerRow.lock_path).where(WorkerRow.ended_at.is_(None)))
    ]


def n_alive(connection: Connection, now: datetime) -> int:
    return connection.execute(select(func.count()).select_from(WorkerRow).where(*_alive(now))).scalar_one()
