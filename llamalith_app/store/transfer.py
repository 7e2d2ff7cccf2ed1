"""Writes a conversation out as a whole, and makes one of such a file.

An export has all branches, and of a fork the turns that it continues. An import makes a new conversation; its turns
have no jobs: what a job wrote elsewhere is a message like others here. Later prompts read all of them. Runs inside a
transaction or snapshot of `store/database.py`. Knows no HTTP.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple, cast

import msgspec
from sqlalchemy import Connection, Table, insert, select, update
from sqlalchemy.orm import aliased

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.export import ConversationExport, ExportedMessage, ExportedTurn
from llamalith_app.errors import BadInput
from llamalith_app.store import conversation_changes, turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import ConversationRow, ConversationTagRow, JobRow, MessageRow, Source, TurnRow

_conversations = cast(Table, ConversationRow.__table__)


class Made(NamedTuple):
    public_id: str
    n_turns: int
    n_left_out: int


def export(connection: Connection, owner_id: int, public_id: str) -> ConversationExport | None:
    """The conversation with all its branches. None: no such conversation of this owner."""
    conversation = connection.execute(
        select(
            ConversationRow.id,
            ConversationRow.public_id,
            ConversationRow.title,
            ConversationRow.head_turn_id,
            ConversationRow.created_at,
        ).where(reads.has_public_id(owner_id, public_id))
    ).first()
    if conversation is None:
        return None
    above = aliased(TurnRow)
    tree = select(TurnRow.id, TurnRow.parent_id).where(TurnRow.conversation_id == conversation.id).cte(recursive=True)
    tree = tree.union(select(above.id, above.parent_id).join(tree, above.id == tree.c.parent_id))
    rows = connection.execute(
        select(
            tree.c.id,
            tree.c.parent_id,
            TurnRow.created_at,
            JobRow.model,
            JobRow.status,
            MessageRow.role,
            MessageRow.content,
            MessageRow.tool_calls,
            MessageRow.tool_call_id,
            MessageRow.is_reply,
            MessageRow.thinking,
            MessageRow.thinking_s,
        )
        .join_from(tree, TurnRow, TurnRow.id == tree.c.id)
        .outerjoin(JobRow, JobRow.turn_id == TurnRow.id)
        .outerjoin(MessageRow, MessageRow.turn_id == TurnRow.id)
        .order_by(tree.c.id, MessageRow.position)
    )
    exported: dict[int, ExportedTurn] = {}
    for row in rows:
        turn = exported.get(row.id)
        if turn is None:
            turn = exported[row.id] = ExportedTurn(
                id=row.id,
                parent=row.parent_id,
                messages=[],
                created_at=row.created_at,
                model=row.model,
                status=row.status,
            )
        if row.role is not None:
            turn.messages.append(
                ExportedMessage(
                    role=row.role,
                    content=row.content,
                    tool_calls=None if row.tool_calls is None else msgspec.json.decode(row.tool_calls),
                    tool_call_id=row.tool_call_id,
                    is_reply=row.is_reply,
                    thinking=row.thinking,
                    thinking_s=row.thinking_s,
                )
            )
    head, kept = _without_empty(exported, conversation.head_turn_id)
    tags = select(ConversationTagRow.tag).where(ConversationTagRow.conversation_id == conversation.id)
    return ConversationExport(
        format="llamalith-conversation-1",
        conversation_id=conversation.public_id,
        title=conversation.title,
        tags=sorted(connection.execute(tags).scalars()),
        created_at=conversation.created_at,
        head=head,
        turns=kept,
    )


def _without_empty(exported: dict[int, ExportedTurn], head: int | None) -> tuple[int | None, list[ExportedTurn]]:
    """The head and the turns without those whose messages have expired."""

    def nearest(turn_id: int | None) -> int | None:
        while turn_id is not None and not exported[turn_id].messages:
            turn_id = exported[turn_id].parent
        return turn_id

    for turn in exported.values():
        turn.parent = nearest(turn.parent)
    return nearest(head), [turn for turn in exported.values() if turn.messages]


def path(exported: ConversationExport) -> list[ExportedTurn]:
    """The turns from the first to the head."""
    by_id = {turn.id: turn for turn in exported.turns}
    at, found = exported.head, []
    while at is not None:
        found.append(by_id[at])
        at = by_id[at].parent
    return found[::-1]


def make(connection: Connection, owner_id: int, given: ConversationExport, now: datetime) -> Made:
    """Stores the conversation under a new id, with all branches. A turn without a reply is left out, and those that
    continue it continue its parent; a system prompt alone stays. Raises BadInput, with nothing stored that may be
    committed."""
    kept = list(_kept(given))
    if not kept:
        raise BadInput("turns: none of them has a reply")
    public_id = str(uuid.uuid4())
    conversation_id: int = connection.execute(
        insert(_conversations)
        .values(owner_id=owner_id, public_id=public_id, source=Source.IMPORT.value, created_at=now)
        .returning(ConversationRow.id)
    ).scalar_one()
    stored: dict[int | None, turns.Parent] = {None: turns.NO_PARENT}
    by_id = {turn.id: turn for turn in kept}
    for turn in given.turns:
        parent = stored[turn.id] = stored[turn.parent]
        if turn.id not in by_id:
            continue
        messages = [
            Message(
                role=message.role,
                content=message.content,
                tool_calls=message.tool_calls,
                tool_call_id=message.tool_call_id,
                thinking=thinking,
                thinking_s=None if thinking is None else message.thinking_s,
            )
            for message in turn.messages
            for thinking in [message.thinking or None if message.role == "assistant" else None]
        ]
        turn_id = turns.append(connection, conversation_id, parent, messages, now)
        in_force = turn_id if messages[0].role == "system" else parent.system_turn_id
        stored[turn.id] = turns.Parent(turn_id, parent.depth + 1, in_force, conversation_id)
    # Where nothing of the branch is stored, the last turn stays the head.
    if (head := stored[given.turns[-1].id if given.head is None else given.head].id) is not None:
        connection.execute(
            update(_conversations).where(ConversationRow.id == conversation_id).values(head_turn_id=head)
        )
    title = (given.title or "").strip()
    wanted = conversation_changes.Change(title=title, tags=[tag.strip() for tag in given.tags])
    conversation_changes.change(connection, owner_id, [public_id], wanted, now)
    return Made(public_id, len(kept), len(given.turns) - len(kept))


def _kept(given: ConversationExport) -> Iterator[ExportedTurn]:
    """The turns that are stored. Raises BadInput where the file's turns are no tree."""
    seen: set[int] = set()
    for number, turn in enumerate(given.turns):
        if turn.id in seen:
            raise BadInput(f"turns[{number}].id: another turn of this file has it")
        if turn.parent is not None and turn.parent not in seen:
            raise BadInput(f"turns[{number}].parent: no turn before this one has that id")
        seen.add(turn.id)
        if _is_whole(turn.messages):
            yield turn
    if given.head is not None and given.head not in seen:
        raise BadInput("head: no turn of this file has that id")


def _is_whole(messages: Sequence[ExportedMessage]) -> bool:
    """Whether later prompts may read it: it ends with an answer, or is a system prompt alone."""
    return messages[-1].role == "assistant" or all(message.role == "system" for message in messages)
