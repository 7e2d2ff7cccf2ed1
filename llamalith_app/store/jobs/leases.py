"""Who works on which job: the heartbeats of leases, for workers and sweepers.

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
    """A job that somebody is working on, as a sweeper sees it."""

    job_id: int
    attempt: int
    lease_token: str
    heartbeat: int
    worker_id: int


_HELD = select(JobRow.id, JobRow.attempt, JobRow.lease_token, JobRow.heartbeat, JobRow.worker_id).where(
    status_is(Status.PROCESSING)
)


_HELD_BY = _HELD.where(JobRow.worker_id == bindparam("by_worker"))


def heartbeat(connection: Connection, lease_tokens: list[str]) -> None:
    """Says that these attempts are alive; nothing happens for those whose lease holds no more."""
    connection.execute(
        update(JobRow)
        .where(JobRow.lease_token.in_(lease_tokens), status_is(Status.PROCESSING))
        .values(heartbeat=JobRow.heartbeat + 1)
    )


def active_leases(connection: Connection, worker_id: int | None = None) -> list[ActiveLease]:
    """Every lease that is out, or those of one worker."""
    rows = connection.execute(_HELD) if worker_id is None else connection.execute(_HELD_BY, {"by_worker": worker_id})
    return [ActiveLease._make(row) for row in rows]
