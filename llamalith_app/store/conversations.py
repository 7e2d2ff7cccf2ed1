"""What is read of a conversation: its messages, its newest state, and the turn that a job sees.

Reads only; `store/jobs/submission.py` makes conversations, and `store/turns.py` writes their turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, func, literal_column, not_, select
from sqlalchemy import exists as sql_exists
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Latest, Message, MessageList
from llamalith_app.contracts.jobs import Job
from llamalith_app.store import turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, TurnRow


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
    """Its number on its path, as the address of a page of turns says it."""
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
        .order_by(open_job.id)
        .limit(1)
    ).scalar_subquery()
    rows = connection.execute(
        select(
            ConversationRow.public_id,
            _first_prompt(ConversationRow.id, max_text).scalar_subquery(),
            TurnRow.depth + 1,
            func.coalesce(status_of_first_open, JobRow.status),
            func.coalesce(JobRow.processed_at, JobRow.created_at, ConversationRow.created_at),
        )
        .join(page, page.c.id == ConversationRow.id)
        .join(TurnRow, TurnRow.id == ConversationRow.head_turn_id)
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
        select(ConversationRow.id, ConversationRow.head_turn_id, TurnRow.depth)
        .join(TurnRow, TurnRow.id == ConversationRow.head_turn_id)
        .where(reads.is_named(owner_id, public_id))
    ).first()
    if conversation is None:
        return None
    until = conversation.depth + 1 if before is None else min(before, conversation.depth + 1)
    goes_on = first is not None
    if first is None:
        first = max(until - limit, 0)
    else:
        first = min(first, until)
        until = min(until, first + limit)
    on_path = {"from_turn": conversation.head_turn_id}
    depths = {
        row.id: row.depth for row in connection.execute(_PART_OF_PATH, on_path | {"from_depth": first, "until": until})
    }
    found = reads.of_turns(connection, owner_id, list(depths), oldest_first=goes_on)
    if sum(map(reads.n_text_chars, found.values())) >= reads.MAX_PAGE_CHARS:
        # Very long texts ended the page early: it is whole from its oldest job on, or up to its newest.
        of_jobs = [depths[turn_id] for turn_id in found]
        first, until = (first, max(of_jobs) + 1) if goes_on else (min(of_jobs), until)
    shown = sorted(turn_id for turn_id, depth in depths.items() if first <= depth < until)
    system: dict[int, str] = {}
    context: dict[int, str] = {}
    for row in connection.execute(_BESIDE_PROMPTS, {"of_turns": shown}):
        (system if row.role == "system" else context).setdefault(row.turn_id, row.content)
    threaded = [
        ThreadTurn(depths[turn_id], system.get(turn_id), context.get(turn_id), found.get(turn_id))
        for turn_id in shown
        # Of others nothing is left: they have expired.
        if turn_id in found or turn_id in system
    ]
    n_earlier, last_earlier = connection.execute(_EARLIER, on_path | {"first": first}).one()
    first_prompt: str | None = connection.execute(_first_prompt(conversation.id, max_text)).scalar()
    return Thread(
        threaded,
        n_earlier,
        0 if last_earlier is None else last_earlier + 1,
        until,
        turns.system_in_force(connection, turns.parent(connection, conversation.head_turn_id).system_turn_id) or "",
        first_prompt,
    )


_recent = turns.path(is_bounded=True)
_whole = turns.path()
_PART_OF_PATH = (
    select(_recent.c.id, _recent.c.depth)
    .where(_recent.c.depth >= bindparam("from_depth"), _recent.c.depth < bindparam("until"))
    .order_by(_recent.c.depth)
)
_BESIDE_PROMPTS = (
    select(MessageRow.turn_id, MessageRow.role, MessageRow.content)
    .where(
        MessageRow.turn_id.in_(bindparam("of_turns", expanding=True)),
        MessageRow.role.in_([literal_column("'system'"), literal_column("'assistant'")]),
        not_(MessageRow.is_reply),
    )
    .order_by(MessageRow.turn_id, MessageRow.position)
)
_EARLIER = select(func.count(), func.max(_whole.c.depth)).where(
    _whole.c.depth < bindparam("first"), sql_exists().where(MessageRow.turn_id == _whole.c.id)
)


def _first_prompt(conversation_id: Any, max_text: int) -> Select[str]:
    """Of the conversation's own turns, the first that has one."""
    return (
        select(func.substr(MessageRow.content, 1, max_text))
        .join(TurnRow, TurnRow.id == MessageRow.turn_id)
        .where(TurnRow.conversation_id == conversation_id, MessageRow.role == "user")
        .order_by(TurnRow.id, MessageRow.position)
        .limit(1)
    )


def exists(connection: Connection, owner_id: int, public_id: str) -> bool:
    return _id(connection, owner_id, public_id) is not None


def _id(connection: Connection, owner_id: int, public_id: str) -> int | None:
    found: int | None = connection.execute(
        select(ConversationRow.id).where(reads.is_named(owner_id, public_id))
    ).scalar()
    return found


def _head(connection: Connection, owner_id: int, public_id: str) -> int | None:
    """The turn that its path ends with. None: no such conversation."""
    found: int | None = connection.execute(
        select(ConversationRow.head_turn_id).where(reads.is_named(owner_id, public_id))
    ).scalar()
    return found


def message_list(connection: Connection, owner_id: int, public_id: str) -> MessageList:
    head = _head(connection, owner_id, public_id)
    return MessageList(
        conversation_id=public_id.strip(),
        exists=head is not None,
        messages=[] if head is None else turns.messages(connection, head),
    )


def messages(connection: Connection, owner_id: int, public_id: str) -> list[Message]:
    """Of the branch that people see, in the order of its turns; empty for an unknown conversation."""
    return message_list(connection, owner_id, public_id).messages


def latest(connection: Connection, owner_id: int, public_id: str) -> Latest:
    conversation = connection.execute(
        select(ConversationRow.id, ConversationRow.head_turn_id).where(reads.is_named(owner_id, public_id))
    ).first()
    if conversation is None:
        return Latest(
            conversation_id=public_id.strip(), exists=False, last_user=None, last_assistant=None, last_job=None
        )
    job_id = connection.execute(select(func.max(JobRow.id)).where(JobRow.conversation_id == conversation.id)).scalar()
    return Latest(
        conversation_id=public_id.strip(),
        exists=True,
        last_user=turns.newest(connection, conversation.head_turn_id, "user"),
        last_assistant=turns.newest(connection, conversation.head_turn_id, "assistant"),
        last_job=None if job_id is None else reads.one(connection, owner_id, job_id),
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
