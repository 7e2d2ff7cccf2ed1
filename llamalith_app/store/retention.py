"""What is not kept any longer: ended jobs of an age, with all that was said in their turns.

The only one that deletes jobs, attempts and messages. Runs inside a transaction of `store/database.py`.
"""

from __future__ import annotations

from datetime import datetime
from typing import cast

from sqlalchemy import (
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
    JobRow,
    MessageRow,
)

_jobs, _messages, _attempts = (cast(Table, row.__table__) for row in (JobRow, MessageRow, AttemptRow))
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


def has_expired(connection: Connection, until: datetime) -> bool:
    return connection.execute(_EXPIRED, {"until": until, "most": 1}).first() is not None


def expire(connection: Connection, until: datetime, limit: int) -> int:
    """Deletes the jobs that ended by then, the first ended first, `limit` of them at most, with their attempts and all
    that was said in their turns; how many.

    A system message goes once another one took its place and no job is left that it was for. Conversations stay, and
    so do their turns' numbers.
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
    return len(expired)
