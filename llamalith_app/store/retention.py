"""What is not kept any longer: ended jobs of an age, with all that was said in their turns, and conversations in which
nothing younger is left.

The only one that deletes jobs, attempts, messages, turns and conversations. Runs inside a transaction of
`store/database.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import (
    BindParameter,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    not_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from llamalith_app.store.tables import AttemptRow, ConversationRow, JobRow, MessageRow, TurnRow
from llamalith_app.store.turns import is_system

_jobs, _turns, _messages, _attempts, _conversations = (
    cast(Table, row.__table__) for row in (JobRow, TurnRow, MessageRow, AttemptRow, ConversationRow)
)
_EXPIRED = (
    select(JobRow.id, JobRow.conversation_id, JobRow.turn_id)
    .where(JobRow.processed_at <= bindparam("until"))
    .order_by(JobRow.processed_at)
    .limit(bindparam("most"))
)
_FORGET_ATTEMPTS = delete(_attempts).where(AttemptRow.job_id == bindparam("of_job"))
_FORGET_JOB = delete(_jobs).where(JobRow.id == bindparam("of_job"))
_FORGET_SAID = delete(_messages).where(MessageRow.turn_id == bindparam("of_turn"), not_(is_system))
_FORGET_DIGEST = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(digest=None)
_those: BindParameter[int] = bindparam("those", expanding=True)
_other = aliased(TurnRow)
_has_job = exists().where(JobRow.turn_id == TurnRow.id)
_is_head = exists().where(ConversationRow.head_turn_id == TurnRow.id)
_is_in_force_elsewhere = exists().where(_other.system_turn_id == TurnRow.id, _other.id != TurnRow.id)
_FORGOTTEN_SYSTEM = (
    select(TurnRow.id)
    .join(MessageRow, and_(MessageRow.turn_id == TurnRow.id, MessageRow.position == 0))
    .where(
        TurnRow.conversation_id.in_(_those),
        TurnRow.system_turn_id == TurnRow.id,
        MessageRow.created_at <= bindparam("until"),
        not_(_has_job),
        not_(_is_head),
        not_(_is_in_force_elsewhere),
    )
)
_FORGET_MESSAGES = delete(_messages).where(MessageRow.turn_id.in_(_those))
_EMPTY = (
    select(TurnRow.id)
    .where(
        TurnRow.conversation_id.in_(_those),
        not_(_is_head),
        not_(_has_job),
        not_(exists().where(MessageRow.turn_id == TurnRow.id)),
    )
    .order_by(TurnRow.id)
)
_PASS_ON = (
    update(_turns)
    .where(TurnRow.parent_id == bindparam("of_turn"))
    .values(parent_id=select(_other.parent_id).where(_other.id == bindparam("of_turn")).scalar_subquery())
)
_FORGET_TURNS = delete(_turns).where(TurnRow.id.in_(_those))
_WITHOUT_JOBS = (
    select(ConversationRow.id)
    .where(ConversationRow.id.in_(_those), ~exists().where(JobRow.conversation_id == ConversationRow.id))
    .with_for_update()
)
_WITH_YOUNGER_MESSAGES = (
    select(TurnRow.conversation_id)
    .distinct()
    .join(MessageRow, MessageRow.turn_id == TurnRow.id)
    .where(TurnRow.conversation_id.in_(_those), MessageRow.created_at > bindparam("until"))
)
"""Of those without jobs: their messages are few, as they are system messages alone."""
_TURNS_OF = select(TurnRow.id).where(TurnRow.conversation_id.in_(_those)).order_by(TurnRow.id)
_WITHOUT_HEAD = update(_conversations).where(ConversationRow.id.in_(_those)).values(head_turn_id=None)
_FORGET_CONVERSATIONS = delete(_conversations).where(ConversationRow.id.in_(_those))
_NEXT_CONVERSATIONS = (
    select(ConversationRow.id)
    .where(ConversationRow.id > bindparam("after"))
    .order_by(ConversationRow.id)
    .limit(bindparam("most"))
)


class Looked(NamedTuple):
    """What a look through some conversations found."""

    last: int
    """The last of them; 0: there are none behind them."""
    forgotten: list[int]
    """Those in which nothing is left that is to be kept."""


def has_expired(connection: Connection, until: datetime) -> bool:
    return connection.execute(_EXPIRED, {"until": until, "most": 1}).first() is not None


def expire(connection: Connection, until: datetime, limit: int) -> int:
    """Deletes the jobs that ended by then, the first ended first, `limit` of them at most, with their attempts and all
    that was said in their turns; how many.

    A system message goes once another one took its place and no job is left that it was for. A turn of which nothing is
    left goes too, unless it is a conversation's head: those behind it go on from the one before it. A conversation goes
    with the last of its jobs, its system message too, unless that is younger.
    """
    expired = connection.execute(_EXPIRED, {"until": until, "most": limit}).all()
    if not expired:
        return 0
    of_jobs = [{"of_job": job.id} for job in expired]
    of_turns = [{"of_turn": job.turn_id} for job in expired]
    connection.execute(_FORGET_SAID, of_turns)
    connection.execute(_FORGET_DIGEST, of_turns)
    connection.execute(_FORGET_ATTEMPTS, of_jobs)
    connection.execute(_FORGET_JOB, of_jobs)
    conversations = sorted({job.conversation_id for job in expired})
    # Turns first: a system message is in force for as long as there is a turn behind it that has not gone.
    _forget_empty(connection, conversations)
    systems = list(connection.execute(_FORGOTTEN_SYSTEM, {"those": conversations, "until": until}).scalars())
    if systems:
        connection.execute(_FORGET_MESSAGES, {"those": systems})
        _forget_empty(connection, conversations)
    forget_conversations(connection, until, conversations)
    return len(expired)


def _forget_empty(connection: Connection, conversations: Sequence[int]) -> None:
    """Deletes their turns in which nothing is left."""
    _forget_turns(connection, list(connection.execute(_EMPTY, {"those": conversations}).scalars()))


def _forget_turns(connection: Connection, turn_ids: Sequence[int]) -> None:
    """`turn_ids`: parents before their children, as ids are."""
    if turn_ids:
        connection.execute(_PASS_ON, [{"of_turn": turn_id} for turn_id in turn_ids])
        connection.execute(_FORGET_TURNS, {"those": list(turn_ids)})


def look_through(connection: Connection, until: datetime, after: int, most: int) -> Looked:
    """Looks at the next `most` conversations after that one, for those that no expiring job takes with it: that held
    only a system message, or whose last job went before conversations did."""
    those = list(connection.execute(_NEXT_CONVERSATIONS, {"after": after, "most": most}).scalars())
    return Looked(those[-1] if len(those) == most else 0, _forgotten(connection, until, those))


def forget_conversations(connection: Connection, until: datetime, those: Iterable[int]) -> int:
    """Deletes those of them that have no job and in which all that was said was said by then; how many."""
    if forgotten := _forgotten(connection, until, those):
        connection.execute(_WITHOUT_HEAD, {"those": forgotten})
        turn_ids = list(connection.execute(_TURNS_OF, {"those": forgotten}).scalars())
        connection.execute(_FORGET_MESSAGES, {"those": turn_ids})
        _forget_turns(connection, turn_ids)
        connection.execute(_FORGET_CONVERSATIONS, {"those": forgotten})
    return len(forgotten)


def _forgotten(connection: Connection, until: datetime, those: Iterable[int]) -> list[int]:
    without_jobs = list(connection.execute(_WITHOUT_JOBS, {"those": sorted(those)}).scalars())
    if not without_jobs:
        return []
    younger = set(connection.execute(_WITH_YOUNGER_MESSAGES, {"those": without_jobs, "until": until}).scalars())
    return [conversation for conversation in without_jobs if conversation not in younger]
