"""Reads what the status page shows of all jobs together: what waits, in which order, and how those that ended fared.

Every read is bounded: by the queue's partial index, by a number of jobs, or by both. Writes nothing. Runs in a snapshot
of `store/database.py`. What the numbers mean is computed in `jobs/statistics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, and_, func, select

from llamalith_app.store.tables import AttemptRow, JobRow, Priority, Status, status_is

MAX_COUNTED = 1000
"""Queued jobs of one model and class that are counted."""


class WaitingClass(NamedTuple):
    """The queued jobs of one model and class."""

    model: str
    priority: int
    n_jobs: int
    """At most MAX_COUNTED; there may be more then."""
    oldest_at: datetime
    """When the first of them was accepted."""


class EndedJob(NamedTuple):
    priority: int
    status: str
    created_at: datetime
    first_started_at: datetime | None
    """The start of its first attempt; None: it ended in the queue."""
    ended_at: datetime
    first_token_at: datetime | None = None
    """Of that attempt; None: there was none, or nobody knows."""


def waiting_classes(connection: Connection, owner_id: int, models: Iterable[str]) -> list[WaitingClass]:
    """The owner's queued jobs of these models, by model and class; only those of which any waits."""
    found = []
    for model in models:
        for priority in Priority:
            jobs = (
                select(JobRow.id)
                .where(
                    status_is(Status.QUEUED),
                    JobRow.model == model,
                    JobRow.priority == priority.value,
                    JobRow.owner_id == owner_id,
                )
                .order_by(JobRow.id)
                .limit(MAX_COUNTED)
                .subquery("waiting")
            )
            n_jobs, first = connection.execute(select(func.count(), func.min(jobs.c.id)).select_from(jobs)).one()
            if n_jobs:
                oldest_at = connection.execute(select(JobRow.created_at).where(JobRow.id == first)).scalar_one()
                found.append(WaitingClass(model, priority.value, n_jobs, oldest_at))
    return found


def next_ids(connection: Connection, owner_id: int, models: Iterable[str], limit: int) -> list[int]:
    """The ids of the owner's queued jobs that come first, at most `limit` of each model."""
    return [
        job_id
        for model in models
        for job_id in connection.execute(
            select(JobRow.id)
            .where(status_is(Status.QUEUED), JobRow.model == model, JobRow.owner_id == owner_id)
            .order_by(JobRow.priority, JobRow.id)
            .limit(limit)
        ).scalars()
    ]


def running_ids(connection: Connection, owner_id: int, limit: int) -> list[int]:
    """The ids of the owner's jobs that are processing, oldest first."""
    return list(
        connection.execute(
            select(JobRow.id)
            .where(status_is(Status.PROCESSING), JobRow.owner_id == owner_id)
            .order_by(JobRow.id)
            .limit(limit)
        ).scalars()
    )


def ended_lately(connection: Connection, owner_id: int, since: datetime, limit: int) -> list[EndedJob]:
    """The owner's jobs that ended last, at most `limit`, and none from before `since`; newest first."""
    rows = connection.execute(
        select(
            JobRow.priority,
            JobRow.status,
            JobRow.created_at,
            AttemptRow.started_at,
            JobRow.processed_at,
            AttemptRow.first_token_at,
        )
        .outerjoin(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == 1))
        # With the bare column SQLite would read and sort all jobs of the owner.
        .where(JobRow.processed_at.is_not(None), JobRow.processed_at >= since, (JobRow.owner_id + 0) == owner_id)
        .order_by(JobRow.processed_at.desc())
        .limit(limit)
    )
    return [EndedJob._make(row) for row in rows]
