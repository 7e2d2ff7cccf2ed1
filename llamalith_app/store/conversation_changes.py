"""What people change about whole conversations: title, pin, archive, tags; deletes and restores them.

A deleted conversation keeps its rows until `store/retention.py` deletes them, but nothing reads it any more, and its
public id is free. Runs inside a transaction of `store/database.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, NamedTuple, cast

from msgspec import UNSET, UnsetType
from sqlalchemy import Connection, Table, delete, func, insert, select, update

from llamalith_app.errors import BadInput, ConversationExists
from llamalith_app.store.jobs import reads, transitions
from llamalith_app.store.tables import ConversationRow, ConversationTagRow, Status

MAX_TAGS = 20
"""Tags of one conversation."""
_CANCELLED_AT_ONCE = 1000
_conversations = cast(Table, ConversationRow.__table__)
_tags = cast(Table, ConversationTagRow.__table__)


class Change(NamedTuple):
    """What is to change; None: it stays as it is."""

    title: str | UnsetType = UNSET
    """Empty: no title, so that lists show the first words of the prompt."""
    is_pinned: bool | None = None
    is_archived: bool | None = None
    tags: Collection[str] | None = None
    """These alone."""
    add_tags: Collection[str] = ()
    remove_tags: Collection[str] = ()


class Deletion(NamedTuple):
    public_ids: list[str]
    """The conversations that this call deleted."""
    at: datetime
    """When; `deleted_at` finds them by it."""
    cancelled: list[int]
    """The jobs that it cancelled."""


def change(
    connection: Connection, owner_id: int, public_ids: Iterable[str], wanted: Change, now: datetime
) -> list[str]:
    """Changes these conversations, and returns the public ids of those that exist. What is pinned or archived already
    keeps its time. Raises BadInput where one would have more than MAX_TAGS tags: then nothing may be committed."""
    found = [
        (conversation_id, public_id)
        for public_id in dict.fromkeys(public_ids)
        if (conversation_id := _lock(connection, owner_id, public_id)) is not None
    ]
    values = _values(wanted, now)
    for conversation_id, _ in found:
        if values:
            connection.execute(update(_conversations).where(ConversationRow.id == conversation_id).values(**values))
        _change_tags(connection, conversation_id, wanted)
    return [public_id for _, public_id in found]


def _values(wanted: Change, now: datetime) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not isinstance(wanted.title, UnsetType):
        # Nobody asks a model for a title that a person has taken away.
        values |= {"title": wanted.title or None, "title_by": "person" if wanted.title else "auto"}
    for is_set, column in (
        (wanted.is_pinned, ConversationRow.pinned_at),
        (wanted.is_archived, ConversationRow.archived_at),
    ):
        if is_set is not None:
            values[column.key] = func.coalesce(column, now) if is_set else None
    return values


def _change_tags(connection: Connection, conversation_id: int, wanted: Change) -> None:
    if wanted.tags is None and not wanted.add_tags and not wanted.remove_tags:
        return
    mine = ConversationTagRow.conversation_id == conversation_id
    before = set(connection.execute(select(ConversationTagRow.tag).where(mine)).scalars())
    after = (before if wanted.tags is None else set(wanted.tags)) - set(wanted.remove_tags) | set(wanted.add_tags)
    if len(after) > MAX_TAGS:
        raise BadInput(f"tags: a conversation has at most {MAX_TAGS}")
    if gone := before - after:
        connection.execute(delete(_tags).where(mine, ConversationTagRow.tag.in_(gone)))
    if new := after - before:
        connection.execute(insert(_tags), [{"conversation_id": conversation_id, "tag": tag} for tag in sorted(new)])


def delete_conversations(connection: Connection, owner_id: int, public_ids: Iterable[str], now: datetime) -> Deletion:
    """Deletes these conversations, so that only `restore` finds them, and cancels their open jobs."""
    deleted: list[str] = []
    cancelled: list[int] = []
    for public_id in dict.fromkeys(public_ids):
        conversation_id = _lock(connection, owner_id, public_id)
        if conversation_id is None:
            continue
        cancelled += _cancel_all(connection, owner_id, public_id, now)
        connection.execute(update(_conversations).where(ConversationRow.id == conversation_id).values(deleted_at=now))
        deleted.append(public_id)
    return Deletion(deleted, now, cancelled)


def _cancel_all(connection: Connection, owner_id: int, public_id: str, now: datetime) -> list[int]:
    cancelled: list[int] = []
    more = True
    while more:
        some = transitions.cancel_open(
            connection,
            owner_id,
            now,
            statuses=(Status.QUEUED, Status.PROCESSING),
            limit=_CANCELLED_AT_ONCE,
            conversation_id=public_id,
        )
        cancelled += some
        more = len(some) >= _CANCELLED_AT_ONCE
    return cancelled


def restore(connection: Connection, owner_id: int, public_ids: Iterable[str], since: datetime) -> list[str]:
    """Makes conversations readable again that were deleted after `since`; of several under one id the last deleted.
    Returns the public ids of those that are readable now, also where nothing was to be restored. Their cancelled jobs
    stay cancelled.

    Raises ConversationExists where another conversation began under such an id meanwhile.
    """
    restored = []
    for public_id in dict.fromkeys(public_ids):
        deleted_id = connection.execute(
            select(ConversationRow.id)
            .where(
                ConversationRow.owner_id == owner_id,
                ConversationRow.public_id == public_id.strip(),
                ConversationRow.deleted_at > since,
            )
            .order_by(ConversationRow.deleted_at.desc(), ConversationRow.id.desc())
            .limit(1)
            .with_for_update()
        ).scalar()
        is_there = _lock(connection, owner_id, public_id) is not None
        if deleted_id is not None:
            if is_there:
                raise ConversationExists(
                    f"Another conversation began under the id {public_id.strip()} after this one was deleted. Delete"
                    " that one first; nothing was restored."
                )
            connection.execute(update(_conversations).where(ConversationRow.id == deleted_id).values(deleted_at=None))
        if deleted_id is not None or is_there:
            restored.append(public_id)
    return restored


def deleted_at(connection: Connection, owner_id: int, moment: datetime) -> list[str]:
    """The public ids of the conversations that one call deleted at that moment and that were not restored since."""
    return list(
        connection.execute(
            select(ConversationRow.public_id).where(
                ConversationRow.owner_id == owner_id, ConversationRow.deleted_at == moment
            )
        ).scalars()
    )


def _lock(connection: Connection, owner_id: int, public_id: str) -> int | None:
    found: int | None = connection.execute(
        select(ConversationRow.id).where(reads.has_public_id(owner_id, public_id)).with_for_update()
    ).scalar()
    return found
