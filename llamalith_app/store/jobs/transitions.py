"""The life of a job in the record: submit, claim, finish, fail, cancel, expire; and what workers have to know of it.

The only writer of jobs and attempts until they expire (`store/retention.py`). A transition first reads what it changes:
the job in the state, and after a claim under the lease, that it expects. It holds a lock on that row until it has
written; SQLite has one writer and needs no lock. Its return value says whether it was the one that moved the job.
Every job ends by `_end`. Runs inside a transaction of `store/database.py`. Knows no queue and no engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    Connection,
    Table,
    Update,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    select,
    update,
)

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.parameters import Parameters
from llamalith_app.store import turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.jobs.statements import BEST_DUE, at, first_open, waits_too_long
from llamalith_app.store.tables import (
    AttemptRow,
    ConversationRow,
    JobRow,
    Outcome,
    Status,
    status_is,
)

_jobs = cast(Table, JobRow.__table__)
_attempts = cast(Table, AttemptRow.__table__)


TIMEOUT = "timeout"
"""The kind of the error of a job that waited or ran too long."""


class Claim(NamedTuple):
    """The right to run one attempt, good as long as its lease token is the job's."""

    job_id: int
    attempt: int
    lease_token: str
    conversation_id: int
    turn_id: int
    model: str
    grammar_name: str | None
    request_id: str
    parameters: Parameters | None
    timeout_s: float | None
    unenforced: tuple[str, ...] = ()


class Written(NamedTuple):
    """What an attempt had made of its reply when it was stopped."""

    text: str
    """Empty: nothing yet."""
    prompt_tokens: int | None
    completion_tokens: int


# Whoever claims at the same moment passes over what this one is about to claim.
_NEXT = BEST_DUE.with_for_update(skip_locked=True)


_CLAIM = (
    update(_jobs)
    .where(JobRow.id == bindparam("of_job"), status_is(Status.QUEUED))
    .values(
        status=Status.PROCESSING.value,
        attempt=JobRow.attempt + 1,
        lease_token=bindparam("new_lease"),
        heartbeat=0,
        worker_id=bindparam("by_worker"),
        started_at=bindparam("at"),
    )
    .returning(
        JobRow.id,
        JobRow.attempt,
        JobRow.lease_token,
        JobRow.conversation_id,
        JobRow.turn_id,
        JobRow.model,
        JobRow.grammar_name,
        JobRow.request_id,
        JobRow.parameters,
        JobRow.timeout_s,
        JobRow.unenforced,
    )
)


_TAKE_CONVERSATIONS = (
    select(ConversationRow.id)
    .where(
        ConversationRow.id.in_(
            select(JobRow.conversation_id).where(JobRow.id.in_(bindparam("of_jobs", expanding=True)))
        )
    )
    .order_by(ConversationRow.id)
    .with_for_update()
)


_PROMOTE = (
    update(_jobs).where(JobRow.id == first_open(bindparam("of_conversation")), ~JobRow.is_head).values(is_head=True)
)


_NEW_ATTEMPT = insert(_attempts)


_CLOSE_ATTEMPT = (
    update(_attempts)
    .where(AttemptRow.lease_token == bindparam("of_lease"))
    .values(ended_at=bindparam("at"), outcome=bindparam("how"), kind=bindparam("of_kind"), reason=bindparam("why"))
)


_LEASED = (
    select(JobRow.conversation_id, JobRow.turn_id, JobRow.max_attempts, JobRow.heartbeat)
    .where(JobRow.id == bindparam("of_job"), JobRow.lease_token == bindparam("of_lease"), status_is(Status.PROCESSING))
    .with_for_update()
)


_SPENT = select(func.count()).where(
    AttemptRow.job_id == bindparam("of_job"),
    AttemptRow.outcome.in_([literal_column("'failed'"), literal_column("'lost'")]),
)


_REQUEUE = (
    update(_jobs)
    .where(JobRow.id == bindparam("of_job"), status_is(Status.PROCESSING))
    .values(status=Status.QUEUED.value, lease_token=None, not_before=bindparam("from_then"))
)


def claim(connection: Connection, model: str, priority: int, worker_id: int, now: datetime) -> Claim | None:
    """The oldest due job of the model and class whose conversation has nothing earlier open; None: nothing to do."""
    job_id = connection.execute(_NEXT, {"of_model": model, "of_priority": priority, "most": 1, **at(now)}).scalar()
    if job_id is None:
        return None
    lease_token = secrets.token_hex(16)
    row = connection.execute(
        _CLAIM, {"of_job": job_id, "new_lease": lease_token, "by_worker": worker_id, "at": now}
    ).first()
    if row is None:
        return None
    claimed = Claim._make(row)._replace(
        parameters=reads.parameters(row.parameters), unenforced=tuple(reads.unenforced(row.unenforced))
    )
    connection.execute(
        _NEW_ATTEMPT,
        {
            "job_id": claimed.job_id,
            "attempt": claimed.attempt,
            "worker_id": worker_id,
            "lease_token": lease_token,
            "started_at": now,
        },
    )
    return claimed


