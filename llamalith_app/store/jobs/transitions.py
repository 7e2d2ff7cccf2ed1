"""The state machine of a job: claim, finish, fail, cancel, expire; and what may change of one that waits.

The only module that changes jobs and attempts between `submission` and their deletion (`store/retention.py`); only
`leases` raises heartbeats. A transition first reads the job in the state that it expects, and after a claim also under
the lease that it expects. It locks that row until it has written; SQLite has one writer and needs no lock. `finish`
reads and writes it in one statement. The return value says whether this call moved the job. What follows each end is in
`_after_end`, and every end but that of `finish` is written by `_end`. Runs inside a transaction of `store/database.py`.
Knows no queue and no engine.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, cast

from advanced_alchemy.types import DateTimeUTC
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
from llamalith_app.store.jobs.statements import BEST_DUE, due_parameters, first_open, waits_too_long
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
"""The error kind of a job that waited or ran too long."""


class Claim(NamedTuple):
    """The right to run one attempt, valid while the job has this lease token."""

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


class PartialReply(NamedTuple):
    """What an attempt had written of the reply when it was stopped."""

    text: str
    """Empty: nothing yet."""
    prompt_tokens: int | None
    completion_tokens: int
    thinking: str = ""


class AttemptTimes(NamedTuple):
    """When an attempt came how far, by its worker's clock. None: it has not, or nobody knows."""

    loaded_at: datetime | None = None
    """Its model was ready."""
    prompt_read_at: datetime | None = None
    first_token_at: datetime | None = None


UNKNOWN_TIMES = AttemptTimes()

