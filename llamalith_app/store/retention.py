"""What is not kept any longer: ended jobs of an age, with all that was said in their turns, and conversations in which
nothing younger is left.

The only one that deletes jobs, attempts, messages and conversations. Runs inside a transaction of `store/database.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import (
    BindParameter,
    Connection,
    Table,
    bindparam,
    delete,
    exists,
    func,
    select,
)
from sqlalchemy.orm import aliased

from llamalith_app.store.tables import (
    CONTEXT,
    REPLY,
    TURN_PLACES,
    AttemptRow,
    ConversationRow,
    JobRow,
    MessageRow,
)

_jobs, _messages, _attempts, _conversations = (
    cast(Table, row.__table__) for row in (JobRow, MessageRow, AttemptRow, ConversationRow)
)
_EXPIRED = (
    select(JobRow.id, JobRow.conversation_id, JobRow.turn)
    .where(JobRow.processed_at <= bindparam("until"))
    .order_by(JobRow.processed_at)
    .limit(bindparam("most"))
)
_of_conversation = MessageRow.conversation_id == bindparam("of_conversation")
_FORGET_MESSAGES = delete(_messages).where(
    _of_conversation, MessageRow.place.between(bindparam("from"), bindparam("to"))
)
_FORGET_ATTEMPTS = delete(_attempts).where(AttemptRow.job_id == bindparam("of_job"))
_FORGET_JOB = delete(_jobs).where(JobRow.id == bindparam("of_job"))
_later = aliased(MessageRow)
_left = aliased(JobRow)
_next_system = (
    select(func.min(_later.place))
    .where(
        _later.conversation_id == MessageRow.conversation_id,
        _later.role == "system",
        _later.place > MessageRow.place,
    )
    .correlate(MessageRow)
    .scalar_subquery()
)
_FORGET_SYSTEM = delete(_messages).where(
    _of_conversation,
    MessageRow.role == "system",
    MessageRow.created_at <= bindparam("until"),
    _next_system.is_not(None),
    ~exists()
    .where(
        _left.conversation_id == MessageRow.conversation_id,
        _left.turn >= MessageRow.place // TURN_PLACES,
        _left.turn < _next_system // TURN_PLACES,
    )
    .correlate(MessageRow),
)
"""Against the next one alone: tried against all later ones, 10,000 of them would hold the lock for 20 s."""
_those: BindParameter[int] = bindparam("those", expanding=True)
_WITHOUT_JOBS = (
    select(ConversationRow.id)
    .where(ConversationRow.id.in_(_those), ~exists().where(JobRow.conversation_id == ConversationRow.id))
    .with_for_update()
)
_WITH_YOUNGER_MESSAGES = (
    select(MessageRow.conversation_id)
    .distinct()
    .where(MessageRow.conversation_id.in_(_those), MessageRow.created_at > bindparam("until"))
)
"""Of those without jobs: their messages are few, as they are system messages alone."""
_FORGET_ALL_SAID = delete(_messages).where(MessageRow.conversation_id.in_(_those))
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

    A system message goes once another one took its place and no job is left that it was for. A conversation goes with
    the last of its jobs, its system message too, unless that is younger; while it stays, so do its turns' numbers.
    """
    expired = connection.execute(_EXPIRED, {"until": until, "most": limit}).all()
    if not expired:
        return 0
    turns = [(job.conversation_id, TURN_PLACES * job.turn) for job in expired]
    of_jobs = [{"of_job": job.id} for job in expired]
    connection.execute(
        _FORGET_MESSAGES,
        [{"of_conversation": of, "from": place + CONTEXT, "to": place + REPLY} for of, place in turns],
    )
    connection.execute(_FORGET_ATTEMPTS, of_jobs)
    connection.execute(_FORGET_JOB, of_jobs)
    conversations = {job.conversation_id for job in expired}
    connection.execute(_FORGET_SYSTEM, [{"of_conversation": of, "until": until} for of in sorted(conversations)])
    forget_conversations(connection, until, conversations)
    return len(expired)


def look_through(connection: Connection, until: datetime, after: int, most: int) -> Looked:
    """Looks at the next `most` conversations after that one, for those that no expiring job takes with it: that held
    only a system message, or whose last job went before conversations did."""
    those = list(connection.execute(_NEXT_CONVERSATIONS, {"after": after, "most": most}).scalars())
    return Looked(those[-1] if len(those) == most else 0, _forgotten(connection, until, those))


def forget_conversations(connection: Connection, until: datetime, those: Iterable[int]) -> int:
    """Deletes those of them that have no job and in which all that was said was said by then; how many."""
    if forgotten := _forgotten(connection, until, those):
        connection.execute(_FORGET_ALL_SAID, {"those": forgotten})
        connection.execute(_FORGET_CONVERSATIONS, {"those": forgotten})
    return len(forgotten)


def _forgotten(connection: Connection, until: datetime, those: Iterable[int]) -> list[int]:
    without_jobs = list(connection.execute(_WITHOUT_JOBS, {"those": sorted(those)}).scalars())
    if not without_jobs:
        return []
    younger = set(connection.execute(_WITH_YOUNGER_MESSAGES, {"those": without_jobs, "until": until}).scalars())
    return [conversation for conversation in without_jobs if conversation not in younger]