def finish(
    connection: Connection,
    job_id: int,
    lease_token: str,
    now: datetime,
    *,
    reply: str,
    finish_reason: str,
    prompt_tokens: int,
    prompt_tokens_reused: int,
    completion_tokens: int,
    omitted_messages: int,
    reply_valid: bool | None = None,
    reply_problem: str | None = None,
) -> bool:
    """Stores the reply and ends the job. False: the lease is somebody else's now, nothing was written."""
    _take_conversations(connection, [job_id])
    job = connection.execute(_LEASED, {"of_job": job_id, "of_lease": lease_token}).first()
    if job is None:
        return False
    turns.add_reply(connection, job.turn_id, Message(role="assistant", content=reply), now)
    done = {
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_reused": prompt_tokens_reused,
        "completion_tokens": completion_tokens,
        "omitted_messages": omitted_messages,
        "reply_valid": reply_valid,
        "reply_problem": reply_problem,
    }
    _end(connection, [_Ending(job_id, job.conversation_id, lease_token, done)], Status.DONE, now)
    return True


class _Ending(NamedTuple):
    """One job that is to end, locked by whoever decided it."""

    job_id: int
    conversation_id: int
    lease_token: str | None
    """None: nobody runs it."""
    columns: dict[str, Any]
    """What else is written into its row; the same columns for all that end together."""


_OUTCOMES = {Status.DONE: Outcome.DONE, Status.ERROR: Outcome.FAILED, Status.CANCELLED: Outcome.CANCELLED}


def _end(
    connection: Connection,
    jobs: Sequence[_Ending],
    status: Status,
    now: datetime,
    *,
    outcome: Outcome | None = None,
    kind: str | None = None,
    reason: str | None = None,
) -> None:
    """Ends open jobs: the only way to a terminal state. Closes their attempts, with that outcome, kind and reason, and
    lets what waits behind them be the next of its conversation."""
    if not jobs:
        return
    connection.execute(
        _ending(status, tuple(jobs[0].columns)),
        [{"of_job": job.job_id, "at": now, **job.columns} for job in jobs],
    )
    for job in jobs:
        if job.lease_token is not None:
            _close_attempt(connection, job.lease_token, outcome or _OUTCOMES[status], reason, now, kind)
    _promote_next_head(connection, sorted({job.conversation_id for job in jobs}))


@cache
def _ending(status: Status, columns: tuple[str, ...]) -> Update:
    return (
        update(_jobs)
        .where(JobRow.id == bindparam("of_job"), status_is(Status.QUEUED, Status.PROCESSING))
        .values(
            status=status.value,
            lease_token=None,
            processed_at=bindparam("at"),
            **{column: bindparam(column) for column in columns},
        )
    )


def _take_conversations(connection: Connection, job_ids: Collection[int]) -> None:
    """Locks the conversations of these jobs where there are several writers: one that appends to a conversation and one
    that ends its head would each miss what the other does, and nobody would move up. To be called before either writes
    a job."""
    if connection.dialect.name != "sqlite":
        connection.execute(_TAKE_CONVERSATIONS, {"of_jobs": list(job_ids)})


def _promote_next_head(connection: Connection, conversations: Collection[int]) -> None:
    """Jobs of these conversations have ended: what is open first is the head now."""
    if conversations:
        connection.execute(_PROMOTE, [{"of_conversation": conversation_id} for conversation_id in conversations])


def fail(
    connection: Connection,
    job_id: int,
    lease_token: str,
    now: datetime,
    *,
    outcome: Outcome,
    kind: str,
    reason: str,
    pause: timedelta | None,
    seen_heartbeat: int | None = None,
    written: Written | None = None,
) -> Status | None:
    """Ends an attempt without a reply: back to the queue after `pause`, or `error` when that is None or
    the job has spent its attempts. `released` spends none.

    `seen_heartbeat`: a sweeper's guard, the heartbeat that must not have moved. `written`: kept with an error.
    None: the lease is somebody else's.
    """
    _take_conversations(connection, [job_id])
    job = connection.execute(_LEASED, {"of_job": job_id, "of_lease": lease_token}).first()
    if job is None or (seen_heartbeat is not None and job.heartbeat != seen_heartbeat):
        return None
    spent = connection.execute(_SPENT, {"of_job": job_id}).scalar_one() + (outcome in (Outcome.FAILED, Outcome.LOST))
    if outcome is Outcome.RELEASED or (pause is not None and spent < job.max_attempts):
        _close_attempt(connection, lease_token, outcome, reason, now, kind)
        connection.execute(_REQUEUE, {"of_job": job_id, "from_then": now + (pause or timedelta())})
        return Status.QUEUED
    columns = {"error_kind": kind, "error": reason, **({} if written is None else _as_columns(written))}
    ending = _Ending(job_id, job.conversation_id, lease_token, columns)
    _end(connection, [ending], Status.ERROR, now, outcome=outcome, kind=kind, reason=reason)
    return Status.ERROR


