"""Stores new jobs: after the head of a conversation, beside a turn, as a fork, or as a retry.

The only module that makes jobs. Runs inside a transaction of `store/database.py`. Knows no queue and no engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, cast

import msgspec
from sqlalchemy import (
    Connection,
    Table,
    bindparam,
    exists,
    insert,
    select,
)

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.contracts.parameters import parameters_given
from llamalith_app.store import turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.jobs.statements import is_open, open_job
from llamalith_app.store.tables import (
    ConversationRow,
    JobRow,
    Priority,
    Status,
    TurnRow,
)

_conversations = cast(Table, ConversationRow.__table__)
_jobs = cast(Table, JobRow.__table__)


class NewJob(NamedTuple):
    """A validated and completed request for a job."""

    owner_id: int
    request_id: str
    request: JobRequest
    """With trimmed texts ("" for none), and with the configured values where the client sent none."""
    inputs: Sequence[Message]
    """The messages of its turn without the system prompt: the context message, if any, and the prompt. Empty: only the
    system prompt is stored, without a job."""
    conversation_id: str | None
    """The public id; None: a new conversation."""
    unenforced: Sequence[str] = ()
    """JSON pointers to the keywords of its schema that cannot be enforced while decoding."""
    retry_of: int | None = None
    """The job that this one retries."""
    keeps_system_prompt: bool = False
    """The client sends the system prompt back as it was shown: it does not replace one that is in force."""


class Accepted(NamedTuple):
    job_id: int | None
    """None: only a system message was stored."""
    turn_id: int | None
    """None: nothing was stored, since this system message is in force already."""
    conversation_id: str
    """The public id."""
    model: str


_LOCK_HEAD = (
    select(ConversationRow.id, ConversationRow.head_turn_id)
    .where(
        ConversationRow.owner_id == bindparam("of_owner"),
        ConversationRow.public_id == bindparam("of_public_id"),
    )
    .with_for_update()
)
"""The conversation alone: PostgreSQL, after it has waited, would look for the head that there was before."""
_INSERT_CONVERSATION = insert(_conversations).returning(ConversationRow.id)
_INSERT_JOB = (
    insert(_jobs)
    .values(is_first_in_lane=~exists().where(open_job.conversation_id == bindparam("of_conversation"), is_open))
    .returning(JobRow.id)
)
_COPIED_FIELDS = tuple(
    sorted(set(JobRequest.__struct_fields__) & set(_jobs.columns.keys()) - {"priority", "parameters"})
)
"""The fields of a request that are stored in columns of the same name."""
_OWN_TURN = (
    select(TurnRow.id, TurnRow.conversation_id, TurnRow.parent_id, TurnRow.system_turn_id, ConversationRow.public_id)
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .where(TurnRow.id == bindparam("of_turn"), ConversationRow.owner_id == bindparam("of_owner"))
    .with_for_update(of=ConversationRow)
)


def submit(connection: Connection, new: NewJob, now: datetime) -> Accepted:
    """Appends a turn after the head of its conversation, and queues its job. Makes the conversation if it does not
    exist."""
    public_id = new.conversation_id or str(uuid.uuid4())
    if new.conversation_id is not None:
        found = connection.execute(_LOCK_HEAD, {"of_owner": new.owner_id, "of_public_id": public_id}).first()
        if found is not None:
            return _add(connection, new, public_id, found.id, turns.parent(connection, found.head_turn_id), now)
    conversation_id = _new_conversation(connection, new.owner_id, public_id, now)
    return _add(connection, new, public_id, conversation_id, turns.NO_PARENT, now)


def submit_sibling(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | None:
    """Queues a job with the same parent as that turn: an edited prompt, or another reply to the same one. The new turn
    becomes the head of the conversation. Without a system prompt of its own, that of the turn beside stays in force.
    None: no such turn of this owner."""
    beside = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if beside is None:
        return None
    if not new.request.system_prompt:
        in_force = turns.system_in_force(connection, beside.system_turn_id)
        new = new._replace(request=msgspec.structs.replace(new.request, system_prompt=in_force or ""))
    parent = turns.parent(connection, beside.parent_id)
    return _add(connection, new, beside.public_id, beside.conversation_id, parent, now)


def submit_fork(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | Status | None:
    """Queues a job in a new conversation that continues that turn of another conversation.

    Returns the status of the first job on that path instead where one has not ended, since its reply would come to
    stand in what the fork has read.
    None: no such turn of this owner.
    """
    behind = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if behind is None:
        return None
    if (status := turns.open_job_on_path(connection, turn_id)) is not None:
        return status
    public_id = new.conversation_id or str(uuid.uuid4())
    conversation_id = _new_conversation(connection, new.owner_id, public_id, now)
    return _add(connection, new, public_id, conversation_id, turns.parent(connection, turn_id), now)


def _new_conversation(connection: Connection, owner_id: int, public_id: str, now: datetime) -> int:
    row = {"owner_id": owner_id, "public_id": public_id, "created_at": now}
    conversation_id: int = connection.execute(_INSERT_CONVERSATION, row).scalar_one()
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
    parameters = parameters_given(request)
    job = {
        **{name: getattr(request, name) for name in _COPIED_FIELDS},
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
        "heartbeat": 0,
        "omitted_messages": 0,
        "not_before": now,
        "retry_of": new.retry_of,
        "created_at": now,
    }
    job_id: int = connection.execute(_INSERT_JOB, job).scalar_one()
    return Accepted(job_id, turn_id, public_id, model)


RETRYABLE = (Status.ERROR, Status.CANCELLED)


class Retry(NamedTuple):
    job_id: int
    """The job that retries it."""
    conversation_id: str
    model: str
    is_new: bool
    """False: that job existed before this call."""


def retry(connection: Connection, owner_id: int, job_id: int, request_id: str, now: datetime) -> Retry | Status | None:
    """Queues a copy of a job that ended without a reply, as the last turn of its conversation. A job is retried once: a
    second call returns the same copy.

    Returns the job's status instead where it is open or done. None: no such job of this owner.
    """
    before = (
        connection.execute(reads.select_jobs(owner_id).add_columns(JobRow.turn_id).where(JobRow.id == job_id))
        .mappings()
        .first()
    )
    if before is None:
        return None
    job = reads.job_from_row(before)
    if job.status not in RETRYABLE:
        return Status(job.status)
    if job.retried_as is not None:
        return Retry(job.retried_as, job.conversation_id, job.model, False)
    parameters = {} if job.parameters is None else msgspec.structs.asdict(job.parameters)
    same = {name: getattr(job, name) for name in (*_COPIED_FIELDS, "priority", "queue_timeout_s")}
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
    """Retries the `limit` oldest jobs that match, are of these models and were not retried yet."""
    wanted = (
        select(JobRow.id)
        .where(JobRow.owner_id == owner_id, JobRow.model.in_(models), ~reads.was_retried)
        .order_by(JobRow.id)
        .limit(limit)
    )
    if error_kind is not None:
        wanted = wanted.where(JobRow.error_kind == error_kind)
    if conversation_id is not None:
        wanted = wanted.where(JobRow.conversation_id == reads.conversation_id_of(owner_id, conversation_id))
    # One status at a time: with several, SQLite would scan all jobs of the owner.
    ids = [
        job_id
        for status in statuses
        for job_id in connection.execute(wanted.where(JobRow.status == status.value)).scalars()
    ]
    found = [retry(connection, owner_id, job_id, request_id, now) for job_id in sorted(ids)[:limit]]
    return [result for result in found if isinstance(result, Retry)]
