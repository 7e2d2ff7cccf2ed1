"""The tree of turns: appends a turn and its reply, and reads what a job may see.

Each turn has one parent, the turn that it goes on from; its path is itself and its ancestors up to the root. Two turns
with the same parent are branches. The head of a conversation is the turn that people see as its newest. A turn without
a reply stays on its path, but later jobs do not read it. The system message in force at a turn is that of the turn
`system_turn_id`, which is the turn itself or an ancestor.

A turn with a reply has a digest: a hash of everything that a job after it would read, but for the system message in
force. By it a history that a client sends is found again (`longest_stored_prefix`).

Only this module writes turns and messages; `store/retention.py` deletes them. Runs inside a transaction or snapshot of
`store/database.py`. Of jobs it only knows which are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

import msgspec
from sqlalchemy import (
    CTE,
    Connection,
    RowMapping,
    Select,
    Table,
    and_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Message
from llamalith_app.store import digests
from llamalith_app.store.tables import CallRow, ConversationRow, JobRow, MessageRow, Status, TurnRow, status_is

_turns, _messages, _conversations = (cast(Table, row.__table__) for row in (TurnRow, MessageRow, ConversationRow))


class ReplyTo(NamedTuple):
    """What a reply answers, as far as storing the reply needs it. It holds while the turn's job has its lease."""

    turn_id: int
    position: int
    """That the reply will have in its turn."""
    digest: str
    """Of everything that the job reads, but for the system message in force."""


class Turn(NamedTuple):
    """What one job reads: the messages of its own path, without turns that got no reply."""

    messages: list[Message]
    n_omitted: int
    """Number of the oldest messages that are left out here already, because the text after them fills any context."""
    reply_to: ReplyTo


class Parent(NamedTuple):
    """The turn that a new turn goes on from; `NO_PARENT` for the first turn of a conversation."""

    id: int | None
    depth: int
    """-1 in NO_PARENT."""
    system_turn_id: int | None
    conversation_id: int | None


class StoredPrefix(NamedTuple):
    """A stored path that equals the first `n_messages` of a history."""

    turn_id: int
    """The last turn of the path."""
    conversation_id: int
    n_messages: int


NO_PARENT = Parent(None, -1, None, None)

_PARENT = select(TurnRow.id, TurnRow.depth, TurnRow.system_turn_id, TurnRow.conversation_id).where(
    TurnRow.id == bindparam("of_turn")
)
_INSERT_TURN = insert(_turns).returning(TurnRow.id)
_SET_IN_FORCE = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(system_turn_id=bindparam("of_turn"))
_SET_HEAD = (
    update(_conversations)
    .where(ConversationRow.id == bindparam("of_conversation"))
    .values(head_turn_id=bindparam("new_head"))
)
_INSERT_MESSAGES = insert(_messages)
_user_message = aliased(MessageRow)
_REPLACE_PROMPT = (
    update(_messages)
    .where(
        MessageRow.turn_id == bindparam("of_turn"),
        MessageRow.position
        == select(func.max(_user_message.position))
        .where(_user_message.turn_id == bindparam("of_turn"), _user_message.role == literal_column("'user'"))
        .scalar_subquery(),
    )
    .values(content=bindparam("new_content"))
)
_SYSTEM = select(MessageRow.content).where(MessageRow.turn_id == bindparam("of_turn"), MessageRow.position == 0)
is_system = and_(MessageRow.position == 0, MessageRow.role == literal_column("'system'"))
"""Only as the first message of a turn does a system message come into force. Elsewhere it is a message like others."""
_MESSAGE = (MessageRow.role, MessageRow.content, MessageRow.tool_calls, MessageRow.tool_call_id)
_SHOWN = (*_MESSAGE, MessageRow.thinking, MessageRow.thinking_s)
"""What people see of a message. What models read, and what a digest is of, has no thinking."""
_INPUTS = (
    select(*_MESSAGE)
    .where(MessageRow.turn_id == bindparam("of_turn"), not_(MessageRow.is_reply))
    .order_by(MessageRow.position)
)


