"""Queued jobs: how many there are, and which may start now.

Writes nothing. Runs in a snapshot of `store/database.py`. Which of them starts first is decided in `jobs/order.py`.
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

from llamalith_app.store.jobs.statements import BEST_DUE, LONGEST_BACKOFF, due_parameters, first_open
from llamalith_app.store.tables import (
    JobRow,
    Priority,
    Status,
    status_is,
)


class RunnableJob(NamedTuple):
    """A queued job that may start now."""

    job_id: int
    model: str
    attempt: int
    """Claims so far."""


class DueJobs(NamedTuple):
    """The jobs of one model and priority class that may start now."""

    model: str
    priority: int
    n_jobs: int
    """At most MAX_DUE."""
    oldest: datetime
    """When the first of them was accepted (by id, so it is the oldest)."""


class QueueDepth(NamedTuple):
    """The jobs that wait and those that run."""

    queued: dict[str, int]
    """The number of queued jobs by model."""
    running: list[tuple[str, datetime]]
    """Model and start of each job that is processing."""
    due: list[DueJobs]


_ended = aliased(JobRow)


def n_queued(connection: Connection, owner_id: int) -> int:
    """The number of an owner's queued jobs."""
    return connection.execute(
        select(func.count()).where(JobRow.owner_id == owner_id, JobRow.status == Status.QUEUED.value)
    ).scalar_one()


def newly_runnable(connection: Connection, ended: Collection[int], now: datetime) -> list[RunnableJob]:
    """The jobs that may start now that these have ended: the next ones of their conversations."""
    next_ones = select(first_open(_ended.conversation_id)).where(_ended.id.in_(ended))
    rows = connection.execute(
        select(JobRow.id, JobRow.model, JobRow.attempt).where(
            JobRow.id.in_(next_ones),
            status_is(Status.QUEUED),
            or_(JobRow.not_before <= now, JobRow.not_before > now + LONGEST_BACKOFF),
        )
    )
    return [RunnableJob._make(row) for row in rows]


MAX_DUE = 64
"""Jobs that `due_jobs` counts for a model and class. No worker has slots for more at once."""


def due_jobs(connection: Connection, models: Iterable[str], now: datetime) -> list[DueJobs]:
    """The jobs that could be claimed now, for each model and priority class that has any."""
    found = []
    for model in models:
        for priority in Priority:
            of = {"of_model": model, "of_priority": priority.value, "most": MAX_DUE, **due_parameters(now)}
            if rows := connection.execute(BEST_DUE, of).all():
                found.append(DueJobs(model, priority, len(rows), rows[0].created_at))
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
        due_jobs(connection, models, now),
    )