# Concurrent claims skip the row that this one is about to claim.
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
_LOCK_CONVERSATIONS = (
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
    update(_jobs)
    .where(JobRow.id == first_open(bindparam("of_conversation")), ~JobRow.is_first_in_lane)
    .values(is_first_in_lane=True)
)
_INSERT_ATTEMPT = insert(_attempts)
# Whoever ends an attempt for its worker does not know its times, and keeps those that a heartbeat brought.
_NEW_TIMES = {
    name: func.coalesce(bindparam(f"new_{name}", type_=DateTimeUTC), getattr(AttemptRow, name))
    for name in AttemptTimes._fields
}
_CLOSE_ATTEMPT = (
    update(_attempts)
    .where(AttemptRow.lease_token == bindparam("of_lease"))
    .values(
        ended_at=bindparam("at"),
        outcome=bindparam("how"),
        kind=bindparam("of_kind"),
        reason=bindparam("why"),
        **_NEW_TIMES,
    )
)
_SET_TIMES = update(_attempts).where(AttemptRow.lease_token == bindparam("of_lease")).values(**_NEW_TIMES)
_LEASED = (
    select(JobRow.conversation_id, JobRow.max_attempts, JobRow.heartbeat)
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
    """Claims the oldest due job of the model and priority class that is the first in its lane. None: there is none."""
    job_id = connection.execute(
        _NEXT, {"of_model": model, "of_priority": priority, "most": 1, **due_parameters(now)}
    ).scalar()
    if job_id is None:
        return None
    lease_token = secrets.token_hex(16)
    row = connection.execute(
        _CLAIM, {"of_job": job_id, "new_lease": lease_token, "by_worker": worker_id, "at": now}
    ).first()
    if row is None:
        return None
    claimed = Claim._make(row)._replace(
        parameters=reads.decode_parameters(row.parameters), unenforced=tuple(reads.decode_unenforced(row.unenforced))
    )
    connection.execute(
        _INSERT_ATTEMPT,
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
    reply_to: turns.ReplyTo,
    reply: str,
    thinking: str = "",
    thinking_s: float | None = None,
    thinking_tokens: int | None = None,
    times: AttemptTimes = UNKNOWN_TIMES,
    finish_reason: str,
    prompt_tokens: int,
    prompt_tokens_reused: int,
    completion_tokens: int,
    omitted_messages: int,
    reply_valid: bool | None = None,
    reply_problem: str | None = None,
) -> bool:
    """Stores the reply, with what was thought before it, and ends the job. `reply_to`: of this attempt's
    `turns.read_turn`. False: the lease is no longer valid, and nothing was written."""
    _lock_conversations(connection, [job_id])
    columns = {
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_reused": prompt_tokens_reused,
        "completion_tokens": completion_tokens,
        "thinking_tokens": thinking_tokens,
        "omitted_messages": omitted_messages,
        "reply_valid": reply_valid,
        "reply_problem": reply_problem,
    }
    of = {"of_job": job_id, "of_lease": lease_token, "at": now, **columns}
    job = connection.execute(_finish_statement(tuple(columns)), of).first()
    if job is None:
        return False
    message = Message(role="assistant", content=reply, thinking=thinking or None, thinking_s=thinking_s)
    turns.add_reply(connection, reply_to, message, now)
    ending = _Ending(job_id, job.conversation_id, lease_token, columns)
    _after_end(connection, [ending], Outcome.DONE, now, times=times)
    return True


class _Ending(NamedTuple):
    """A job to end. The caller has locked its row."""

    job_id: int
    conversation_id: int
    lease_token: str | None
    """None: it is queued."""
    columns: dict[str, Any]
    """Further values for its row; the same columns for all jobs that end together."""


_OUTCOMES = {Status.ERROR: Outcome.FAILED, Status.CANCELLED: Outcome.CANCELLED}


def _end(
    connection: Connection,
    jobs: Sequence[_Ending],
    status: Status,
    now: datetime,
    *,
    outcome: Outcome | None = None,
    kind: str | None = None,
    reason: str | None = None,
    times: AttemptTimes = UNKNOWN_TIMES,
) -> None:
    """Ends open jobs, and closes their attempts with that outcome, kind, reason and these times."""
    if not jobs:
        return
    connection.execute(
        _end_statement(status, tuple(jobs[0].columns)),
        [{"of_job": job.job_id, "at": now, **job.columns} for job in jobs],
    )
    _after_end(connection, jobs, outcome or _OUTCOMES[status], now, kind=kind, reason=reason, times=times)


def _after_end(
    connection: Connection,
    jobs: Sequence[_Ending],
    outcome: Outcome,
    now: datetime,
    *,
    kind: str | None = None,
    reason: str | None = None,
    times: AttemptTimes = UNKNOWN_TIMES,
) -> None:
    """What follows whenever jobs have ended: closes their attempts, and promotes the next jobs of their lanes."""
    for job in jobs:
        if job.lease_token is not None:
            _close_attempt(connection, job.lease_token, outcome, reason, now, kind, times)
    _promote_next(connection, sorted({job.conversation_id for job in jobs}))


@cache
def _end_statement(status: Status, columns: tuple[str, ...]) -> Update:
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


@cache
def _finish_statement(columns: tuple[str, ...]) -> Any:
    return (
        _end_statement(Status.DONE, columns)
        .where(JobRow.lease_token == bindparam("of_lease"))
        .returning(JobRow.conversation_id)
    )


def _lock_conversations(connection: Connection, job_ids: Collection[int]) -> None:
    """Locks the conversations of these jobs, before any job is written. With several concurrent writers, a submit and
    the end of the first job in a lane would each miss the other's change, and the new job would not be the first."""
    if connection.dialect.name != "sqlite":
        connection.execute(_LOCK_CONVERSATIONS, {"of_jobs": list(job_ids)})


def _promote_next(connection: Connection, conversations: Collection[int]) -> None:
    """Marks the first open job of each conversation as the first in its lane, after jobs of these have ended."""
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
    written: PartialReply | None = None,
    times: AttemptTimes = UNKNOWN_TIMES,
) -> Status | None:
    """Ends an attempt without a reply. The job is queued again, to start after `pause`; or it ends as `error` where
    `pause` is None or the job has spent its attempts. The outcome `released` spends none.

    `seen_heartbeat`: for the sweep; where the heartbeat has moved since, nothing changes. `written`: stored with an
    error. Returns the new status; None: the lease is no longer valid, or the heartbeat has moved.
    """
    _lock_conversations(connection, [job_id])
    job = connection.execute(_LEASED, {"of_job": job_id, "of_lease": lease_token}).first()
    if job is None or (seen_heartbeat is not None and job.heartbeat != seen_heartbeat):
        return None
    spent = connection.execute(_SPENT, {"of_job": job_id}).scalar_one() + (outcome in (Outcome.FAILED, Outcome.LOST))
    if outcome is Outcome.RELEASED or (pause is not None and spent < job.max_attempts):
        _close_attempt(connection, lease_token, outcome, reason, now, kind, times)
        connection.execute(_REQUEUE, {"of_job": job_id, "from_then": now + (pause or timedelta())})
        return Status.QUEUED
    columns = {"error_kind": kind, "error": reason, **({} if written is None else _partial_columns(written))}
    ending = _Ending(job_id, job.conversation_id, lease_token, columns)
    _end(connection, [ending], Status.ERROR, now, outcome=outcome, kind=kind, reason=reason, times=times)
    return Status.ERROR


def cancel(connection: Connection, owner_id: int, job_id: int, now: datetime) -> Status | None:
    """Cancels an open job. Returns `cancelled`, or the terminal status that it had before. None: no such job of this
    owner."""
    _lock_conversations(connection, [job_id])
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


