"""Stores new jobs: after the head of a conversation or another of its turns, beside a turn, several beside each other,
or as a retry; and forks.

The only module that makes jobs. Runs inside a transaction of `store/database.py`. Knows no queue and no engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

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
from llamalith_app.contracts.jobs import Job, JobRequest
from llamalith_app.contracts.parameters import parameters_given
from llamalith_app.errors import BadInput, ConversationExists, JobOpen, NotFound
from llamalith_app.store import tree, turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.jobs.statements import is_open, open_job
from llamalith_app.store.tables import (
    ConversationRow,
    JobRow,
    Priority,
    Source,
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
    source: Source | None = None
    """The door, which is stored with a conversation that it makes."""
    seen: int | None = None
    """A turn that the client was shown: without a parent, the job continues the branch through it. None: the head's."""


class Accepted(NamedTuple):
    job_id: int | None
    """None: only a system message was stored."""
    turn_id: int | None
    """None: nothing was stored, since this system message is in force already."""
    conversation_id: str
    """The public id."""
    model: str


_is_asked_for = reads.has_public_id(bindparam("of_owner"), bindparam("of_public_id"))
_LOCK_CONVERSATION = select(ConversationRow.id, ConversationRow.head_turn_id).where(_is_asked_for).with_for_update()
_HEAD = (
    select(
        ConversationRow.id.label("of_conversation"),
        TurnRow.id,
        TurnRow.depth,
        TurnRow.system_turn_id,
        TurnRow.conversation_id,
    )
    .join(TurnRow, TurnRow.id == ConversationRow.head_turn_id)
    .where(_is_asked_for)
)
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
    select(
        TurnRow.id,
        TurnRow.conversation_id,
        TurnRow.parent_id,
        TurnRow.system_turn_id,
        ConversationRow.public_id,
        ConversationRow.deleted_at,
    )
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .where(TurnRow.id == bindparam("of_turn"), ConversationRow.owner_id == bindparam("of_owner"))
    .with_for_update(of=ConversationRow)
)


_CONTINUED = (
    select(
        ConversationRow.id,
        ConversationRow.public_id,
        exists().where(open_job.conversation_id == ConversationRow.id, is_open).label("is_busy"),
    )
    .join(TurnRow, TurnRow.conversation_id == ConversationRow.id)
    .where(
        ConversationRow.id == bindparam("of_conversation"),
        ConversationRow.deleted_at.is_(None),
        TurnRow.id == bindparam("of_turn"),
        TurnRow.digest.is_not(None),
    )
    .with_for_update(of=ConversationRow)
)


def submit(connection: Connection, new: NewJob, now: datetime) -> Accepted:
    """Adds a turn after the parent that is asked for, or after the head of its conversation, and queues its job. The
    turn becomes the head. Makes the conversation if it does not exist or is deleted. Raises BadInput: it has no such
    parent."""
    public_id = new.conversation_id or str(uuid.uuid4())
    if new.conversation_id is not None:
        of = {"of_owner": new.owner_id, "of_public_id": public_id}
        if connection.dialect.name != "sqlite":
            # By itself: PostgreSQL, after it has waited, would look for the head that there was before.
            connection.execute(_LOCK_CONVERSATION, of)
        found = connection.execute(_HEAD, of).first()
        if found is not None:
            parent = _parent(connection, new, found)
            return _add(connection, new, public_id, found.of_conversation, parent, now)
    if new.request.parent:
        raise BadInput(f"parent: this conversation is new and has no turn {new.request.parent}; leave parent out")
    conversation_id = _new_conversation(connection, new.owner_id, public_id, new.source, now)
    return _add(connection, new, public_id, conversation_id, turns.NO_PARENT, now)


def _parent(connection: Connection, new: NewJob, found: Any) -> turns.Parent:
    """The turn that the new one continues. `found`: a row of _HEAD. Raises BadInput."""
    wanted, of_conversation = new.request.parent, found.of_conversation
    if wanted is None and new.seen is None:
        return turns.Parent(*found[1:])
    conversation = tree.Conversation(of_conversation, found.id)
    if wanted is not None:
        parent = tree.possible_parent(connection, conversation, wanted)
        if parent is None:
            raise BadInput(
                f"parent: neither this conversation nor the path to its head has a turn {wanted};"
                " GET /api/conversations/{id}/tree lists its turns"
            )
        return parent
    # What was seen may be deleted by now.
    seen = None if new.seen is None else tree.branch_through(connection, conversation, new.seen)
    return turns.parent(connection, seen or conversation.head_turn_id)