def path(*, is_bounded: bool = False) -> CTE:
    """The path of the turn `from_turn`. With `is_bounded`, only its turns of the depth `from_depth` and deeper. Both
    are parameters of the statement. The columns are id, parent_id and depth; the root has depth 0."""
    start = select(TurnRow.id, TurnRow.parent_id, TurnRow.depth).where(TurnRow.id == bindparam("from_turn"))
    up = start.cte("path", recursive=True)
    above = aliased(TurnRow)
    step = select(above.id, above.parent_id, above.depth).join(up, above.id == up.c.parent_id)
    if is_bounded:
        step = step.where(above.depth >= bindparam("from_depth"))
    return up.union_all(step)


_path = path()
_recent = path(is_bounded=True)
_is_read = or_(JobRow.id.is_(None), JobRow.status == Status.DONE.value)


def _select_read(turns: CTE, *columns: Any) -> Select[Any]:
    """The messages on this path that a job after its last turn reads, without system messages that are or were in
    force."""
    return (
        select(*columns)
        .join_from(turns, MessageRow, MessageRow.turn_id == turns.c.id)
        .outerjoin(JobRow, JobRow.turn_id == turns.c.id)
        .where(not_(is_system), _is_read)
    )


_READ_SIZES = _select_read(_path, _path.c.depth, MessageRow.position, func.length(MessageRow.content)).order_by(
    _path.c.depth.desc(), MessageRow.position.desc()
)
_READ_MESSAGES = (
    _select_read(_recent, *_MESSAGE)
    .where(
        or_(
            _recent.c.depth > bindparam("from_depth"),
            and_(_recent.c.depth == bindparam("from_depth"), MessageRow.position >= bindparam("from_position")),
        )
    )
    .order_by(_recent.c.depth, MessageRow.position)
)
_N_READ = _select_read(_path, func.count())
_by_role = (
    select(
        MessageRow.turn_id,
        MessageRow.position,
        func.row_number()
        .over(partition_by=MessageRow.role, order_by=(_recent.c.depth.desc(), MessageRow.position.desc()))
        .label("number"),
    )
    .join_from(_recent, MessageRow, MessageRow.turn_id == _recent.c.id)
    .where(MessageRow.role.in_([literal_column("'user'"), literal_column("'assistant'")]))
    .subquery("by_role")
)
# Joined once more, so that the sort above reads no texts.
_NEWEST_BY_ROLE = (
    select(*_SHOWN)
    .join_from(
        _by_role, MessageRow, and_(MessageRow.turn_id == _by_role.c.turn_id, MessageRow.position == _by_role.c.position)
    )
    .where(_by_role.c.number == 1)
)
_ALL_MESSAGES = (
    select(*_SHOWN)
    .join_from(_path, MessageRow, MessageRow.turn_id == _path.c.id)
    .order_by(_path.c.depth, MessageRow.position)
)
_above = aliased(TurnRow)
_POSITION = (
    select(
        TurnRow.parent_id,
        TurnRow.depth,
        TurnRow.system_turn_id,
        _above.digest.label("digest_above"),
        _above.parent_id.label("grandparent_id"),
    )
    .outerjoin(_above, _above.id == TurnRow.parent_id)
    .where(TurnRow.id == bindparam("of_turn"))
)
_DIGEST = select(TurnRow.digest, TurnRow.parent_id).where(TurnRow.id == bindparam("of_turn"))
_SET_DIGEST = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(digest=bindparam("new_digest"))
_system_message = aliased(MessageRow)
_BY_DIGEST = (
    select(TurnRow.id, TurnRow.conversation_id)
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .outerjoin(
        _system_message,
        and_(_system_message.turn_id == TurnRow.system_turn_id, _system_message.position == 0),
    )
    .where(
        TurnRow.digest == bindparam("of_digest"),
        ConversationRow.owner_id == bindparam("of_owner"),
        ConversationRow.deleted_at.is_(None),
        func.coalesce(_system_message.content, "") == bindparam("of_system"),
        # Its texts go soon.
        ~exists().where(JobRow.turn_id == TurnRow.id, CallRow.job_id == JobRow.id, ~CallRow.is_stored),
    )
    .order_by(TurnRow.id.desc())
    .limit(10)
)
_JOB_BEFORE = (
    select(JobRow.id).join(TurnRow, TurnRow.parent_id == JobRow.turn_id).where(TurnRow.id == bindparam("of_turn"))
)
_OPEN_ON_PATH = (
    select(JobRow.status)
    .join_from(_path, JobRow, JobRow.turn_id == _path.c.id)
    .where(status_is(Status.QUEUED, Status.PROCESSING))
    .order_by(_path.c.depth)
    .limit(1)
)


