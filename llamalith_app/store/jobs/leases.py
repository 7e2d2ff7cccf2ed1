"""The leases of running attempts and their heartbeats, for workers and the sweep.

Runs inside a transaction of `store/database.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import (
    Connection,
    bindparam,
    select,
    update,
)

from llamalith_app.store.tables import (
    JobRow,
    Status,
    status_is,
)


class ActiveLease(NamedTuple):
    """The lease of a job that is processing."""

    job_id: int
    attempt: int
    lease_token: str
    heartbeat: int
    worker_id: int
    answers_now: bool | None
    """Its thinking is to be closed."""


_ACTIVE = select(
    JobRow.id, JobRow.attempt, JobRow.lease_token, JobRow.heartbeat, JobRow.worker_id, JobRow.answers_now
).where(status_is(Status.PROCESSING))
_ACTIVE_OF_WORKER = _ACTIVE.where(JobRow.worker_id == bindparam("by_worker"))


def heartbeat(connection: Connection, lease_tokens: list[str]) -> None:
    """Raises the heartbeats of these leases. Leases that are no longer valid are ignored."""
    connection.execute(
        update(JobRow)
        .where(JobRow.lease_token.in_(lease_tokens), status_is(Status.PROCESSING))
        .values(heartbeat=JobRow.heartbeat + 1)
    )


def active_leases(connection: Connection, worker_id: int | None = None) -> list[ActiveLease]:
    """All leases of jobs that are processing, or those of one worker."""
    rows = (
        connection.execute(_ACTIVE)
        if worker_id is None
        else connection.execute(_ACTIVE_OF_WORKER, {"by_worker": worker_id})
    )
    return [ActiveLease._make(row) for row in rows]