def submit_sibling(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | None:
    """Queues a job with the same parent as that turn: an edited prompt, or another reply to the same one. The new turn
    becomes the head of the conversation. Without a system prompt of its own, that of the turn beside stays in force; a
    history that was sent with that turn stays before another prompt.

    `new.conversation_id`: the conversation that shows the turn, where it is a fork that continues it. None: its own.
    Returns None: no such turn of this owner, or that conversation does not show it.
    """
    beside = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if beside is None:
        return None
    public_id, conversation_id = beside.public_id, beside.conversation_id
    if beside.deleted_at is not None and new.conversation_id is None:
        return None
    # A fork still holds turns of a conversation that is deleted.
    if new.conversation_id is not None and (new.conversation_id != public_id or beside.deleted_at is not None):
        public_id = new.conversation_id
        found = connection.execute(_LOCK_CONVERSATION, {"of_owner": new.owner_id, "of_public_id": public_id}).first()
        if found is None or tree.possible_parent(connection, tree.Conversation._make(found), turn_id) is None:
            return None
        conversation_id = found.id
    if new.keeps_system_prompt or not new.request.system_prompt:
        in_force = turns.system_in_force(connection, beside.system_turn_id)
        request = msgspec.structs.replace(new.request, system_prompt=in_force or "")
        new = new._replace(request=request, keeps_system_prompt=False)
    if (before := _history_before_prompt(connection, turn_id)) and len(new.inputs) <= 2:
        new = new._replace(inputs=[*before, *new.inputs[-1:]])
    parent = turns.parent(connection, beside.parent_id)
    return _add(connection, new, public_id, conversation_id, parent, now)


def _history_before_prompt(connection: Connection, turn_id: int) -> list[Message]:
    """What stands before the prompt of a turn that was sent with a history. Empty: it was sent with a context message
    at most."""
    inputs = prompt_of(connection, turn_id)
    prompt = max((at for at, message in enumerate(inputs) if message.role == "user"), default=0)
    before = [*inputs[:prompt], *inputs[prompt + 1 :]]
    return [] if [message.role for message in before] == ["assistant"] else before


def submit_history(connection: Connection, new: NewJob, after: turns.StoredPrefix | None, now: datetime) -> Accepted:
    """Queues the reply to a whole history: the system prompt of the request, then `new.inputs`. `after`: a stored path
    that equals its beginning; the new turn continues that, and only what is new is stored. None: it begins a
    conversation.

    Where a job of that conversation has not ended, it begins a conversation, too, which shares the path: calls beside
    each other run beside each other.
    """
    found = None if after is None else _continued(connection, after)
    if after is None or found is None:
        return submit(connection, new, now)
    n_known = after.n_messages - bool(new.request.system_prompt)
    new = new._replace(inputs=new.inputs[n_known:])
    public_id, conversation_id = found.public_id, found.id
    if found.is_busy:
        public_id = str(uuid.uuid4())
        conversation_id = _new_conversation(connection, new.owner_id, public_id, new.source, now)
    return _add(connection, new, public_id, conversation_id, turns.parent(connection, after.turn_id), now)


def submit_behind(connection: Connection, new: NewJob, turn_id: int, now: datetime) -> Accepted | None:
    """Queues the reply to `new.inputs` behind this turn, whatever came of its job so far. The system prompt of the
    request is the only one in force; empty: none is. Returns None: no such turn of this owner."""
    found = connection.execute(_OWN_TURN, {"of_owner": new.owner_id, "of_turn": turn_id}).first()
    if found is None or found.deleted_at is not None:
        return None
    parent = turns.parent(connection, turn_id)
    if (turns.system_in_force(connection, parent.system_turn_id) or "") != new.request.system_prompt:
        parent = parent._replace(system_turn_id=None)
    return _add(connection, new, found.public_id, found.conversation_id, parent, now)


def _continued(connection: Connection, after: turns.StoredPrefix) -> Any:
    """The conversation of that path. None: the path is gone since it was found."""
    return connection.execute(_CONTINUED, {"of_conversation": after.conversation_id, "of_turn": after.turn_id}).first()


def submit_compared(
    connection: Connection, several: Sequence[NewJob], beside: int | None, now: datetime
) -> list[Accepted] | None:
    """Queues jobs that differ in their models alone, in this order and on sibling turns; the first of these becomes the
    head. `beside`: a turn whose siblings they become, as `submit_sibling` says; None: they continue what `submit` says.

    Returns None where `submit_sibling` does. Raises what `submit` raises.
    """
    first, *others = several
    accepted = submit(connection, first, now) if beside is None else submit_sibling(connection, first, beside, now)
    if accepted is None:
        return None
    turn_id, all_accepted = cast(int, accepted.turn_id), [accepted]
    for other in others:
        sibling = submit_sibling(connection, other._replace(conversation_id=None), turn_id, now)
        all_accepted.append(cast(Accepted, sibling))
    if others:
        conversation_id = cast(int, turns.parent(connection, turn_id).conversation_id)
        turns.set_head(connection, conversation_id, turn_id)
    return all_accepted


class Fork(NamedTuple):
    conversation_id: str
    """The public id."""
    head_turn_id: int


def fork(
    connection: Connection, owner_id: int, of_conversation: str, turn_id: int, public_id: str | None, now: datetime
) -> Fork:
    """Makes a conversation that continues this turn of another one, or of the path to its head.

    It begins with a turn that holds a copy of the system message in force, if there is one, and nothing else: the next
    prompt continues that. `public_id` None: a UUID.
    Raises NotFound, ConversationExists; JobOpen where a job on that path has not ended, since its reply would come to
    stand in what the fork has read.
    """
    origin = tree.lock_conversation(connection, owner_id, of_conversation)
    parent = None if turn_id == tree.ROOT else tree.possible_parent(connection, origin, turn_id)
    if parent is None:
        raise NotFound(tree.NO_TURN)
    if (status := turns.open_job_on_path(connection, turn_id)) is not None:
        raise JobOpen(f"A job up to turn {turn_id} is {status.value}: cancel it first, or wait until it has ended.")
    public_id = public_id or str(uuid.uuid4())
    if connection.execute(_LOCK_CONVERSATION, {"of_owner": owner_id, "of_public_id": public_id}).first() is not None:
        raise ConversationExists("conversation_id: there is a conversation with this id; a fork needs a new one")
    conversation_id = _new_conversation(connection, owner_id, public_id, _source(connection, origin.id), now)
    in_force = turns.system_in_force(connection, parent.system_turn_id)
    # A copy of its own: the other conversation may expire before this one.
    inputs = [] if in_force is None else [Message(role="system", content=in_force)]
    behind = parent._replace(system_turn_id=None)
    return Fork(public_id, turns.append(connection, conversation_id, behind, inputs, now))


def _source(connection: Connection, conversation_id: int) -> str | None:
    """The door of that conversation, which is also that of its forks."""
    source: str | None = connection.execute(
        select(ConversationRow.source).where(ConversationRow.id == conversation_id)
    ).scalar()
    return source


def _new_conversation(connection: Connection, owner_id: int, public_id: str, source: str | None, now: datetime) -> int:
    row = {"owner_id": owner_id, "public_id": public_id, "source": source, "created_at": now}
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
    turn_id: int
    is_new: bool
    """False: that job existed before this call."""


def retry(connection: Connection, owner_id: int, job_id: int, request_id: str, now: datetime) -> Retry | Status | None:
    """Queues a copy of a job that ended without a reply, as the last turn of its conversation. A job is retried once: a
    second call returns the same copy.

    Returns the job's status instead where it is open or done. None: no such job of this owner.
    """
    job = reads.job_by_id(connection, owner_id, job_id)
    if job is None:
        return None
    if job.status not in RETRYABLE:
        return Status(job.status)
    if job.retried_as is not None:
        turn_id = connection.execute(select(JobRow.turn_id).where(JobRow.id == job.retried_as)).scalar_one()
        return Retry(job.retried_as, job.conversation_id, job.model, turn_id, False)
    new = NewJob(
        owner_id=owner_id,
        request_id=request_id,
        request=request_of(job),
        inputs=prompt_of(connection, job.turn_id),
        conversation_id=job.conversation_id,
        unenforced=job.unenforced,
        retry_of=job_id,
    )
    made = submit(connection, new, now)
    return Retry(cast(int, made.job_id), job.conversation_id, job.model, cast(int, made.turn_id), True)


def request_of(job: Job) -> JobRequest:
    """The request that would make this job again; without its prompt, which stands in its turn."""
    parameters = {} if job.parameters is None else msgspec.structs.asdict(job.parameters)
    same = {name: getattr(job, name) for name in (*_COPIED_FIELDS, "priority", "queue_timeout_s")}
    return JobRequest(**(parameters | same))


def prompt_of(connection: Connection, turn_id: int) -> list[Message]:
    """What the client sent in this turn, without the system message that begins it."""
    inputs = turns.inputs(connection, turn_id)
    return inputs[1:] if inputs and inputs[0].role == "system" else inputs


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
        .join(ConversationRow, ConversationRow.id == JobRow.conversation_id)
        .where(JobRow.owner_id == owner_id, JobRow.model.in_(models), ~reads.was_retried, reads.is_shown)
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
