"""What is read of a conversation: its messages, its newest state, and the turn that a job sees.

Reads only; conversations and messages are written by the transitions in `store/jobs.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, bindparam, func, literal_column, or_, select
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Latest, Message, MessageList
from llamalith_app.contracts.jobs import Job
from llamalith_app.store import job_reads
from llamalith_app.store.tables import (
    CONTEXT,
    PROMPT,
    REPLY,
    SYSTEM,
    TURN_PLACES,
    ConversationRow,
    JobRow,
    MessageRow,
    Status,
)


class Turn(NamedTuple):
    """What one job is to answer: nothing queued later, nothing of turns that got no reply."""

    messages: list[Message]
    n_too_old: int
    """Messages left out already here, because no context could hold as much text as comes after them."""


class Summary(NamedTuple):
    """A conversation in a list."""

    public_id: str
    first_prompt: str | None
    """Its beginning; None: no prompt yet."""
    n_turns: int
    status: str | None
    """Of the job that runs or waits next; where none is open, of its newest."""
    last_at: datetime


class ThreadTurn(NamedTuple):
    """One turn as people read it; the prompt and the reply are the job's."""

    turn: int
    system: str | None
    context: str | None
    job: Job | None
    """None: there was only a system prompt, or the job has expired."""


class Thread(NamedTuple):
    """Some turns of a conversation, oldest first."""

    turns: list[ThreadTurn]
    n_earlier: int
    """Turns before these of which something is left."""
    earlier_until: int
    """The turn after the last of those; 0: there are none."""
    until: int
    """The turn after these."""
    system_prompt: str
    """In force for the next turn; empty: none."""
    first_prompt: str | None
    """Its beginning; None: no prompt yet."""


class Lane(NamedTuple):
    """The jobs of a conversation that a stream of its events goes through, one after another."""

    conversation_id: int
    job_ids: list[int]
    """In order."""
    newest_job: int
    """0: it has none."""


RECENT_JOBS = 2000
"""Among which a page of the newest conversations is looked for first."""


def newest(connection: Connection, owner_id: int, *, limit: int, offset: int, max_text: int) -> list[Summary]:
    """Those with the newest jobs first."""
    newest_jobs = (
        select(JobRow.id, JobRow.conversation_id)
        .where(JobRow.owner_id == owner_id)
        .order_by(JobRow.id.desc())
        .limit(RECENT_JOBS)
    ).subquery("newest_jobs")
    recent = select(
        newest_jobs.c.conversation_id.label("id"), func.max(newest_jobs.c.id).label("last_job_id")
    ).group_by(newest_jobs.c.conversation_id)
    its_last_job = (
        select(func.max(JobRow.id)).where(JobRow.conversation_id == ConversationRow.id).correlate(ConversationRow)
    ).scalar_subquery()
    every = select(ConversationRow.id, its_last_job.label("last_job_id")).where(ConversationRow.owner_id == owner_id)
    # Half a second for a million conversations, one of them for each job where callers name none.
    rows: list[Summary] = []
    for those in (recent, every):
        if len(rows) < limit:
            newest_first = those.order_by(
                literal_column("last_job_id").desc().nulls_last(), literal_column("id").desc()
            )
            rows = _summaries(connection, newest_first.limit(limit).offset(offset), max_text)
    return rows


def _summaries(connection: Connection, which: Select[Any], max_text: int) -> list[Summary]:
    """`which`: ids of conversations, each with its `last_job_id`."""
    page = which.subquery("page")
    open_job = aliased(JobRow)
    status_of_first_open = (
        select(open_job.status)
        .where(
            open_job.conversation_id == ConversationRow.id,
            open_job.status.in_([literal_column("'queued'"), literal_column("'processing'")]),
        )
        .order_by(open_job.turn)
        .limit(1)
    ).scalar_subquery()
    rows = connection.execute(
        select(
            ConversationRow.public_id,
            _first_prompt(ConversationRow.id, max_text).scalar_subquery(),
            ConversationRow.next_turn,
            func.coalesce(status_of_first_open, JobRow.status),
            func.coalesce(JobRow.processed_at, JobRow.created_at, ConversationRow.created_at),
        )
        .join(page, page.c.id == ConversationRow.id)
        .outerjoin(JobRow, JobRow.id == page.c.last_job_id)
        .order_by(page.c.last_job_id.desc().nulls_last(), ConversationRow.id.desc())
    )
    return [Summary._make(row) for row in rows]


