"""What waits, and what of it may start now.

Reads only. Runs in a snapshot of `store/database.py`. Decides nothing: `jobs/order.py` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import (
    Connection,
    func,
    or_,
    select,
)
from sqlalchemy.orm import aliased

from llamalith_app.store.jobs.statements import BEST_DUE, LONGEST_BACKOFF, at, first_open
from llamalith_app.store.tables import (
    JobRow,
    Priority,
    Status,
    status_is,
)


class Waiting(NamedTuple):
    """A queued job that nothing holds back."""

    job_id: int
    model: str
    attempt: int
    """Claims so far."""


class Due(NamedTuple):
    """What waits for one model in one class and may start now."""

    model: str
    priority: int
    n_jobs: int
    """At most MOST_DUE."""
    oldest: datetime
    """When the first of them was accepted."""


class QueueDepth(NamedTuple):
    """What is to be done and what is being done."""

    queued: dict[str, int]
    """Jobs that wait, by model."""
    running: list[tuple[str, datetime]]
    """Model and start of each job that is processing."""
    due: list[Due]


_ended = aliased(JobRow)


def n_queued(connection: Connection, owner_id: int) -> int:
    """Jobs of an owner that wait."""
    return connection.execute(
        select(func.count()).where(JobRow.owner_id == owner_id, JobRow.status == Status.QUEUED.value)
    ).scalar_one()


def newly_runnable(connection: Connection, ended: Collection[int], now: datetime) -> list[Waiting]:
    """Of the conversations of these jobs, which have ended, the jobs that may start now."""
    heads = select(first_open(_ended.conversation_id)).where(_ended.id.in_(ended))
    rows = connection.execute(
        select(JobRow.id, JobRow.model, JobRow.attempt).where(
            JobRow.id.in_(heads),
            status_is(Status.QUEUED),
            or_(JobRow.not_before <= now, JobRow.not_before > now + LONGEST_BACKOFF),
        )
    )
    return [Waiting._make(row) for row in rows]


MOST_DUE = 64
"""Jobs of a model and class that `due` looks at; more would not find a place at once."""


def due(connection: Connection, models: Iterable[str], now: datetime) -> list[Due]:
    """For each of the models and each class what could be claimed now."""
    found = []
    for model in models:
        for priority in Priority:
            of = {"of_model": model, "of_priority": priority.value, "most": MOST_DUE, **at(now)}
            if rows := connection.execute(BEST_DUE, of).all():
                found.append(Due(model, priority, len(rows), rows[0].created_at))
    return found


def n_queued_by_model(connection: Connection) -> dict[str, int]:
    return {
        row.model: row.n
        for row in connection.execute(
            select(JobRow.model, func.count().label("n")).where(status_is(Status.QUEUED)).group_by(JobRow.model)
        )
    }


def queue_depth(connection: Connection, models: Iterable[str], now: datetime) -> QueueDepth:
    running = connection.execute(select(JobRow.model, JobRow.started_at).where(status_is(Status.PROCESSING)))
    return QueueDepth(
        n_queued_by_model(connection),
        [(model, started_at) for model, started_at in running if started_at is not None],
        due(connection, models, now),
    )