def cancel(connection: Connection, owner_id: int, job_id: int, now: datetime) -> Status | None:
    """The state that won: `cancelled`, or the terminal state that came first. None: no such job of this owner."""
    _take_conversations(connection, [job_id])
    job = connection.execute(
        select(JobRow.status, JobRow.conversation_id, JobRow.lease_token)
        .where(JobRow.id == job_id, JobRow.owner_id == owner_id)
        .with_for_update()
    ).first()
    if job is None:
        return None
    if job.status not in (Status.QUEUED, Status.PROCESSING):
        return Status(job.status)
    _end(connection, [_Ending(job_id, job.conversation_id, job.lease_token, {})], Status.CANCELLED, now)
    return Status.CANCELLED


def cancel_open(
    connection: Connection,
    owner_id: int,
    now: datetime,
    *,
    statuses: Collection[Status],
    limit: int,
    conversation_id: str | None = None,
    model: str | None = None,
) -> list[int]:
    """Cancels an owner's jobs in these open states, those of one conversation or model only where these are given:
    all that run and the newest `limit` that wait. Their ids; where fewer than `limit` waited, none is left.

    The newest first: what stands behind a cancelled job of its conversation is not started in between.
    """
    mine = [JobRow.owner_id == owner_id]
    if model is not None:
        mine.append(JobRow.model == model)
    if conversation_id is not None:
        mine.append(JobRow.conversation_id == reads.conversation_of(owner_id, conversation_id))
    wanted: list[int] = []
    if Status.PROCESSING in statuses:
        wanted += connection.execute(select(JobRow.id).where(status_is(Status.PROCESSING), *mine)).scalars()
    if Status.QUEUED in statuses:
        waiting = select(JobRow.id).where(status_is(Status.QUEUED), *mine).order_by(JobRow.id.desc()).limit(limit)
        wanted += connection.execute(waiting).scalars()
    _take_conversations(connection, wanted)
    found = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.lease_token)
        .where(JobRow.id.in_(wanted), status_is(Status.QUEUED, Status.PROCESSING))
        .with_for_update()
    )
    ending = [_Ending(job.id, job.conversation_id, job.lease_token, {}) for job in found]
    _end(connection, ending, Status.CANCELLED, now)
    return [job.job_id for job in ending]


def keep_written(connection: Connection, job_id: int, lease_token: str, _now: datetime, *, written: Written) -> bool:
    """Stores what the attempt of a job that was cancelled had written by then. False: this attempt was not ended by
    a cancel."""
    kept = connection.execute(
        update(JobRow)
        .where(
            JobRow.id == job_id,
            status_is(Status.CANCELLED),
            JobRow.partial.is_(None),
            exists().where(
                AttemptRow.job_id == job_id,
                AttemptRow.lease_token == lease_token,
                AttemptRow.outcome == Outcome.CANCELLED.value,
            ),
        )
        .values(**_as_columns(written))
    )
    return kept.rowcount > 0


def _as_columns(written: Written) -> dict[str, Any]:
    return {
        "partial": written.text or None,
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.completion_tokens,
    }


def expire_queued(connection: Connection, now: datetime, limit: int) -> list[int]:
    """Ends the jobs that waited longer for their first start than they may, `limit` of them at most. Their ids."""
    ids = connection.execute(select(JobRow.id).where(waits_too_long).limit(limit), {"until": now}).scalars().all()
    if not ids:
        return []
    _take_conversations(connection, ids)
    late = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.created_at, JobRow.not_after)
        .where(JobRow.id.in_(ids), waits_too_long)
        .with_for_update(),
        {"until": now},
    )
    ending = [
        _Ending(
            job.id,
            job.conversation_id,
            None,
            {
                "error_kind": TIMEOUT,
                "error": f"It waited {(now - job.created_at).total_seconds():.1f} s in the queue;"
                f" queue_timeout_s allowed {reads.seconds_between(job.created_at, job.not_after):g}.",
            },
        )
        for job in late
    ]
    _end(connection, ending, Status.ERROR, now)
    return [job.job_id for job in ending]


def _close_attempt(
    connection: Connection,
    lease_token: str,
    outcome: Outcome,
    reason: str | None,
    now: datetime,
    kind: str | None = None,
) -> None:
    connection.execute(
        _CLOSE_ATTEMPT,
        {"of_lease": lease_token, "at": now, "how": outcome.value, "of_kind": kind, "why": reason},
    )
