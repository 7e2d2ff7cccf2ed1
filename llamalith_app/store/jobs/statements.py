"""Expressions and statements that several modules of `store/jobs/` use: which jobs are open, and which may be claimed.

Writes nothing. Statements that run for every job are built once, here and in the other modules: SQLAlchemy takes ten
times as long to build one as to run it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    and_,
    bindparam,
    literal_column,
    or_,
    select,
)
from sqlalchemy.orm import aliased

from llamalith_app.store.tables import (
    JobRow,
    Status,
    status_is,
)

open_job = aliased(JobRow)
is_open = open_job.status.in_([literal_column("'queued'"), literal_column("'processing'")])


def first_open(conversation_id: Any) -> Any:
    """The id of the conversation's first open job; null: none is open."""
    return (
        select(open_job.id)
        .where(open_job.conversation_id == conversation_id, is_open)
        .order_by(open_job.id)
        .limit(1)
        .scalar_subquery()
    )


# `queue_timeout_s` applies only before the first attempt.
waits_too_long = and_(status_is(Status.QUEUED), JobRow.not_after <= bindparam("until"), JobRow.attempt == 0)
may_still_wait = or_(JobRow.not_after.is_(None), JobRow.not_after > bindparam("until"), JobRow.attempt > 0)
BEST_DUE = (
    select(JobRow.id, JobRow.created_at)
    .where(
        status_is(Status.QUEUED),
        JobRow.model == bindparam("of_model"),
        JobRow.priority == bindparam("of_priority"),
        JobRow.is_first_in_lane,
        # A `not_before` beyond any backoff: the clock went back since it was stored.
        or_(JobRow.not_before <= bindparam("until"), JobRow.not_before > bindparam("beyond")),
        may_still_wait,
    )
    .order_by(JobRow.id)
    .limit(bindparam("most"))
)
LONGEST_BACKOFF = timedelta(minutes=2)
"""Longer than any backoff between two attempts."""


def due_parameters(now: datetime) -> dict[str, datetime]:
    """The times that BEST_DUE is executed with."""
    return {"until": now, "beyond": now + LONGEST_BACKOFF}
