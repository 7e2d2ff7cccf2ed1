"""The life of a job in the record: submit, claim, finish, fail, cancel; and what workers have to know of it.

The only writer of jobs, attempts and of the messages that belong to a job, until they go (`store/retention.py`). Each
transition is one guarded update: it names the state, and after a claim the lease, that it expects, and says by its
return value whether it was the one that moved the job. What it reads first to decide, it locks until it has written;
SQLite has one writer and needs no lock. Runs inside a transaction of `store/database.py`. Knows no queue and no engine.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

import msgspec
from sqlalchemy import (
    Connection,
    Table,
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

from llamalith_app.contracts.parameters import Parameters
from llamalith_app.store import job_reads
from llamalith_app.store.tables import (
    CONTEXT,
    PROMPT,
    REPLY,
    SYSTEM,
    TURN_PLACES,
    AttemptRow,
    ConversationRow,
    JobRow,
    MessageRow,
    Outcome,
    Priority,
    Status,
    status_is,
)

TIMEOUT = "timeout"
"""The kind of the error of a job that waited or ran too long."""


class Prompt(NamedTuple):
    """What a client asks for, trimmed and judged."""

    owner_id: int
    conversation_id: str | None
    """The public id; None: a new conversation."""
    content: str
    """Empty: only the system prompt is stored."""
    system_prompt: str
    context: str
    model: str
    grammar_name: str | None
    parameters: Parameters | None
    request_id: str
    priority: int
    max_attempts: int
    timeout_s: float | None = None
    queue_timeout_s: float | None = None
    retry_of: int | None = None
    """The job that this one tries again."""
    unenforced: tuple[str, ...] = ()
    """Pointers to what of its schema no reply can be held to while it is written."""
    keeps_system_prompt: bool = False
    """`system_prompt` is what the client was shown before: where one is in force, that one stays."""


class Accepted(NamedTuple):
    job_id: int | None
    conversation_id: str


class Claim(NamedTuple):
    """The right to run one attempt, good as long as its lease token is the job's."""

    job_id: int
    attempt: int
    lease_token: str
    conversation_id: int
    turn: int
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
        .order_by(_open.turn)
        .limit(1)
        .scalar_subquery()
    )


# Who was started once is not given up in the queue any more, whatever became of that attempt.
_waits_too_long = and_(status_is(Status.QUEUED), JobRow.not_after <= bindparam("until"), JobRow.attempt == 0)
_may_still_wait = or_(JobRow.not_after.is_(None), JobRow.not_after > bindparam("until"), JobRow.attempt > 0)

