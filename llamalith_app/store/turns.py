"""The tree of turns: appended at the end of a path, read from one turn up to the root, recognised by a digest.

The only writer of turns and messages until they expire (`store/retention.py`). Knows which jobs were answered, and
nothing else of jobs.
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
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, Status, TurnRow

_turns, _messages, _conversations = (cast(Table, row.__table__) for row in (TurnRow, MessageRow, ConversationRow))


class Turn(NamedTuple):
    """What one job is to answer: nothing of another branch, nothing queued later, nothing that got no reply."""

    messages: list[Message]
    n_too_old: int
    """Messages left out already here, because no context could hold as much text as comes after them."""


class Parent(NamedTuple):
    """What a new turn goes on from. All null: from nothing."""

    id: int | None
    depth: int
    """-1 where there is none."""
    system_turn_id: int | None
    conversation_id: int | None


class Beginning(NamedTuple):
    """The path that the first messages of a history equal."""

    turn_id: int
    conversation_id: int
    n_messages: int


NOTHING = Parent(None, -1, None, None)

_PARENT = select(TurnRow.id, TurnRow.depth, TurnRow.system_turn_id, TurnRow.conversation_id).where(
    TurnRow.id == bindparam("of_turn")
)
_NEW_TURN = insert(_turns).returning(TurnRow.id)
_IS_IN_FORCE = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(system_turn_id=bindparam("of_turn"))
_SET_HEAD = (
    update(_conversations)
    .where(ConversationRow.id == bindparam("of_conversation"))
    .values(head_turn_id=bindparam("new_head"))
)
_NEW_MESSAGES = insert(_messages)
_SYSTEM = select(MessageRow.content).where(MessageRow.turn_id == bindparam("of_turn"), MessageRow.position == 0)
is_system = and_(MessageRow.position == 0, MessageRow.role == literal_column("'system'"))
"""It is in force from its turn on; one that stands further back in a turn is a message like any other."""
_MESSAGE = (MessageRow.role, MessageRow.content, MessageRow.tool_calls, MessageRow.tool_call_id)
_INPUTS = (
    select(*_MESSAGE)
    .where(MessageRow.turn_id == bindparam("of_turn"), not_(MessageRow.is_reply))
    .order_by(MessageRow.position)
)


def path(*, is_bounded: bool = False) -> CTE:
    """The turns from `from_turn` (a parameter of the statement) up to the root; bounded, up to the depth `from_depth`.
    Its columns are id, parent_id and depth."""
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


def _read_of(turns: CTE, *columns: Any) -> Select[Any]:
    """Of the messages on that path, those that a job behind it reads, without the system message in force."""
    return (
        select(*columns)
        .join_from(turns, MessageRow, MessageRow.turn_id == turns.c.id)
        .outerjoin(JobRow, JobRow.turn_id == turns.c.id)
        .where(not_(is_system), _is_read)
    )


_SIZES = _read_of(_path, _path.c.depth, MessageRow.position, func.length(MessageRow.content)).order_by(
    _path.c.depth.desc(), MessageRow.position.desc()
)
_TEXTS = (
    _read_of(_recent, *_MESSAGE)
    .where(
        or_(
            _recent.c.depth > bindparam("from_depth"),
            and_(_recent.c.depth == bindparam("from_depth"), MessageRow.position >= bindparam("from_position")),
        )
    )
    .order_by(_recent.c.depth, MessageRow.position)
)
_COUNT = _read_of(_path, func.count())
_NEWEST = (
    select(MessageRow.turn_id, MessageRow.position)
    .join_from(_recent, MessageRow, MessageRow.turn_id == _recent.c.id)
    .where(MessageRow.role == bindparam("of_role"))
    .order_by(_recent.c.depth.desc(), MessageRow.position.desc())
    .limit(1)
)
# Without its text: of those that are sorted, one is wanted.
_ONE = select(*_MESSAGE).where(
    MessageRow.turn_id == bindparam("of_turn"), MessageRow.position == bindparam("of_position")
)
_WHOLE = (
    select(*_MESSAGE)
    .join_from(_path, MessageRow, MessageRow.turn_id == _path.c.id)
    .order_by(_path.c.depth, MessageRow.position)
)
_above = aliased(TurnRow)
_BEHIND = (
    select(
        TurnRow.parent_id,
        TurnRow.system_turn_id,
        _above.parent_id.label("grandparent_id"),
        _above.digest.label("digest_before"),
        _above.system_turn_id.label("system_turn_id_before"),
    )
    .outerjoin(_above, _above.id == TurnRow.parent_id)
    .where(TurnRow.id == bindparam("of_turn"))
)
_TURN = select(TurnRow.parent_id, TurnRow.depth, TurnRow.system_turn_id).where(TurnRow.id == bindparam("of_turn"))
_SET_DIGEST = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(digest=bindparam("new_digest"))
_BY_DIGEST = (
    select(TurnRow.id, TurnRow.conversation_id, TurnRow.system_turn_id)
    .join(ConversationRow, ConversationRow.id == TurnRow.conversation_id)
    .where(TurnRow.digest == bindparam("of_digest"), ConversationRow.owner_id == bindparam("of_owner"))
    .order_by(TurnRow.id.desc())
    .limit(10)
)


def parent(connection: Connection, turn_id: int | None) -> Parent:
    if turn_id is None:
        return NOTHING
    return Parent._make(connection.execute(_PARENT, {"of_turn": turn_id}).one())


def append(
    connection: Connection, conversation_id: int, behind: Parent, inputs: Sequence[Message], now: datetime
) -> int:
    """A new turn with these messages, the head of its conversation from now on; its id."""
    new = {
        "conversation_id": conversation_id,
        "parent_id": behind.id,
        "depth": behind.depth + 1,
        "system_turn_id": behind.system_turn_id,
        "created_at": now,
    }
    turn_id: int = connection.execute(_NEW_TURN, new).scalar_one()
    if inputs[0].role == "system":
        connection.execute(_IS_IN_FORCE, {"of_turn": turn_id})
    connection.execute(
        _NEW_MESSAGES,
        [_as_row(turn_id, position, message, False, now) for position, message in enumerate(inputs)],
    )
    connection.execute(_SET_HEAD, {"of_conversation": conversation_id, "new_head": turn_id})
    return turn_id


def add_reply(connection: Connection, turn_id: int, reply: Message, now: datetime) -> None:
    """The last message of its turn, and with it the digest of the path that ends here."""
    said = inputs(connection, turn_id)
    connection.execute(_NEW_MESSAGES, _as_row(turn_id, len(said), reply, True, now))
    new = [*(said[1:] if said and said[0].role == "system" else said), reply]
    turn = at = connection.execute(_BEHIND, {"of_turn": turn_id}).one()
    while at.digest_before is None and at.grandparent_id is not None:
        at = connection.execute(_BEHIND, {"of_turn": at.parent_id}).one()
    if at.digest_before is not None and at.system_turn_id_before == turn.system_turn_id:
        digest = digests.extend(at.digest_before, new)
    else:
        # Another system message stands before all of it now.
        earlier = [] if turn.parent_id is None else _texts(connection, turn.parent_id, 0, 0)
        digest = digests.extend(None, [*_system(connection, turn.system_turn_id), *earlier, *new])
    connection.execute(_SET_DIGEST, {"of_turn": turn_id, "new_digest": digest})


def inputs(connection: Connection, turn_id: int) -> list[Message]:
    """What was sent in with it, its system message too."""
    return [_as_message(row) for row in connection.execute(_INPUTS, {"of_turn": turn_id}).mappings()]


def system_in_force(connection: Connection, system_turn_id: int | None) -> str | None:
    """Of a turn with that `system_turn_id`. None: there is none."""
    if system_turn_id is None:
        return None
    content: str = connection.execute(_SYSTEM, {"of_turn": system_turn_id}).scalar_one()
    return content


def turn(connection: Connection, turn_id: int, max_chars: int) -> Turn:
    """The system message in force, the earlier turns of its path that have a reply, and this turn's own messages.

    Goes back no further than `max_chars` characters of earlier turns.
    """
    own = inputs(connection, turn_id)
    at = connection.execute(_TURN, {"of_turn": turn_id}).one()
    if own and own[0].role == "system":
        del own[0]
    # Lengths first: a long path's texts would not fit into memory, and most of them not into the context.
    from_depth, from_position, n_too_old, n_chars = at.depth, 0, 0, 0
    for depth, position, length in connection.execute(_SIZES, {"from_turn": at.parent_id}):
        n_chars += length
        if n_chars > max_chars:
            n_too_old += 1
        else:
            from_depth, from_position = depth, position
    kept = _texts(connection, at.parent_id, from_depth, from_position)
    return Turn([*_system(connection, at.system_turn_id), *kept, *own], n_too_old)


def messages(connection: Connection, head_turn_id: int) -> list[Message]:
    """All of the path to it, what got no reply too."""
    return [_as_message(row) for row in connection.execute(_WHOLE, {"from_turn": head_turn_id}).mappings()]


def newest(connection: Connection, head_turn_id: int, role: str) -> Message | None:
    """The last message of that role on the path to it."""
    depth = parent(connection, head_turn_id).depth
    # Nearly always among the last ones; the whole of a long path is looked through only where it is not.
    for from_depth in sorted({max(0, depth - 20), 0}, reverse=True):
        of = {"from_turn": head_turn_id, "from_depth": from_depth, "of_role": role}
        if (found := connection.execute(_NEWEST, of).first()) is not None:
            at = {"of_turn": found.turn_id, "of_position": found.position}
            return _as_message(connection.execute(_ONE, at).mappings().one())
    return None


def longest_beginning(connection: Connection, owner_id: int, history: Sequence[Message]) -> Beginning | None:
    """The longest path of this owner that equals the beginning of a history: what a job behind its last turn would
    read is these messages, and nothing is missing. None: there is none."""
    for n_messages, digest in digests.beginnings(history):
        for found in connection.execute(_BY_DIGEST, {"of_digest": digest, "of_owner": owner_id}):
            # A part of the path may have expired since.
            n_read = connection.execute(_COUNT, {"from_turn": found.id}).scalar_one()
            if n_read + (found.system_turn_id is not None) == n_messages:
                return Beginning(found.id, found.conversation_id, n_messages)
    return None


def _system(connection: Connection, system_turn_id: int | None) -> Iterable[Message]:
    content = system_in_force(connection, system_turn_id)
    return [] if content is None else [Message(role="system", content=content)]


def _texts(connection: Connection, turn_id: int | None, from_depth: int, from_position: int) -> list[Message]:
    """What a job behind that turn reads of its path, from there on."""
    of = {"from_turn": turn_id, "from_depth": from_depth, "from_position": from_position}
    return [_as_message(row) for row in connection.execute(_TEXTS, of).mappings()]


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
    }


def _as_message(row: RowMapping) -> Message:
    calls = row["tool_calls"]
    return Message(
        role=row["role"],
        content=row["content"],
        tool_calls=None if calls is None else msgspec.json.decode(calls, type=list[dict[str, Any]]),
        tool_call_id=row["tool_call_id"],
    )
