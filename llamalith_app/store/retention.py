"""Retention: deletes ended jobs beyond an age with the messages of their turns, and conversations with nothing younger.
Also deletes single turns, where a person wants that, and removes what people have deleted and can no longer restore.

The only module that deletes jobs, attempts, calls, messages, turns and conversations. Runs inside a transaction of
`store/database.py`. `until`: what ended or was sent by then has expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    BindParameter,
    Connection,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    not_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from llamalith_app.errors import JobOpen, NotFound, TurnInUse
from llamalith_app.store import tree, turns
from llamalith_app.store.tables import (
    AttemptRow,
    CallRow,
    ConversationRow,
    ConversationTagRow,
    JobRow,
    MessageRow,
    Status,
    TurnRow,
)
from llamalith_app.store.turns import is_system

_jobs, _turns, _messages, _attempts, _calls, _conversations = (
    cast(Table, row.__table__) for row in (JobRow, TurnRow, MessageRow, AttemptRow, CallRow, ConversationRow)
)
_EXPIRED_JOBS = (
    select(JobRow.id, JobRow.conversation_id, JobRow.turn_id)
    .where(JobRow.processed_at <= bindparam("until"))
    .order_by(JobRow.processed_at)
    .limit(bindparam("most"))
)
_EXPIRED_CALLS = (
    select(JobRow.id, JobRow.conversation_id, JobRow.turn_id)
    .join(CallRow, CallRow.job_id == JobRow.id)
    .where(
        CallRow.is_stored == bindparam("stored"),
        CallRow.created_at <= bindparam("until"),
        JobRow.processed_at <= bindparam("until"),
    )
    .order_by(CallRow.created_at)
    .limit(bindparam("most"))
)
_DELETE_ATTEMPTS = delete(_attempts).where(AttemptRow.job_id == bindparam("of_job"))
_DELETE_CALL = delete(_calls).where(CallRow.job_id == bindparam("of_job"))
_DELETE_JOB = delete(_jobs).where(JobRow.id == bindparam("of_job"))
_DELETE_MESSAGES_OF_JOB = delete(_messages).where(MessageRow.turn_id == bindparam("of_turn"), not_(is_system))
_CLEAR_DIGEST = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(digest=None)
_those: BindParameter[int] = bindparam("those", expanding=True)
_other = aliased(TurnRow)
_has_job = exists().where(JobRow.turn_id == TurnRow.id)
_is_head = exists().where(ConversationRow.head_turn_id == TurnRow.id)
_is_in_force_elsewhere = exists().where(_other.system_turn_id == TurnRow.id, _other.id != TurnRow.id)
_EXPIRED_SYSTEM_TURNS = (
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
_DELETE_MESSAGES = delete(_messages).where(MessageRow.turn_id.in_(_those))
_EMPTY_TURNS = (
    select(TurnRow.id)
    .where(
        TurnRow.conversation_id.in_(_those),
        not_(_is_head),
        not_(_has_job),
        not_(exists().where(MessageRow.turn_id == TurnRow.id)),
    )
    .order_by(TurnRow.id)
)
_MOVE_CHILDREN_UP = (
    update(_turns)
    .where(TurnRow.parent_id == bindparam("of_turn"))
    .values(parent_id=select(_other.parent_id).where(_other.id == bindparam("of_turn")).scalar_subquery())
)
_DELETE_TURNS = delete(_turns).where(TurnRow.id.in_(_those))
_WITHOUT_JOBS = (
    select(ConversationRow.id)
    .where(
        ConversationRow.id.in_(_those),
        # A new fork has neither a job nor a message.
        ConversationRow.created_at <= bindparam("until"),
        ~exists().where(JobRow.conversation_id == ConversationRow.id),
    )
    .with_for_update()
)
_WITH_YOUNGER_MESSAGES = (
    select(TurnRow.conversation_id)
    .distinct()
    .join(MessageRow, MessageRow.turn_id == TurnRow.id)
    .where(TurnRow.conversation_id.in_(_those), MessageRow.created_at > bindparam("until"))
)
"""For conversations without jobs only. These have few messages, all of them system messages."""
_TURNS_OF = select(TurnRow.id).where(TurnRow.conversation_id.in_(_those)).order_by(TurnRow.id)
_CLEAR_HEAD = update(_conversations).where(ConversationRow.id.in_(_those)).values(head_turn_id=None)
_DELETE_TAGS = delete(cast(Table, ConversationTagRow.__table__)).where(ConversationTagRow.conversation_id.in_(_those))
_DELETE_CONVERSATIONS = delete(_conversations).where(ConversationRow.id.in_(_those))
_TURN_OF = (
    select(TurnRow.id, TurnRow.parent_id)
    .where(TurnRow.id == bindparam("of_turn"), TurnRow.conversation_id == bindparam("of_conversation"))
    .with_for_update()
)
_JOB_OF_TURN = select(JobRow.id, JobRow.turn_id, JobRow.status).where(JobRow.turn_id == bindparam("of_turn"))
_JOB_OF_TURN = _JOB_OF_TURN.with_for_update()
_IS_IN_FORCE_ELSEWHERE = select(
    exists().where(TurnRow.system_turn_id == bindparam("of_turn"), TurnRow.id != bindparam("of_turn"))
)
_NEWEST_BUT = (
    select(TurnRow.id)
    .where(TurnRow.conversation_id == bindparam("of_conversation"), TurnRow.id != bindparam("of_turn"))
    .order_by(TurnRow.id.desc())
    .limit(1)
)
_CLEAR_SYSTEM = update(_turns).where(TurnRow.id == bindparam("of_turn")).values(system_turn_id=None)
_NEXT_CONVERSATIONS = (
    select(ConversationRow.id)
    .where(ConversationRow.id > bindparam("after"))
    .order_by(ConversationRow.id)
    .limit(bindparam("most"))
)


class ScannedConversations(NamedTuple):
    """The result of `scan_conversations`."""

    last: int
    """The id of the last scanned conversation, where the next scan continues; 0: the scan has reached the end."""
    expired: list[int]
    """The conversations that have no job and no message younger than `until`."""


def has_expired_jobs(connection: Connection, until: datetime) -> bool:
    return connection.execute(_EXPIRED_JOBS, {"until": until, "most": 1}).first() is not None


def delete_expired_jobs(connection: Connection, until: datetime, limit: int) -> int:
    """Deletes at most `limit` jobs that ended by `until`, the earliest first, with their attempts and the messages of
    their turns. Returns how many jobs.

    A system message is deleted once another one has replaced it and no job is left for which it was in force. A turn
    without messages is deleted unless it is a conversation's head; its children then continue its parent. A
    conversation is deleted with the last of its jobs, unless its system message is younger than `until`.
    """
    return _delete_expired(connection, until, connection.execute(_EXPIRED_JOBS, {"until": until, "most": limit}).all())


def has_expired_calls(connection: Connection, until: datetime, *, stored: bool) -> bool:
    return connection.execute(_EXPIRED_CALLS, {"stored": stored, "until": until, "most": 1}).first() is not None


def delete_expired_calls(connection: Connection, until: datetime, limit: int, *, stored: bool) -> int:
    """As `delete_expired_jobs`, for jobs of OpenAI clients alone: those that were to be stored, or those that were
    not."""
    of = {"stored": stored, "until": until, "most": limit}
    return _delete_expired(connection, until, connection.execute(_EXPIRED_CALLS, of).all())


def _delete_expired(connection: Connection, until: datetime, expired: Sequence[Any]) -> int:
    if not expired:
        return 0
    _delete_jobs(connection, expired)
    conversations = sorted({job.conversation_id for job in expired})
    # Turns first: a system message stays in force as long as a later turn refers to it.
    _delete_empty_turns(connection, conversations)
    systems = list(connection.execute(_EXPIRED_SYSTEM_TURNS, {"those": conversations, "until": until}).scalars())
    if systems:
        connection.execute(_DELETE_MESSAGES, {"those": systems})
        _delete_empty_turns(connection, conversations)
    delete_expired_conversations(connection, until, conversations)
    return len(expired)


def _delete_jobs(connection: Connection, jobs: Sequence[Any]) -> None:
    """Deletes these jobs (rows with `id` and `turn_id`), their attempts, and the messages of their turns but for system
    messages."""
    of_jobs = [{"of_job": job.id} for job in jobs]
    of_turns = [{"of_turn": job.turn_id} for job in jobs]
    connection.execute(_DELETE_MESSAGES_OF_JOB, of_turns)
    connection.execute(_CLEAR_DIGEST, of_turns)
    _delete_rows_of_jobs(connection, of_jobs)


def _delete_rows_of_jobs(connection: Connection, of_jobs: Sequence[dict[str, int]]) -> None:
    for statement in (_DELETE_ATTEMPTS, _DELETE_CALL, _DELETE_JOB):
        connection.execute(statement, of_jobs)


def delete_turn(connection: Connection, owner_id: int, public_id: str, turn_id: int) -> int:
    """Deletes a turn of this conversation with its job and all its messages. Its children then continue its parent.
    Returns the conversation's head.

    A system message that is in force for other turns stays, and with it the turn. Where the turn was the head, the
    newest turn below its parent becomes the head, else the newest turn that there is; the last turn stays as an empty
    head.
    Raises NotFound, JobOpen; TurnInUse where nothing but a system message was left that has to stay.
    """
    conversation = tree.lock_conversation(connection, owner_id, public_id)
    turn = connection.execute(_TURN_OF, {"of_turn": turn_id, "of_conversation": conversation.id}).first()
    if turn is None:
        raise NotFound(tree.NO_TURN)
    job = connection.execute(_JOB_OF_TURN, {"of_turn": turn_id}).first()
    if job is not None and job.status in (Status.QUEUED, Status.PROCESSING):
        raise JobOpen(f"Job {job.id} of this turn is {job.status}: cancel it first.")
    stays = connection.execute(_IS_IN_FORCE_ELSEWHERE, {"of_turn": turn_id}).scalar_one()
    if job is not None:
        _delete_jobs(connection, [job])
    elif stays:
        raise TurnInUse("This turn is a system prompt that is in force for later turns: delete those first.")
    head = conversation.head_turn_id
    if stays:
        return head
    connection.execute(_DELETE_MESSAGES, {"those": [turn_id]})
    if head == turn_id:
        others = None
        if turn.parent_id is not None:
            others = tree.newest_below(connection, conversation.id, turn.parent_id, but=turn_id)
        if others is None:
            others = connection.execute(_NEWEST_BUT, {"of_turn": turn_id, "of_conversation": conversation.id}).scalar()
        if others is None:
            connection.execute(_CLEAR_SYSTEM, {"of_turn": turn_id})
            return head
        head = others
        turns.set_head(connection, conversation.id, head)
    _delete_turns(connection, [turn_id])
    return head


def _delete_empty_turns(connection: Connection, conversations: Sequence[int]) -> None:
    """Deletes the turns of these conversations that have neither a message nor a job and are no head."""
    _delete_turns(connection, list(connection.execute(_EMPTY_TURNS, {"those": conversations}).scalars()))


def _delete_turns(connection: Connection, turn_ids: Sequence[int]) -> None:
    """Makes their children continue their parents, and deletes them. `turn_ids`: ascending, so parents come first."""
    if turn_ids:
        connection.execute(_MOVE_CHILDREN_UP, [{"of_turn": turn_id} for turn_id in turn_ids])
        connection.execute(_DELETE_TURNS, {"those": list(turn_ids)})


def scan_conversations(connection: Connection, until: datetime, after: int, most: int) -> ScannedConversations:
    """Looks at the `most` conversations after the id `after` for expired ones that are not deleted with their last job:
    they hold only a system message, or an older version deleted their jobs alone."""
    those = list(connection.execute(_NEXT_CONVERSATIONS, {"after": after, "most": most}).scalars())
    return ScannedConversations(
        those[-1] if len(those) == most else 0, _expired_conversations(connection, until, those)
    )


def delete_expired_conversations(connection: Connection, until: datetime, those: Iterable[int]) -> int:
    """Deletes those of the conversations that have no job and no message younger than `until`. Returns how many."""
    if expired := _expired_conversations(connection, until, those):
        connection.execute(_CLEAR_HEAD, {"those": expired})
        turn_ids = list(connection.execute(_TURNS_OF, {"those": expired}).scalars())
        connection.execute(_DELETE_MESSAGES, {"those": turn_ids})
        _delete_turns(connection, turn_ids)
        connection.execute(_DELETE_TAGS, {"those": expired})
        connection.execute(_DELETE_CONVERSATIONS, {"those": expired})
    return len(expired)


def _expired_conversations(connection: Connection, until: datetime, those: Iterable[int]) -> list[int]:
    without_jobs = list(connection.execute(_WITHOUT_JOBS, {"those": sorted(those), "until": until}).scalars())
    if not without_jobs:
        return []
    younger = set(connection.execute(_WITH_YOUNGER_MESSAGES, {"those": without_jobs, "until": until}).scalars())
    return [conversation for conversation in without_jobs if conversation not in younger]


_DELETED = (
    select(ConversationRow.id)
    .where(ConversationRow.deleted_at <= bindparam("until"))
    .order_by(ConversationRow.deleted_at)
)
_child = aliased(TurnRow)
_continued = (
    select(TurnRow.id, TurnRow.parent_id)
    .join(_child, _child.parent_id == TurnRow.id)
    .where(TurnRow.conversation_id == bindparam("of_conversation"), _child.conversation_id != TurnRow.conversation_id)
    .cte("continued", recursive=True)
)
_continued = _continued.union(
    select(_child.id, _child.parent_id)
    .join(_continued, _child.id == _continued.c.parent_id)
    .where(_child.conversation_id == bindparam("of_conversation"))
)
"""The turns of a conversation that a fork of it reads."""
_UNREAD_TURNS = (
    select(TurnRow.id)
    .where(TurnRow.conversation_id == bindparam("of_conversation"), TurnRow.id.not_in(select(_continued.c.id)))
    .order_by(TurnRow.id.desc())
    .limit(bindparam("most"))
)
_LAST_TURN = select(func.max(TurnRow.id)).where(TurnRow.conversation_id == bindparam("of_conversation"))
_SET_HEAD = (
    update(_conversations)
    .where(ConversationRow.id == bindparam("of_conversation"))
    .values(head_turn_id=bindparam("new"))
)
_JOBS_OF_TURNS = select(JobRow.id).where(JobRow.turn_id.in_(_those))


def deleted_conversations(connection: Connection, until: datetime) -> list[int]:
    """The conversations that were deleted by then, the earliest first, of which something can be removed."""
    return [
        conversation_id
        for conversation_id in connection.execute(_DELETED, {"until": until}).scalars()
        if _unread_turns(connection, conversation_id, 1) or not _last_turn(connection, conversation_id)
    ]


def remove_deleted(connection: Connection, until: datetime, limit: int) -> int:
    """Removes at most `limit` turns of conversations that were deleted by then, with jobs and messages, and the
    conversations with the last of them. Returns how many turns.

    The turns that a fork reads stay, and with them the deleted conversation, as long as the fork does.
    """
    n_removed = 0
    for conversation_id in deleted_conversations(connection, until):
        if n_removed >= limit:
            break
        turn_ids = _unread_turns(connection, conversation_id, limit - n_removed)
        n_removed += len(turn_ids)
        _remove_turns(connection, conversation_id, turn_ids)
        _remove_if_empty(connection, conversation_id)
    return n_removed


def remove_conversation(connection: Connection, conversation_id: int) -> None:
    """Removes a conversation at once, with turns that nothing else continues and jobs that have ended."""
    _remove_turns(connection, conversation_id, _unread_turns(connection, conversation_id, 1000))
    _remove_if_empty(connection, conversation_id)


def _remove_if_empty(connection: Connection, conversation_id: int) -> None:
    if _last_turn(connection, conversation_id) is None:
        connection.execute(_DELETE_TAGS, {"those": [conversation_id]})
        connection.execute(_DELETE_CONVERSATIONS, {"those": [conversation_id]})


def _unread_turns(connection: Connection, conversation_id: int, most: int) -> list[int]:
    of = {"of_conversation": conversation_id, "most": most}
    return list(connection.execute(_UNREAD_TURNS, of).scalars())


def _last_turn(connection: Connection, conversation_id: int) -> int | None:
    last: int | None = connection.execute(_LAST_TURN, {"of_conversation": conversation_id}).scalar()
    return last


def _remove_turns(connection: Connection, conversation_id: int, turn_ids: Sequence[int]) -> None:
    """`turn_ids`: descending, so children come first."""
    connection.execute(_CLEAR_HEAD, {"those": [conversation_id]})
    of_jobs = [{"of_job": job_id} for job_id in connection.execute(_JOBS_OF_TURNS, {"those": list(turn_ids)}).scalars()]
    if of_jobs:
        _delete_rows_of_jobs(connection, of_jobs)
    connection.execute(_DELETE_MESSAGES, {"those": list(turn_ids)})
    connection.execute(_DELETE_TURNS, {"those": list(turn_ids)})
    last = _last_turn(connection, conversation_id)
    connection.execute(_SET_HEAD, {"of_conversation": conversation_id, "new": last})
