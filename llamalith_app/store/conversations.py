"""What is read of a conversation: its messages, its newest state, and the turn that a job sees.

Reads only; conversations and messages are written by the transitions in `store/jobs.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, and_, func, or_, select

from llamalith_app.contracts.conversations import Latest, Message
from llamalith_app.store import jobs
from llamalith_app.store.tables import PROMPT, TURN_PLACES, ConversationRow, JobRow, MessageRow, Status


class Turn(NamedTuple):
    """What one job is to answer: nothing queued later, nothing of turns that got no reply."""

    messages: list[Message]
    n_too_old: int
    """Messages left out already here, because no context could hold as much text as comes after them."""


def messages(connection: Connection, owner_id: int, public_id: str) -> list[Message]:
    """In the order of the turns; empty for an unknown conversation."""
    rows = connection.execute(
        select(MessageRow.role, MessageRow.content)
        .join(ConversationRow, ConversationRow.id == MessageRow.conversation_id)
        .where(ConversationRow.owner_id == owner_id, ConversationRow.public_id == public_id)
        .order_by(MessageRow.place)
    )
    return [Message(role=role, content=content) for role, content in rows]


def latest(connection: Connection, owner_id: int, public_id: str) -> Latest:
    conversation_id = connection.execute(
        select(ConversationRow.id).where(ConversationRow.owner_id == owner_id, ConversationRow.public_id == public_id)
    ).scalar()
    if conversation_id is None:
        return Latest(last_user=None, last_assistant=None, last_job=None)
    job_id = connection.execute(select(func.max(JobRow.id)).where(JobRow.conversation_id == conversation_id)).scalar()
    return Latest(
        last_user=_newest(connection, conversation_id, "user"),
        last_assistant=_newest(connection, conversation_id, "assistant"),
        last_job=None if job_id is None else jobs.one(connection, owner_id, job_id),
    )


def _newest(connection: Connection, conversation_id: int, role: str) -> Message | None:
    content = connection.execute(
        select(MessageRow.content)
        .where(MessageRow.conversation_id == conversation_id, MessageRow.role == role)
        .order_by(MessageRow.place.desc())
        .limit(1)
    ).scalar()
    return None if content is None else Message(role=role, content=content)


def turn(connection: Connection, conversation_id: int, turn: int, max_chars: int) -> Turn:
    """The system message in force, the earlier turns that have a reply, and this turn's own messages.

    Goes back no further than `max_chars` characters of earlier turns.
    """
    own_place = TURN_PLACES * turn
    own = [
        Message(role=role, content=content)
        for role, content in connection.execute(
            select(MessageRow.role, MessageRow.content)
            .where(
                MessageRow.conversation_id == conversation_id,
                MessageRow.place > own_place,
                MessageRow.place <= own_place + PROMPT,
            )
            .order_by(MessageRow.place)
        )
    ]
    earlier = (
        select(MessageRow.place)
        .outerjoin(
            JobRow,
            and_(
                JobRow.conversation_id == MessageRow.conversation_id,
                JobRow.turn == MessageRow.place // TURN_PLACES,
            ),
        )
        .where(
            MessageRow.conversation_id == conversation_id,
            MessageRow.place < own_place,
            MessageRow.role != "system",
            or_(JobRow.id.is_(None), JobRow.status == Status.DONE.value),
        )
    )
    # Lengths first: a long conversation's texts would not fit into memory, and most of them not into the context.
    first_place, n_too_old, chars = own_place, 0, 0
    sizes = earlier.add_columns(func.length(MessageRow.content)).order_by(MessageRow.place.desc())
    for place, length in connection.execute(sizes):
        chars += length
        if chars > max_chars:
            n_too_old += 1
        else:
            first_place = place
    texts = earlier.with_only_columns(MessageRow.role, MessageRow.content).where(MessageRow.place >= first_place)
    kept = [
        Message(role=role, content=content) for role, content in connection.execute(texts.order_by(MessageRow.place))
    ]
    system = connection.execute(
        select(MessageRow.content)
        .where(
            MessageRow.conversation_id == conversation_id,
            MessageRow.role == "system",
            MessageRow.place <= own_place,
        )
        .order_by(MessageRow.place.desc())
        .limit(1)
    ).scalar()
    head = [] if system is None else [Message(role="system", content=system)]
    return Turn(head + kept + own, n_too_old)
