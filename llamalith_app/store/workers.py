"""Worker processes: their registration, heartbeats and end. The only writer of their rows."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from llamalith_app.store.tables import WorkerRow

ALIVE_S = 15
"""Seconds of wall clock after its last heartbeat for which a worker counts as alive."""


class Sibling(NamedTuple):
    """Another worker process on this record."""

    id: int
    lock_path: str
    """A file that the worker holds locked while it lives."""


class WorkerState(NamedTuple):
    """A worker for people to look at."""

    id: int
    host: str
    models: list[str]
    n_slots: int
    started_at: datetime
    seen_at: datetime
    is_alive: bool


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
    """`engines`: the worker's list of EngineStatus, as JSON."""
    connection.execute(
        update(WorkerRow)
        .where(WorkerRow.id == worker_id)
        .values(heartbeat=WorkerRow.heartbeat + 1, seen_at=now, engines=engines)
    )


def statuses(connection: Connection, now: datetime) -> list[str]:
    """The engine statuses that each live worker has reported: one JSON list of EngineStatus per worker."""
    return [text for text in connection.execute(select(WorkerRow.engines).where(*_alive(now))).scalars() if text]


def not_ended_states(connection: Connection, now: datetime, limit: int) -> list[WorkerState]:
    """The workers that have not ended, also those that are silent; newest first."""
    rows = connection.execute(
        select(
            WorkerRow.id,
            WorkerRow.host,
            WorkerRow.models,
            WorkerRow.n_slots,
            WorkerRow.started_at,
            WorkerRow.seen_at,
        )
        .where(WorkerRow.ended_at.is_(None))
        .order_by(WorkerRow.seen_at.desc())
        .limit(limit)
    )
    silent_since = now - timedelta(seconds=ALIVE_S)
    return [
        WorkerState(
            row.id,
            row.host,
            json.loads(row.models),
            row.n_slots,
            row.started_at,
            row.seen_at,
            row.seen_at > silent_since,
        )
        for row in rows
    ]


def served_models(connection: Connection, now: datetime) -> set[str]:
    """The names of the models that live workers serve."""
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