def edit_prompt(connection: Connection, owner_id: int, job_id: int, content: str) -> bool | None:
    """Replaces the prompt of a queued job. False: it has been started, or has ended, and nothing was written. None: no
    such job of this owner."""
    job = connection.execute(
        select(JobRow.status, JobRow.attempt, JobRow.turn_id)
        .where(
            JobRow.id == job_id,
            JobRow.owner_id == owner_id,
            exists().where(ConversationRow.id == JobRow.conversation_id, reads.is_kept),
        )
        .with_for_update(of=JobRow)
    ).first()
    if job is None:
        return None
    if job.status != Status.QUEUED or job.attempt:
        return False
    turns.replace_prompt(connection, job.turn_id, content)
    return True


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
    """Cancels an owner's jobs in these open states, optionally of one conversation or model only: all that run and the
    newest `limit` that wait. Returns their ids. Where fewer than `limit` waited, none is left.

    The newest first, so that between two calls no job starts because an earlier one of its conversation was cancelled.
    """
    mine = [JobRow.owner_id == owner_id]
    if model is not None:
        mine.append(JobRow.model == model)
    if conversation_id is not None:
        mine.append(JobRow.conversation_id == reads.conversation_id_of(owner_id, conversation_id))
    wanted: list[int] = []
    if Status.PROCESSING in statuses:
        wanted += connection.execute(select(JobRow.id).where(status_is(Status.PROCESSING), *mine)).scalars()
    if Status.QUEUED in statuses:
        waiting = select(JobRow.id).where(status_is(Status.QUEUED), *mine).order_by(JobRow.id.desc()).limit(limit)
        wanted += connection.execute(waiting).scalars()
    return cancel_jobs(connection, owner_id, wanted, now)


def cancel_jobs(connection: Connection, owner_id: int, job_ids: Collection[int], now: datetime) -> list[int]:
    """Cancels those of these jobs that are open and the owner's. Returns their ids."""
    _lock_conversations(connection, job_ids)
    found = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.lease_token)
        .where(JobRow.id.in_(job_ids), JobRow.owner_id == owner_id, status_is(Status.QUEUED, Status.PROCESSING))
        .with_for_update()
    )
    ending = [_Ending(job.id, job.conversation_id, job.lease_token, {}) for job in found]
    _end(connection, ending, Status.CANCELLED, now)
    return [job.job_id for job in ending]


def answer_now(connection: Connection, owner_id: int, job_id: int) -> bool:
    """Notes that the thinking of this job is to end. False: the owner has no such job that is open."""
    changed = connection.execute(
        update(_jobs)
        .where(JobRow.id == job_id, JobRow.owner_id == owner_id, status_is(Status.QUEUED, Status.PROCESSING))
        .values(answers_now=True)
    )
    return changed.rowcount > 0


def change_priority(connection: Connection, owner_id: int, job_ids: Collection[int], priority: int) -> list[int]:
    """Moves the queued ones of these jobs, if they are the owner's, to this class. Returns the ids that changed."""
    changed = connection.execute(
        update(_jobs)
        .where(
            JobRow.id.in_(job_ids),
            JobRow.owner_id == owner_id,
            status_is(Status.QUEUED),
            JobRow.priority != priority,
        )
        .values(priority=priority)
        .returning(JobRow.id)
    )
    return list(changed.scalars())


def note_times(connection: Connection, times: Mapping[str, AttemptTimes]) -> None:
    """Keeps how far these attempts came, by lease token, so that it is known of one that dies."""
    connection.execute(_SET_TIMES, [_new_times(of_lease, known) for of_lease, known in times.items()])


def store_partial(
    connection: Connection,
    job_id: int,
    lease_token: str,
    _now: datetime,
    *,
    written: PartialReply,
    times: AttemptTimes = UNKNOWN_TIMES,
) -> bool:
    """Stores the partial reply of an attempt that a cancel ended, and how far it came. False: something else ended it,
    or a partial reply is stored already."""
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
        .values(**_partial_columns(written))
    )
    if kept.rowcount > 0:
        note_times(connection, {lease_token: times})
    return kept.rowcount > 0


def _partial_columns(written: PartialReply) -> dict[str, Any]:
    return {
        "partial": written.text or None,
        "partial_thinking": written.thinking or None,
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.completion_tokens,
    }


def expire_queued(connection: Connection, now: datetime, limit: int) -> list[int]:
    """Ends at most `limit` jobs that waited for their first start beyond their `not_after`. Returns their ids."""
    ids = connection.execute(select(JobRow.id).where(waits_too_long).limit(limit), {"until": now}).scalars().all()
    if not ids:
        return []
    _lock_conversations(connection, ids)
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
    times: AttemptTimes = UNKNOWN_TIMES,
) -> None:
    ended = {"at": now, "how": outcome.value, "of_kind": kind, "why": reason}
    connection.execute(_CLOSE_ATTEMPT, ended | _new_times(lease_token, times))


def _new_times(lease_token: str, times: AttemptTimes) -> dict[str, Any]:
    return {"of_lease": lease_token, **{f"new_{name}": moment for name, moment in times._asdict().items()}}
