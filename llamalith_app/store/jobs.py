"""The life of a job in the record: submit, claim, finish, fail, cancel, expire; and what workers have to know of it.

The only writer of jobs and attempts until they expire (`store/retention.py`). A transition first reads what it changes:
the job in the state, and after a claim under the lease, that it expects. It holds a lock on that row until it has
written; SQLite has one writer and needs no lock. Its return value says whether it was the one that moved the job.
Every job ends by `_end`. Runs inside a transaction of `store/database.py`. Knows no queue and no engine.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, cast

import msgspec
from sqlalchemy import (
    Connection,
    Table,
    Update,
    and_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.contracts.parameters import Parameters, given_in
from llamalith_app.store import job_reads, turns
from llamalith_app.store.tables import (
    AttemptRow,
    ConversationRow,
    JobRow,
    Outcome,
    Priority,
    Status,
    TurnRow,
    status_is,
)

TIMEOUT = "timeout"
"""The kind of the error of a job that waited or ran too long."""


class NewJob(NamedTuple):
    """What is asked for, validated and complete."""

    owner_id: int
    request_id: str
    request: JobRequest
    """Texts are trimmed, "" where there is none; limits and names are filled in."""
    inputs: Sequence[Message]
    """What its turn holds beside the system prompt: the prompt, and what stands before it. Empty: only the system
    prompt is stored, without a job."""
    conversation_id: str | None
    """The public id; None: a new conversation."""
    unenforced: Sequence[str] = ()
    """Pointers to what of its schema no reply can be held to while it is written."""
    retry_of: int | None = None
    """The job that this one tries again."""
    keeps_system_prompt: bool = False
    """The system prompt is what the client was shown before: where one is in force, that one stays."""


class Accepted(NamedTuple):
    job_id: int | None
    """None: only a system message was stored."""
    turn_id: int | None
    """None: nothing was stored, since that system message is in force already."""
    conversation_id: str
    """The public id."""
    model: str


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


class Waiting(NamedTuple):
    """A queued job that nothing holds back."""

    job_id: int
    model: str
    attempt: int
    """Claims so far."""


class ActiveLease(NamedTuple):
    """A job that somebody is working on, as a sweeper sees it."""

    job_id: int
    attempt: int
    lease_token: str
    beat: int
    worker_id: int


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
_open = aliased(JobRow)
_is_open = _open.status.in_([literal_column("'queued'"), literal_column("'processing'")])


def _first_open(conversation_id: Any) -> Any:
    """The id of the head of a conversation; null: nothing is open."""
    return (
        select(_open.id)
        .where(_open.conversation_id == conversation_id, _is_open)
        .order_by(_open.id)
        .limit(1)
        .scalar_subquery()
    )


# `queue_timeout_s` applies only before the first attempt.
_waits_too_long = and_(status_is(Status.QUEUED), JobRow.not_after <= bindparam("until"), JobRow.attempt == 0)
_may_still_wait = or_(JobRow.not_after.is_(None), JobRow.not_after > bindparam("until"), JobRow.attempt > 0)

# The statements of every job's way are built once: building them costs SQLAlchemy ten times what running them does.
_conversations, _jobs, _attempts = (cast(Table, row.__table__) for row in (ConversationRow, JobRow, AttemptRow))
_TAKE_CONVERSATION = (
    select(TurnRow.id, TurnRow.depth, TurnRow.system_turn_id, TurnRow.conversation_id)
    .join_from(ConversationRow, TurnRow, TurnRow.id == ConversationRow.head_turn_id)
    .where(
        ConversationRow.owner_id == bindparam("of_owner"),
        ConversationRow.public_id == bindparam("of_public_id"),
    )
    .with_for_update(of=ConversationRow)
)
_NEW_CONVERSATION = insert(_conversations).returning(ConversationRow.id)
_NEW_JOB = (
    insert(_jobs)
    .values(is_head=~exists().where(_open.conversation_id == bindparam("of_conversation"), _is_open))
    .returning(JobRow.id)
)
_SAME_NAME = tuple(sorted(set(JobRequest.__struct_fields__) & set(_jobs.columns.keys()) - {"priority", "parameters"}))
"""What a request says in a column of that name."""
_OWN_TURN = (
    select(TurnRow.id, TurnRow.conversation_id, TurnRow.parent_id, ConversationRow.public_id)
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .where(TurnRow.id == bindparam("of_turn"), ConversationRow.owner_id == bindparam("of_owner"))
    .with_for_update()
)
_BEST_DUE = (
    select(JobRow.id, JobRow.created_at)
    .where(
        status_is(Status.QUEUED),
        JobRow.model == bindparam("of_model"),
        JobRow.priority == bindparam("of_priority"),
        JobRow.is_head,
        # What is further ahead than any pause says that a clock went back.
        or_(JobRow.not_before <= bindparam("until"), JobRow.not_before > bindparam("beyond")),
        _may_still_wait,
    )
    .order_by(JobRow.id)
    .limit(bindparam("most"))
)
# Whoever claims at the same moment passes over what this one is about to claim.
_NEXT = _BEST_DUE.with_for_update(skip_locked=True)
_CLAIM = (
    update(_jobs)
    .where(JobRow.id == bindparam("of_job"), status_is(Status.QUEUED))
    .values(
        status=Status.PROCESSING.value,
        attempt=JobRow.attempt + 1,
        lease_token=bindparam("new_lease"),
        beat=0,
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
    update(_jobs).where(JobRow.id == _first_open(bindparam("of_conversation")), ~JobRow.is_head).values(is_head=True)
)
_NEW_ATTEMPT = insert(_attempts)
_CLOSE_ATTEMPT = (
    update(_attempts)
    .where(AttemptRow.lease_token == bindparam("of_lease"))
    .values(ended_at=bindparam("at"), outcome=bindparam("how"), kind=bindparam("of_kind"), reason=bindparam("why"))
)
_LEASED = (
    select(JobRow.conversation_id, JobRow.turn_id, JobRow.max_attempts, JobRow.beat)
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
_HELD = select(JobRow.id, JobRow.attempt, JobRow.lease_token, JobRow.beat, JobRow.worker_id).where(
    status_is(Status.PROCESSING)
)
_HELD_BY = _HELD.where(JobRow.worker_id == bindparam("by_worker"))


def submit(connection: Connection, new: NewJob, now: datetime) -> Accepted:
    """Appends a turn to the branch that people see of its conversation, and queues its job. Makes the conversation if
    need be."""
    public_id = new.conversation_id or str(uuid.uuid4())
    if new.conversation_id is not None:
        head = connection.execute(_TAKE_CONVERSATION, {"of_owner": new.owner_id, "of_public_id": public_id}).first()
        if head is not None:
            return _add(connection, new, public_id, head.conversation_id, turns.Parent._make(head), now)
    conversation_id = _new_conversation(connection, new.owner_id, public_id, now)
    return _add(connection, new, public_id, conversation_id, turns.NOTHING, now)


def submit_sibling(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | None:
    """Queues another job beside that turn, behind the same parent: an edited prompt, or another reply to it. The new
    turn is the head of the conversation from now on. None: no such turn of this owner."""
    beside = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if beside is None:
        return None
    parent = turns.parent(connection, beside.parent_id)
    return _add(connection, new, beside.public_id, beside.conversation_id, parent, now)


def submit_fork(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | Status | None:
    """Queues a job in a new conversation that goes on from that turn of another one.

    The job's status instead where that turn's own job has not ended, since its reply would belong to what is read.
    None: no such turn of this owner.
    """
    behind = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if behind is None:
        return None
    status = connection.execute(select(JobRow.status).where(JobRow.turn_id == turn_id)).scalar()
    if status in (Status.QUEUED, Status.PROCESSING):
        return Status(status)
    public_id = new.conversation_id or str(uuid.uuid4())
    conversation_id = _new_conversation(connection, new.owner_id, public_id, now)
    return _add(connection, new, public_id, conversation_id, turns.parent(connection, turn_id), now)


def _new_conversation(connection: Connection, owner_id: int, public_id: str, now: datetime) -> int:
    row = {"owner_id": owner_id, "public_id": public_id, "created_at": now}
    conversation_id: int = connection.execute(_NEW_CONVERSATION, row).scalar_one()
    return conversation_id


def _add(
    connection: Connection,
    new: NewJob,
    public_id: str,
    conversation_id: int,
    parent: turns.Parent,
    now: datetime,
) -> Accepted:
    request, model = new.request, cast(str, new.request.model)
    system_prompt = request.system_prompt or ""
    is_fork = parent.conversation_id not in (None, conversation_id)
    in_force = turns.system_in_force(connection, parent.system_turn_id) if system_prompt or is_fork else None
    if new.keeps_system_prompt and in_force is not None:
        system_prompt = ""
    inputs = []
    if not is_fork:
        if system_prompt and system_prompt != in_force:
            inputs.append(Message(role="system", content=system_prompt))
    else:
        # A fork gets its own copy: the other conversation may expire before this one.
        parent = parent._replace(system_turn_id=None)
        if copied := system_prompt or in_force:
            inputs.append(Message(role="system", content=copied))
    inputs.extend(new.inputs)
    if not inputs:
        return Accepted(None, None, public_id, model)
    turn_id = turns.append(connection, conversation_id, parent, inputs, now)
    if not new.inputs:
        return Accepted(None, turn_id, public_id, model)
    parameters = given_in(request)
    job = {
        **{name: getattr(request, name) for name in _SAME_NAME},
        "conversation_id": conversation_id,
        "of_conversation": conversation_id,
        "owner_id": new.owner_id,
        "turn_id": turn_id,
        "system_prompt": system_prompt,
        "parameters": None if parameters is None else msgspec.json.encode(parameters).decode(),
        "unenforced": msgspec.json.encode(new.unenforced).decode() if new.unenforced else None,
        "priority": Priority[(request.priority or "normal").upper()].value,
        "request_id": new.request_id,
        "not_after": None if request.queue_timeout_s is None else now + timedelta(seconds=request.queue_timeout_s),
        "status": Status.QUEUED.value,
        "attempt": 0,
        "beat": 0,
        "omitted_messages": 0,
        "not_before": now,
        "retry_of": new.retry_of,
        "created_at": now,
    }
    job_id: int = connection.execute(_NEW_JOB, job).scalar_one()
    return Accepted(job_id, turn_id, public_id, model)


def n_queued(connection: Connection, owner_id: int) -> int:
    """Jobs of an owner that wait."""
    return connection.execute(
        select(func.count()).where(JobRow.owner_id == owner_id, JobRow.status == Status.QUEUED.value)
    ).scalar_one()


RETRYABLE = (Status.ERROR, Status.CANCELLED)


class Retry(NamedTuple):
    job_id: int
    """The new job."""
    conversation_id: str
    model: str
    is_new: bool
    """False: it was tried again before, as this job."""


def retry(connection: Connection, owner_id: int, job_id: int, request_id: str, now: datetime) -> Retry | Status | None:
    """Asks anew for what a job that ended without a reply asked, as the last turn of its conversation; once for a job.

    Its status: it is open or done. None: no such job of this owner.
    """
    before = (
        connection.execute(job_reads.as_read(owner_id).add_columns(JobRow.turn_id).where(JobRow.id == job_id))
        .mappings()
        .first()
    )
    if before is None:
        return None
    job = job_reads.as_job(before)
    if job.status not in RETRYABLE:
        return Status(job.status)
    if job.retried_as is not None:
        return Retry(job.retried_as, job.conversation_id, job.model, False)
    parameters = {} if job.parameters is None else msgspec.structs.asdict(job.parameters)
    same = {name: getattr(job, name) for name in (*_SAME_NAME, "priority", "queue_timeout_s")}
    inputs = turns.inputs(connection, before["turn_id"])
    new = NewJob(
        owner_id=owner_id,
        request_id=request_id,
        request=JobRequest(**(parameters | same)),
        inputs=inputs[1:] if inputs[0].role == "system" else inputs,
        conversation_id=job.conversation_id,
        unenforced=job.unenforced,
        retry_of=job_id,
    )
    new_id = submit(connection, new, now).job_id
    return Retry(cast(int, new_id), job.conversation_id, job.model, True)


def retry_matching(
    connection: Connection,
    owner_id: int,
    request_id: str,
    now: datetime,
    *,
    statuses: Collection[Status],
    models: Collection[str],
    limit: int,
    conversation_id: str | None = None,
    error_kind: str | None = None,
) -> list[Retry]:
    """The same for the `limit` oldest that match and were not tried again yet; those of other models stay."""
    wanted = (
        select(JobRow.id)
        .where(JobRow.owner_id == owner_id, JobRow.model.in_(models), ~job_reads.was_tried_again)
        .order_by(JobRow.id)
        .limit(limit)
    )
    if error_kind is not None:
        wanted = wanted.where(JobRow.error_kind == error_kind)
    if conversation_id is not None:
        wanted = wanted.where(JobRow.conversation_id == job_reads.conversation_of(owner_id, conversation_id))
    # One by one: for several at once SQLite goes through all jobs of the owner.
    ids = [
        job_id
        for status in statuses
        for job_id in connection.execute(wanted.where(JobRow.status == status.value)).scalars()
    ]
    found = [retry(connection, owner_id, job_id, request_id, now) for job_id in sorted(ids)[:limit]]
    return [one for one in found if isinstance(one, Retry)]


def claim(connection: Connection, model: str, priority: int, worker_id: int, now: datetime) -> Claim | None:
    """The oldest due job of the model and class whose conversation has nothing earlier open; None: nothing to do."""
    job_id = connection.execute(_NEXT, {"of_model": model, "of_priority": priority, "most": 1, **_at(now)}).scalar()
    if job_id is None:
        return None
    lease_token = secrets.token_hex(16)
    row = connection.execute(
        _CLAIM, {"of_job": job_id, "new_lease": lease_token, "by_worker": worker_id, "at": now}
    ).first()
    if row is None:
        return None
    claimed = Claim._make(row)._replace(
        parameters=job_reads.parameters(row.parameters), unenforced=tuple(job_reads.unenforced(row.unenforced))
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
    seen_beat: int | None = None,
    written: Written | None = None,
) -> Status | None:
    """Ends an attempt without a reply: back to the queue after `pause`, or `error` when that is None or
    the job has spent its attempts. `released` spends none.

    `seen_beat`: a sweeper's guard, the beat that must not have moved. `written`: kept with an error.
    None: the lease is somebody else's.
    """
    _take_conversations(connection, [job_id])
    job = connection.execute(_LEASED, {"of_job": job_id, "of_lease": lease_token}).first()
    if job is None or (seen_beat is not None and job.beat != seen_beat):
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
        mine.append(JobRow.conversation_id == job_reads.conversation_of(owner_id, conversation_id))
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
    ids = connection.execute(select(JobRow.id).where(_waits_too_long).limit(limit), {"until": now}).scalars().all()
    if not ids:
        return []
    _take_conversations(connection, ids)
    late = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.created_at, JobRow.not_after)
        .where(JobRow.id.in_(ids), _waits_too_long)
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
                f" queue_timeout_s allowed {job_reads.seconds_between(job.created_at, job.not_after):g}.",
            },
        )
        for job in late
    ]
    _end(connection, ending, Status.ERROR, now)
    return [job.job_id for job in ending]


def newly_runnable(connection: Connection, ended: Collection[int], now: datetime) -> list[Waiting]:
    """Of the conversations of these jobs, which have ended, the jobs that may start now."""
    heads = select(_first_open(_ended.conversation_id)).where(_ended.id.in_(ended))
    rows = connection.execute(
        select(JobRow.id, JobRow.model, JobRow.attempt).where(
            JobRow.id.in_(heads),
            status_is(Status.QUEUED),
            or_(JobRow.not_before <= now, JobRow.not_before > now + LONGEST_PAUSE),
        )
    )
    return [Waiting._make(row) for row in rows]


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


def beat(connection: Connection, lease_tokens: list[str]) -> None:
    """Says that these attempts are alive; nothing happens for those whose lease holds no more."""
    connection.execute(
        update(JobRow)
        .where(JobRow.lease_token.in_(lease_tokens), status_is(Status.PROCESSING))
        .values(beat=JobRow.beat + 1)
    )


def held(connection: Connection, worker_id: int | None = None) -> list[ActiveLease]:
    """Every lease that is out, or those of one worker."""
    rows = connection.execute(_HELD) if worker_id is None else connection.execute(_HELD_BY, {"by_worker": worker_id})
    return [ActiveLease._make(row) for row in rows]


LONGEST_PAUSE = timedelta(minutes=2)
"""Longer than any between two attempts."""
MOST_DUE = 64
"""Jobs of a model and class that `due` looks at; more would not find a place at once."""


def _at(now: datetime) -> dict[str, datetime]:
    return {"until": now, "beyond": now + LONGEST_PAUSE}


def due(connection: Connection, models: Iterable[str], now: datetime) -> list[Due]:
    """For each of the models and each class what could be claimed now."""
    found = []
    for model in models:
        for priority in Priority:
            of = {"of_model": model, "of_priority": priority.value, "most": MOST_DUE, **_at(now)}
            if rows := connection.execute(_BEST_DUE, of).all():
                found.append(Due(model, priority, len(rows), rows[0].created_at))
    return found


def n_queued_by_model(connection: Connection) -> dict[str, int]:
    return {
        row.model: row.n
        for row in connection.execute(
            select(JobRow.model, func.count().label("n")).where(status_is(Status.QUEUED)).group_by(JobRow.model)
        )
    }


def load(connection: Connection, models: Iterable[str], now: datetime) -> QueueDepth:
    running = connection.execute(select(JobRow.model, JobRow.started_at).where(status_is(Status.PROCESSING)))
    return QueueDepth(
        n_queued_by_model(connection),
        [(model, started_at) for model, started_at in running if started_at is not None],
        due(connection, models, now),
    )