def parent(connection: Connection, turn_id: int | None) -> Parent:
    if turn_id is None:
        return NO_PARENT
    return Parent._make(connection.execute(_PARENT, {"of_turn": turn_id}).one())


def find(connection: Connection, turn_id: int) -> Parent | None:
    """As `parent`, for an id that a client sent. None: there is no such turn. The caller checks whose it is."""
    found = connection.execute(_PARENT, {"of_turn": turn_id}).first()
    return None if found is None else Parent._make(found)


def append(
    connection: Connection, conversation_id: int, behind: Parent, inputs: Sequence[Message], now: datetime
) -> int:
    """Adds a turn with these messages after the turn `behind`, makes it the head of its conversation, and returns its
    id. A system message that comes first is in force from now on. Without messages, it is only a place to go on from.
    """
    new = {
        "conversation_id": conversation_id,
        "parent_id": behind.id,
        "depth": behind.depth + 1,
        "system_turn_id": behind.system_turn_id,
        "created_at": now,
    }
    turn_id: int = connection.execute(_INSERT_TURN, new).scalar_one()
    if inputs:
        if inputs[0].role == "system":
            connection.execute(_SET_IN_FORCE, {"of_turn": turn_id})
        connection.execute(
            _INSERT_MESSAGES,
            [_as_row(turn_id, position, message, False, now) for position, message in enumerate(inputs)],
        )
    set_head(connection, conversation_id, turn_id)
    return turn_id


def set_head(connection: Connection, conversation_id: int, turn_id: int) -> None:
    """`turn_id`: a turn of this conversation, and a leaf among its turns."""
    connection.execute(_SET_HEAD, {"of_conversation": conversation_id, "new_head": turn_id})


def replace_prompt(connection: Connection, turn_id: int, content: str) -> None:
    """Changes the last message that a user sent in this turn. Its job must not have been started."""
    connection.execute(_REPLACE_PROMPT, {"of_turn": turn_id, "new_content": content})


def add_reply(connection: Connection, to: ReplyTo, reply: Message, now: datetime) -> None:
    """Adds the reply as the turn's last message, with its thinking, and sets the turn's digest."""
    connection.execute(_INSERT_MESSAGES, [_as_row(to.turn_id, to.position, reply, True, now)])
    digest = digests.extend(to.digest, [reply])
    connection.execute(_SET_DIGEST, {"of_turn": to.turn_id, "new_digest": digest})


def inputs(connection: Connection, turn_id: int) -> list[Message]:
    """The messages of the turn without its reply: what its client sent."""
    return [_as_message(row) for row in connection.execute(_INPUTS, {"of_turn": turn_id}).mappings()]


def system_in_force(connection: Connection, system_turn_id: int | None) -> str | None:
    """The text of the system message that begins that turn. None: no system message is in force."""
    if system_turn_id is None:
        return None
    content: str = connection.execute(_SYSTEM, {"of_turn": system_turn_id}).scalar_one()
    return content


def read_turn(connection: Connection, turn_id: int, max_chars: int) -> Turn:
    """What the job of this turn reads, in order: the system message in force, the earlier turns of its path that have a
    reply, and the turn's own messages.

    Of the earlier turns, only the newest messages with at most `max_chars` characters together.
    """
    sent = inputs(connection, turn_id)
    own = sent[1:] if sent and sent[0].role == "system" else sent
    at = connection.execute(_POSITION, {"of_turn": turn_id}).one()
    earlier, n_omitted = ([], 0) if at.parent_id is None else _read_earlier(connection, at.parent_id, max_chars)
    # System messages in force are no part of a digest: with one that changes in each turn, the whole path would have to
    # be read again each time.
    digest, above = at.digest_above, at.grandparent_id
    while digest is None and above is not None:
        digest, above = connection.execute(_DIGEST, {"of_turn": above}).one()
    reply_to = ReplyTo(turn_id, len(sent), digests.extend(digest, own))
    return Turn([*_system_messages(connection, at.system_turn_id), *earlier, *own], n_omitted, reply_to)