def thread(
    connection: Connection,
    owner_id: int,
    public_id: str,
    *,
    limit: int,
    max_text: int,
    first: int | None = None,
    before: int | None = None,
) -> Thread | None:
    """`limit` turns at most: the newest, or the first ones from `first` on, or the last ones before `before`. None: no
    such conversation."""
    conversation = connection.execute(
        select(ConversationRow.id, ConversationRow.next_turn).where(job_reads.is_named(owner_id, public_id))
    ).first()
    if conversation is None:
        return None
    last = min(conversation.next_turn if before is None else before, conversation.next_turn) - 1
    goes_on = first is not None
    if first is None:
        first = max(last - limit + 1, 0)
    else:
        first = min(first, last + 1)
        last = min(last, first + limit - 1)
    found = job_reads.of_turns(connection, owner_id, conversation.id, first, last, oldest_first=goes_on)
    if sum(map(job_reads.n_text_chars, found.values())) >= job_reads.MAX_PAGE_CHARS:
        # Very long texts ended the page early: it is whole from its oldest job on, or up to its newest.
        first, last = (first, max(found)) if goes_on else (min(found), last)
    rows = connection.execute(
        select(MessageRow.place, MessageRow.content).where(
            MessageRow.conversation_id == conversation.id,
            MessageRow.place.between(TURN_PLACES * first, TURN_PLACES * last + REPLY),
            MessageRow.job_id.is_(None),
        )
    )
    beside = {row.place: row.content for row in rows}
    in_force = connection.execute(
        select(MessageRow.content)
        .where(MessageRow.conversation_id == conversation.id, MessageRow.role == "system")
        .order_by(MessageRow.place.desc())
        .limit(1)
    ).scalar()
    # Of others nothing is left: they have expired.
    left = {*found, *(place // TURN_PLACES for place in beside)}
    turns = [
        ThreadTurn(
            turn,
            beside.get(TURN_PLACES * turn + SYSTEM),
            beside.get(TURN_PLACES * turn + CONTEXT),
            found.get(turn),
        )
        for turn in sorted(left)
    ]
    earlier = connection.execute(
        select(func.count((MessageRow.place // TURN_PLACES).distinct()), func.max(MessageRow.place)).where(
            MessageRow.conversation_id == conversation.id, MessageRow.place < TURN_PLACES * first
        )
    ).one()
    n_earlier: int = earlier[0]
    earlier_until: int = earlier[1] // TURN_PLACES + 1 if n_earlier else 0
    first_prompt: str | None = connection.execute(_first_prompt(conversation.id, max_text)).scalar()
    return Thread(turns, n_earlier, earlier_until, last + 1, in_force or "", first_prompt)


def _first_prompt(conversation_id: Any, max_text: int) -> Select[str]:
    return (
        select(func.substr(MessageRow.content, 1, max_text))
        .where(MessageRow.conversation_id == conversation_id, MessageRow.role == "user")
        .order_by(MessageRow.place)
        .limit(1)
    )


def exists(connection: Connection, owner_id: int, public_id: str) -> bool:
    return _id(connection, owner_id, public_id) is not None


def _id(connection: Connection, owner_id: int, public_id: str) -> int | None:
    found: int | None = connection.execute(
        select(ConversationRow.id).where(job_reads.is_named(owner_id, public_id))
    ).scalar()
    return found


def message_list(connection: Connection, owner_id: int, public_id: str) -> MessageList:
    found = messages(connection, owner_id, public_id)
    return MessageList(
        conversation_id=public_id.strip(),
        exists=bool(found) or exists(connection, owner_id, public_id),
        messages=found,
    )


def messages(connection: Connection, owner_id: int, public_id: str) -> list[Message]:
    """In the order of the turns; empty for an unknown conversation."""
    rows = connection.execute(
        select(MessageRow.role, MessageRow.content)
        .where(MessageRow.conversation_id == job_reads.conversation_of(owner_id, public_id))
        .order_by(MessageRow.place)
    )
    return [Message(role=role, content=content) for role, content in rows]


def latest(connection: Connection, owner_id: int, public_id: str) -> Latest:
    conversation_id = _id(connection, owner_id, public_id)
    if conversation_id is None:
        return Latest(
            conversation_id=public_id.strip(), exists=False, last_user=None, last_assistant=None, last_job=None
        )
    job_id = connection.execute(select(func.max(JobRow.id)).where(JobRow.conversation_id == conversation_id)).scalar()
    return Latest(
        conversation_id=public_id.strip(),
        exists=True,
        last_user=_newest(connection, conversation_id, "user"),
        last_assistant=_newest(connection, conversation_id, "assistant"),
        last_job=None if job_id is None else job_reads.one(connection, owner_id, job_id),
    )


def lane(connection: Connection, owner_id: int, public_id: str, from_job: int | None = None) -> Lane | None:
    """Its open jobs; or all from `from_job` on, ended or not. None: no such conversation."""
    conversation_id = _id(connection, owner_id, public_id)
    if conversation_id is None:
        return None
    newest_job = newest_jobs(connection, [conversation_id]).get(conversation_id, 0)
    if from_job is not None:
        return Lane(conversation_id, jobs_after(connection, conversation_id, from_job - 1), newest_job)
    still_open = select(JobRow.id).where(
        JobRow.conversation_id == conversation_id,
        JobRow.status.in_([literal_column("'queued'"), literal_column("'processing'")]),
    )
    return Lane(conversation_id, list(connection.execute(still_open.order_by(JobRow.id)).scalars()), newest_job)


def newest_jobs(connection: Connection, conversation_ids: Iterable[int]) -> dict[int, int]:
    """Conversation -> the id of its newest job; those without a job are left out."""
    rows = connection.execute(
        select(JobRow.conversation_id, func.max(JobRow.id))
        .where(JobRow.conversation_id.in_(list(conversation_ids)))
        .group_by(JobRow.conversation_id)
    )
    return {row[0]: row[1] for row in rows}


def jobs_after(connection: Connection, conversation_id: int, job_id: int) -> list[int]:
    """The ids of its later jobs, in order."""
    query = select(JobRow.id).where(JobRow.conversation_id == conversation_id, JobRow.id > job_id).order_by(JobRow.id)
    return list(connection.execute(query).scalars())


def _newest(connection: Connection, conversation_id: int, role: str) -> Message | None:
    content = connection.execute(
        select(MessageRow.content)
        .where(MessageRow.conversation_id == conversation_id, MessageRow.role == role)
        .order_by(MessageRow.place.desc())
        .limit(1)
    ).scalar()
    return None if content is None else Message(role=role, content=content)


_of_conversation = MessageRow.conversation_id == bindparam("of_conversation")
_OWN = (
    select(MessageRow.role, MessageRow.content)
    .where(
        _of_conversation,
        MessageRow.place >= bindparam("own_place"),
        MessageRow.place <= bindparam("own_place") + PROMPT,
    )
    .order_by(MessageRow.place)
)
_earlier = (
    select(MessageRow.place)
    .outerjoin(
        JobRow,
        and_(
            JobRow.conversation_id == MessageRow.conversation_id,
            JobRow.turn == MessageRow.place // TURN_PLACES,
        ),
    )
    .where(
        _of_conversation,
        MessageRow.place < bindparam("own_place"),
        MessageRow.role != "system",
        or_(JobRow.id.is_(None), JobRow.status == Status.DONE.value),
    )
)
_EARLIER_SIZES = _earlier.add_columns(func.length(MessageRow.content)).order_by(MessageRow.place.desc())
_EARLIER_TEXTS = (
    _earlier.with_only_columns(MessageRow.role, MessageRow.content)
    .where(MessageRow.place >= bindparam("from_place"))
    .order_by(MessageRow.place)
)
_SYSTEM_BEFORE = (
    select(MessageRow.content)
    .where(_of_conversation, MessageRow.role == "system", MessageRow.place < bindparam("own_place"))
    .order_by(MessageRow.place.desc())
    .limit(1)
)


def turn(connection: Connection, conversation_id: int, turn: int, max_chars: int) -> Turn:
    """The system message in force, the earlier turns that have a reply, and this turn's own messages.

    Goes back no further than `max_chars` characters of earlier turns.
    """
    of = {"of_conversation": conversation_id, "own_place": TURN_PLACES * turn}
    own = [Message(role=role, content=content) for role, content in connection.execute(_OWN, of)]
    if turn == 0:
        return Turn(own, 0)
    # Lengths first: a long conversation's texts would not fit into memory, and most of them not into the context.
    of["from_place"], n_too_old, chars = of["own_place"], 0, 0
    for place, length in connection.execute(_EARLIER_SIZES, of):
        chars += length
        if chars > max_chars:
            n_too_old += 1
        else:
            of["from_place"] = place
    kept = [Message(role=role, content=content) for role, content in connection.execute(_EARLIER_TEXTS, of)]
    if own and own[0].role == "system":
        head = [own.pop(0)]
    else:
        system = connection.execute(_SYSTEM_BEFORE, of).scalar()
        head = [] if system is None else [Message(role="system", content=system)]
    return Turn(head + kept + own, n_too_old)