# The statements of every job's way are built once: building them costs SQLAlchemy ten times what running them does.
_conversations, _jobs, _messages, _attempts = (
    cast(Table, row.__table__) for row in (ConversationRow, JobRow, MessageRow, AttemptRow)
)
_TAKE_TURN = (
    update(_conversations)
    .where(
        ConversationRow.owner_id == bindparam("of_owner"),
        ConversationRow.public_id == bindparam("of_public_id"),
    )
    .values(next_turn=ConversationRow.next_turn + 1)
    .returning(ConversationRow.id, ConversationRow.next_turn)
)
_NEW_CONVERSATION = insert(_conversations).returning(ConversationRow.id)
_NEW_JOB = (
    insert(_jobs)
    .values(is_head=~exists().where(_open.conversation_id == bindparam("of_conversation"), _is_open))
    .returning(JobRow.id)
)
_NEW_MESSAGE = insert(_messages)
_SYSTEM_IN_FORCE = (
    select(MessageRow.content)
    .where(MessageRow.conversation_id == bindparam("of_conversation"), MessageRow.role == "system")
    .order_by(MessageRow.place.desc())
    .limit(1)
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
        JobRow.turn,
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
_FINISH = (
    update(_jobs)
    .where(JobRow.id == bindparam("of_job"), JobRow.lease_token == bindparam("of_lease"), status_is(Status.PROCESSING))
    .values(
        status=Status.DONE.value,
        lease_token=None,
        processed_at=bindparam("at"),
        finish_reason=bindparam("how"),
        prompt_tokens=bindparam("n_prompt"),
        prompt_tokens_reused=bindparam("n_reused"),
        completion_tokens=bindparam("n_completion"),
        omitted_messages=bindparam("n_omitted"),
        reply_valid=bindparam("fits"),
        reply_problem=bindparam("problem"),
    )
    .returning(JobRow.conversation_id, JobRow.turn)
)
_HELD = select(JobRow.id, JobRow.attempt, JobRow.lease_token, JobRow.beat, JobRow.worker_id).where(
    status_is(Status.PROCESSING)
)
_HELD_BY = _HELD.where(JobRow.worker_id == bindparam("by_worker"))
_GIVE_UP = (
    update(_jobs)
    .where(JobRow.id == bindparam("of_job"), status_is(Status.QUEUED))
    .values(
        status=Status.ERROR.value,
        processed_at=bindparam("at"),
        error_kind=TIMEOUT,
        error=bindparam("why"),
    )
)


def submit(connection: Connection, prompt: Prompt, now: datetime) -> Accepted:
    """Appends the turn to its conversation, which it makes if need be, and queues the job."""
    public_id = prompt.conversation_id or str(uuid.uuid4())
    taken = None
    if prompt.conversation_id is not None:
        taken = connection.execute(_TAKE_TURN, {"of_owner": prompt.owner_id, "of_public_id": public_id}).first()
    if taken is None:
        new = {"owner_id": prompt.owner_id, "public_id": public_id, "next_turn": 1, "created_at": now}
        conversation_id, turn = connection.execute(_NEW_CONVERSATION, new).scalar_one(), 0
    else:
        conversation_id, turn = taken.id, taken.next_turn - 1

    def say(part: int, role: str, content: str, job_id: int | None = None) -> None:
        message = {"conversation_id": conversation_id, "place": TURN_PLACES * turn + part, "role": role}
        connection.execute(_NEW_MESSAGE, {**message, "content": content, "job_id": job_id, "created_at": now})

    system_prompt = prompt.system_prompt
    if system_prompt:
        in_force = _system_in_force(connection, conversation_id, turn)
        if prompt.keeps_system_prompt and in_force is not None:
            system_prompt = ""
        elif system_prompt != in_force:
            say(SYSTEM, "system", system_prompt)
    if not prompt.content:
        return Accepted(None, public_id)
    job = {
        "conversation_id": conversation_id,
        "of_conversation": conversation_id,
        "owner_id": prompt.owner_id,
        "turn": turn,
        "model": prompt.model,
        "system_prompt": system_prompt,
        "grammar_name": prompt.grammar_name,
        "parameters": None if prompt.parameters is None else msgspec.json.encode(prompt.parameters).decode(),
        "unenforced": msgspec.json.encode(prompt.unenforced).decode() if prompt.unenforced else None,
        "priority": prompt.priority,
        "request_id": prompt.request_id,
        "max_attempts": prompt.max_attempts,
        "timeout_s": prompt.timeout_s,
        "not_after": None if prompt.queue_timeout_s is None else now + timedelta(seconds=prompt.queue_timeout_s),
        "status": Status.QUEUED.value,
        "attempt": 0,
        "beat": 0,
        "omitted_messages": 0,
        "not_before": now,
        "retry_of": prompt.retry_of,
        "created_at": now,
    }
    job_id: int = connection.execute(_NEW_JOB, job).scalar_one()
    if prompt.context:
        say(CONTEXT, "assistant", prompt.context)
    say(PROMPT, "user", prompt.content, job_id)
    return Accepted(job_id, public_id)


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
        connection.execute(
            job_reads.as_read(owner_id)
            .add_columns(JobRow.conversation_id.label("of_conversation"), JobRow.turn)
            .where(JobRow.id == job_id)
        )
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
    context = connection.execute(
        select(MessageRow.content).where(
            MessageRow.conversation_id == before["of_conversation"],
            MessageRow.place == TURN_PLACES * before["turn"] + CONTEXT,
        )
    ).scalar()
    prompt = Prompt(
        owner_id=owner_id,
        conversation_id=job.conversation_id,
        content=job.user_input,
        system_prompt=job.system_prompt,
        context=context or "",
        model=job.model,
        grammar_name=job.grammar_name,
        parameters=job.parameters,
        request_id=request_id,
        priority=Priority[job.priority.upper()],
        max_attempts=job.max_attempts,
        timeout_s=job.timeout_s,
        queue_timeout_s=job.queue_timeout_s,
        retry_of=job_id,
        unenforced=tuple(job.unenforced),
    )
    new_id = submit(connection, prompt, now).job_id
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


def _system_in_force(connection: Connection, conversation_id: int, turn: int) -> str | None:
    if turn == 0:
        return None
    return connection.execute(_SYSTEM_IN_FORCE, {"of_conversation": conversation_id}).scalar()


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
    conversations = _take_conversations(connection, [job_id])
    job = connection.execute(
        _FINISH,
        {
            "of_job": job_id,
            "of_lease": lease_token,
            "at": now,
            "how": finish_reason,
            "n_prompt": prompt_tokens,
            "n_reused": prompt_tokens_reused,
            "n_completion": completion_tokens,
            "n_omitted": omitted_messages,
            "fits": reply_valid,
            "problem": reply_problem,
        },
    ).first()
    if job is None:
        return False
    connection.execute(
        _NEW_MESSAGE,
        {
            "conversation_id": job.conversation_id,
            "place": TURN_PLACES * job.turn + REPLY,
            "role": "assistant",
            "content": reply,
            "job_id": job_id,
            "created_at": now,
        },
    )
    _close_attempt(connection, lease_token, Outcome.DONE, None, now)
    _promote_next_head(connection, conversations)
    return True


def _take_conversations(connection: Connection, job_ids: Collection[int]) -> list[int]:
    """The conversations of these jobs, locked where there are several writers: one that appends to a conversation and
    one that ends its head would each miss what the other does, and nobody would move up. To be called before either
    writes a job."""
    return list(connection.execute(_TAKE_CONVERSATIONS, {"of_jobs": list(job_ids)}).scalars())


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
    conversations = _take_conversations(connection, [job_id])
    holds = [JobRow.id == job_id, JobRow.lease_token == lease_token, status_is(Status.PROCESSING)]
    if seen_beat is not None:
        holds.append(JobRow.beat == seen_beat)
    max_attempts = connection.execute(select(JobRow.max_attempts).where(*holds).with_for_update()).scalar()
    if max_attempts is None:
        return None
    _close_attempt(connection, lease_token, outcome, reason, now, kind)
    spent = connection.execute(
        select(func.count())
        .select_from(AttemptRow)
        .where(
            AttemptRow.job_id == job_id,
            AttemptRow.outcome.in_([Outcome.FAILED.value, Outcome.LOST.value]),
        )
    ).scalar_one()
    if outcome is Outcome.RELEASED or (pause is not None and spent < max_attempts):
        connection.execute(
            update(JobRow)
            .where(*holds)
            .values(status=Status.QUEUED.value, lease_token=None, not_before=now + (pause or timedelta()))
        )
        return Status.QUEUED
    connection.execute(
        update(JobRow)
        .where(*holds)
        .values(
            status=Status.ERROR.value,
            lease_token=None,
            processed_at=now,
            error_kind=kind,
            error=reason,
            **({} if written is None else _as_columns(written)),
        )
    )
    _promote_next_head(connection, conversations)
    return Status.ERROR


def cancel(connection: Connection, owner_id: int, job_id: int, now: datetime) -> Status | None:
    """The state that won: `cancelled`, or the terminal state that came first. None: no such job of this owner."""
    conversations = _take_conversations(connection, [job_id])
    job = connection.execute(
        select(JobRow.status, JobRow.lease_token)
        .where(JobRow.id == job_id, JobRow.owner_id == owner_id)
        .with_for_update()
    ).first()
    if job is None:
        return None
    if job.status not in (Status.QUEUED, Status.PROCESSING):
        return Status(job.status)
    connection.execute(
        update(JobRow)
        .where(JobRow.id == job_id, status_is(Status.QUEUED, Status.PROCESSING))
        .values(status=Status.CANCELLED.value, lease_token=None, processed_at=now)
    )
    if job.lease_token is not None:
        _close_attempt(connection, job.lease_token, Outcome.CANCELLED, None, now)
    _promote_next_head(connection, conversations)
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
    conversations = _take_conversations(connection, wanted)
    found = connection.execute(
        select(JobRow.id, JobRow.lease_token)
        .where(JobRow.id.in_(wanted), status_is(Status.QUEUED, Status.PROCESSING))
        .with_for_update()
    ).all()
    ids = [job.id for job in found]
    connection.execute(
        update(JobRow)
        .where(JobRow.id.in_(ids), status_is(Status.QUEUED, Status.PROCESSING))
        .values(status=Status.CANCELLED.value, lease_token=None, processed_at=now)
    )
    for _, lease_token in found:
        if lease_token is not None:
            _close_attempt(connection, lease_token, Outcome.CANCELLED, None, now)
    _promote_next_head(connection, conversations)
    return ids


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


def give_up(connection: Connection, now: datetime, limit: int) -> list[int]:
    """Ends the jobs that waited longer for their first start than they may, `limit` of them at most. Their ids."""
    ids = connection.execute(select(JobRow.id).where(_waits_too_long).limit(limit), {"until": now}).scalars().all()
    conversations = _take_conversations(connection, ids) if ids else []
    late = connection.execute(
        select(JobRow.id, JobRow.created_at, JobRow.not_after)
        .where(JobRow.id.in_(ids), _waits_too_long)
        .with_for_update(),
        {"until": now},
    ).all()
    if late:
        connection.execute(
            _GIVE_UP,
            [
                {
                    "of_job": job.id,
                    "at": now,
                    "why": f"It waited {(now - job.created_at).total_seconds():.1f} s in the queue;"
                    f" queue_timeout_s allowed {job_reads.seconds_between(job.created_at, job.not_after):g}.",
                }
                for job in late
            ],
        )
        _promote_next_head(connection, conversations)
    return [job.id for job in late]


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