def path_messages(connection: Connection, head_turn_id: int) -> list[Message]:
    """All messages on the path to that turn, oldest first; also those of turns without a reply."""
    return [_as_message(row) for row in connection.execute(_ALL_MESSAGES, {"from_turn": head_turn_id}).mappings()]


def newest_messages(connection: Connection, head_turn_id: int, depth: int) -> dict[str, Message]:
    """By role, the last message of a user and of an assistant on the path to that turn, which has this depth. A role
    that has no message there is left out."""
    found: dict[str, Message] = {}
    # Both are nearly always among the last turns. The path is searched further up only where they are not.
    for n_turns in (4, 100, depth + 1):
        of = {"from_turn": head_turn_id, "from_depth": max(0, depth + 1 - n_turns)}
        found = {row["role"]: _as_message(row) for row in connection.execute(_NEWEST_BY_ROLE, of).mappings()}
        if len(found) == 2 or n_turns > depth:
            break
    return found


def job_before(connection: Connection, turn_id: int) -> int | None:
    """The job of the turn that this one continues. None: there is none."""
    job_id: int | None = connection.execute(_JOB_BEFORE, {"of_turn": turn_id}).scalar()
    return job_id


def open_job_on_path(connection: Connection, turn_id: int) -> Status | None:
    """The status of the first job on this path that has not ended. None: they all have."""
    status = connection.execute(_OPEN_ON_PATH, {"from_turn": turn_id}).scalar()
    return None if status is None else Status(status)


def longest_stored_prefix(connection: Connection, owner_id: int, history: Sequence[Message]) -> StoredPrefix | None:
    """The longest stored path of this owner that equals a prefix of the history: a job after its last turn would read
    exactly these messages. None: there is none."""
    has_system = bool(history) and history[0].role == "system"
    of = {"of_owner": owner_id, "of_system": history[0].content if has_system else ""}
    for n_messages, digest in digests.prefix_digests(history[1:] if has_system else history):
        for found in connection.execute(_BY_DIGEST, {"of_digest": digest, **of}):
            # Part of the path may have expired since its digest was stored.
            if connection.execute(_N_READ, {"from_turn": found.id}).scalar_one() == n_messages:
                return StoredPrefix(found.id, found.conversation_id, n_messages + has_system)
    return None


def _system_messages(connection: Connection, system_turn_id: int | None) -> Iterable[Message]:
    content = system_in_force(connection, system_turn_id)
    return [] if content is None else [Message(role="system", content=content)]


def _read_earlier(connection: Connection, turn_id: int, max_chars: int) -> tuple[list[Message], int]:
    """Of the messages that a job after `turn_id` reads, the newest with at most so many characters together, and the
    number of the others."""
    # Lengths first: the texts of a long path may not fit into memory, and most of them not into the context.
    first, n_omitted, n_chars = None, 0, 0
    for depth, position, length in connection.execute(_READ_SIZES, {"from_turn": turn_id}):
        n_chars += length
        if n_chars > max_chars:
            n_omitted += 1
        else:
            first = (depth, position)
    if first is None:
        return [], n_omitted
    of = {"from_turn": turn_id, "from_depth": first[0], "from_position": first[1]}
    return [_as_message(row) for row in connection.execute(_READ_MESSAGES, of).mappings()], n_omitted


def _as_row(turn_id: int, position: int, message: Message, is_reply: bool, now: datetime) -> dict[str, Any]:
    return {
        "turn_id": turn_id,
        "position": position,
        "role": message.role,
        "content": message.content,
        "tool_calls": None if message.tool_calls is None else msgspec.json.encode(message.tool_calls).decode(),
        "tool_call_id": message.tool_call_id,
        "is_reply": is_reply,
        "created_at": now,
        "thinking": message.thinking,
        "thinking_s": message.thinking_s,
    }


def _as_message(row: RowMapping) -> Message:
    calls = row["tool_calls"]
    return Message(
        role=row["role"],
        content=row["content"],
        tool_calls=None if calls is None else msgspec.json.decode(calls, type=list[dict[str, Any]]),
        tool_call_id=row["tool_call_id"],
        thinking=row.get("thinking"),
        thinking_s=row.get("thinking_s"),
    )
