"""Titles that a model writes: one job for each conversation of the page, after its first reply.

Such a job is in a fork of the conversation, made by the product itself (Source.TITLE): the engine has read all of it
but the question already, and the conversation gets no turn and waits for nothing. No list shows the fork, and it is
removed as soon as its job has ended, whether it brought a title or not. A person's title always stays. Runs inside a
transaction of `store/database.py`; the worker's sweep calls it.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import NamedTuple, cast

import msgspec
from sqlalchemy import Connection, Table, bindparam, exists, func, select, update
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.contracts.parameters import JsonSchema
from llamalith_app.errors import LlamalithError
from llamalith_app.store import retention
from llamalith_app.store.conversation_list import NAME_CHARS, first_words
from llamalith_app.store.jobs import submission
from llamalith_app.store.jobs.statements import is_open, open_job
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, Source, Status, TurnRow, status_is

MAX_AGE = timedelta(days=1)
"""A conversation that gets its first reply later than this after its beginning gets no title by itself."""
QUESTION = "Write a title for this conversation: at most six words, in the language of the conversation."
MAX_TOKENS = 48
MAX_WAIT_S = 3600.0
"""A job for a title that has not started by then is given up."""
# Held to a schema, a model says nothing around the title.
REPLY = JsonSchema(
    schema={
        "type": "object",
        "properties": {"title": {"type": "string", "minLength": 1, "maxLength": NAME_CHARS}},
        "required": ["title"],
        "additionalProperties": False,
    }
)
_conversations = cast(Table, ConversationRow.__table__)
_CUT_OFF = re.compile(r'\{\s*"title"\s*:\s*"((?:[^"\\]|\\.)*)')
_AROUND = " \t\"'`*#_.:“”„«»\u2018\u2019"


class Work(NamedTuple):
    ask_for: list[int]
    """Conversations that may get a title now."""
    collect: list[int]
    """The forks whose jobs have ended."""


class _Reply(msgspec.Struct):
    title: str


_no_open_job = ~exists().where(open_job.conversation_id == ConversationRow.id, is_open)
_has_no_title = (ConversationRow.title_by.is_(None), ConversationRow.title.is_(None))
_first_reply = (
    select(func.min(JobRow.id))
    .where(JobRow.conversation_id == ConversationRow.id, status_is(Status.DONE))
    .correlate(ConversationRow)
    .scalar_subquery()
)
_ASK_FOR = (
    select(ConversationRow.id)
    .where(
        ConversationRow.source == Source.PAGE.value,
        *_has_no_title,
        ConversationRow.created_at > bindparam("since"),
        ConversationRow.deleted_at.is_(None),
        _first_reply.is_not(None),
        _no_open_job,
    )
    .order_by(ConversationRow.created_at)
    .limit(bindparam("most"))
)
_COLLECT = (
    select(ConversationRow.id)
    .where(ConversationRow.source == Source.TITLE.value, *_has_no_title, _no_open_job)
    .limit(bindparam("most"))
)
_first = aliased(TurnRow)
_ASKED = (
    select(_first.conversation_id, MessageRow.content)
    .select_from(TurnRow)
    .join(_first, _first.id == TurnRow.parent_id)
    .outerjoin(MessageRow, (MessageRow.turn_id == bindparam("of_turn")) & MessageRow.is_reply)
    .where(TurnRow.conversation_id == bindparam("of_fork"), _first.conversation_id != bindparam("of_fork"))
)


def work(connection: Connection, now: datetime, limit: int) -> Work:
    """What there is to do, at most `limit` of each."""
    of = {"since": now - MAX_AGE, "most": limit}
    return Work(
        list(connection.execute(_ASK_FOR, of).scalars()),
        list(connection.execute(_COLLECT, {"most": limit}).scalars()),
    )


def ask(connection: Connection, conversation_id: int, now: datetime) -> int | None:
    """Queues the job for a title of this conversation, and returns its id. None: it has a title, or was asked for one,
    or has no reply (any more)."""
    found = connection.execute(
        select(ConversationRow.owner_id, ConversationRow.public_id, JobRow.turn_id, JobRow.model)
        .join(JobRow, JobRow.id == _first_reply)
        .where(ConversationRow.id == conversation_id, *_has_no_title, ConversationRow.deleted_at.is_(None))
        .with_for_update(of=ConversationRow)
    ).first()
    if found is None:
        return None
    connection.execute(update(_conversations).where(ConversationRow.id == conversation_id).values(title_by="auto"))
    try:
        fork = submission.fork(connection, found.owner_id, found.public_id, found.turn_id, None, now)
    except LlamalithError:
        return None
    request = JobRequest(
        model=found.model,
        priority="batch",
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        reasoning_effort="none",
        response_format=REPLY,
        max_attempts=1,
        queue_timeout_s=MAX_WAIT_S,
    )
    asked = [Message(role="user", content=QUESTION)]
    new = submission.NewJob(found.owner_id, "title", request, asked, fork.conversation_id)
    connection.execute(
        update(_conversations)
        .where(ConversationRow.owner_id == found.owner_id, ConversationRow.public_id == fork.conversation_id)
        .values(source=Source.TITLE.value)
    )
    return submission.submit(connection, new, now).job_id


def collect(connection: Connection, fork_id: int) -> str | None:
    """Gives the title to the conversation that it was asked for, unless a person has given one, and removes the fork,
    whose job must have ended. Returns the title; None: the job brought none, or a person was faster."""
    job_turn = connection.execute(select(func.max(JobRow.turn_id)).where(JobRow.conversation_id == fork_id)).scalar()
    asked = connection.execute(_ASKED, {"of_fork": fork_id, "of_turn": job_turn}).first()
    title = None
    if asked is not None and asked.content is not None and (title := title_in(asked.content)) is not None:
        given = connection.execute(
            update(_conversations)
            .where(
                ConversationRow.id == asked.conversation_id,
                ConversationRow.title.is_(None),
                ConversationRow.title_by == "auto",
            )
            .values(title=title)
        )
        title = title if given.rowcount else None
    retention.remove_conversation(connection, fork_id)
    return title


def title_in(reply: str) -> str | None:
    """The title in what the model wrote: one line, at most NAME_CHARS characters, without quotation marks around it.
    None: there is none."""
    try:
        found = msgspec.json.decode(reply, type=_Reply).title
    except (msgspec.DecodeError, UnicodeDecodeError):
        cut_off = _CUT_OFF.match(reply.strip())
        if cut_off is None:
            return None
        found = cut_off[1]
    line = " ".join("".join(char if char.isprintable() else " " for char in found).split())
    title = first_words(re.sub(r"^title\s*:", "", line, flags=re.IGNORECASE).strip(_AROUND))
    # A small model may repeat the question.
    return None if title is None or title.lower() in QUESTION.lower() else title
