"""Lists an owner's conversations, those with the newest turns first: for the sidebar, for the page and for the API.

Writes nothing. Deleted conversations are in no list, nor those that the product made for itself (Source.TITLE). What a
query finds is known in `store/search.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, bindparam, exists, func, literal_column, or_, select
from sqlalchemy.orm import aliased

from llamalith_app.store import search, turns
from llamalith_app.store.conversations import first_prompt
from llamalith_app.store.jobs import reads
from llamalith_app.store.search import Snippet
from llamalith_app.store.tables import (
    ConversationRow,
    ConversationTagRow,
    JobRow,
    MessageRow,
    Status,
    TurnRow,
    status_is,
)

RECENT_TURNS = 2000
"""The newest conversations are searched among these turns first, then among all."""
IN_SIDEBAR = 50
"""Of the pinned conversations, and as many of the others."""
MAX_TEXT = 300
"""Characters of a first prompt in a list."""
NAME_CHARS = 80
"""Characters of the words that stand for a title."""


class Filter(NamedTuple):
    """Which conversations a list has; None: whatever it is."""

    query: str = ""
    """As people type it; see `search.terms`. Blank: all."""
    is_archived: bool | None = False
    is_pinned: bool | None = None
    tag: str | None = None
    source: str | None = None
    status: str | None = None
    """`queued`, `processing` or `error`, as `Listed.status` says it."""


class Listed(NamedTuple):
    """A conversation in a list."""

    public_id: str
    title: str | None
    """None: none yet."""
    first_prompt: str | None
    """Its first MAX_TEXT characters; None: no prompt yet."""
    tags: tuple[str, ...]
    """In alphabetical order."""
    is_pinned: bool
    is_archived: bool
    source: str | None
    """A value of Source; None: not known."""
    n_turns: int
    """On the path that people see; expired ones count."""
    status: str | None
    """Of its first open job; where no job is open, of its newest. None: it has no job."""
    last_at: datetime
    """When its newest job ended, else was accepted; without a job, when the conversation was made."""
    snippet: Snippet | None
    """None: nothing was searched for, or it stands in the title alone."""
    cursor: int
    """The `before` of a list that goes on after this one."""

    @property
    def name(self) -> str | None:
        """The title, or else the first words of the first prompt, on one line. None: it has neither."""
        return self.title or (None if self.first_prompt is None else first_words(self.first_prompt))


class Sidebar(NamedTuple):
    pinned: list[Listed]
    """The last pinned first."""
    recent: list[Listed]
    """Those with the newest turns first, without pinned and archived ones."""


DayKey = Literal["today", "yesterday", "week", "month"]


class Day(NamedTuple):
    """Conversations of one day, or of a longer time ago."""

    key: DayKey
    """`week`: one of the seven days before yesterday's end; `month`: the month of `first`."""
    first: date
    """The first day of that time."""
    conversations: list[Listed]


def first_words(prompt: str) -> str | None:
    """The beginning of a prompt as a name: one line of at most NAME_CHARS characters, ended at a word where one ends.
    None: it is blank."""
    line = " ".join(prompt[: 4 * NAME_CHARS].split())
    if len(line) <= NAME_CHARS:
        return line or None
    cut = line[: NAME_CHARS - 1]
    at_word = cut.rpartition(" ")[0]
    return (at_word if len(at_word) >= NAME_CHARS // 2 else cut) + "…"


def by_day(conversations: Iterable[Listed], now: datetime, zone: tzinfo = UTC) -> list[Day]:
    """The conversations in groups, the newest first, by when something last happened in them; `zone` decides where a
    day begins. Within a group they stay in their order."""
    today = now.astimezone(zone).date()
    days: dict[tuple[DayKey, date], Day] = {}
    for one in conversations:
        on = one.last_at.astimezone(zone).date()
        key: tuple[DayKey, date]
        if on >= today:
            key = ("today", today)
        elif on == today - timedelta(days=1):
            key = ("yesterday", on)
        elif on >= today - timedelta(days=7):
            key = ("week", today - timedelta(days=7))
        else:
            key = ("month", on.replace(day=1))
        days.setdefault(key, Day(key[0], key[1], [])).conversations.append(one)
    order = ("today", "yesterday", "week", "month")
    return sorted(days.values(), key=lambda day: (order.index(day.key), -day.first.toordinal()))


def sidebar(connection: Connection, owner_id: int, *, limit: int = IN_SIDEBAR) -> Sidebar:
    """The pinned conversations and the newest of the others, at most `limit` of each."""
    return Sidebar(
        pinned(connection, owner_id, limit), listed(connection, owner_id, Filter(is_pinned=False), limit=limit)
    )


def pinned(connection: Connection, owner_id: int, limit: int) -> list[Listed]:
    """The pinned conversations that are not archived, the last pinned first."""
    ids = connection.execute(_pinned(), {"of_owner": owner_id, "most": limit}).scalars().all()
    return _details(connection, ids, {})


def listed(
    connection: Connection, owner_id: int, which: Filter, *, limit: int, before: int | None = None
) -> list[Listed]:
    """At most `limit` conversations, those with the newest turns first. `before`: only those that come after the one
    with this cursor."""
    hits = search.conversations(connection, owner_id, which.query) if which.query.strip() else None
    if hits is not None and not hits:
        return []
    of = {
        "of_owner": owner_id,
        "of_tag": which.tag,
        "of_source": which.source,
        "of_failed": Status.ERROR.value,
        "those": None if hits is None else list(hits),
        "before": before,
        "most": limit,
        "n_recent": RECENT_TURNS,
    }
    ids: Sequence[int] = []
    # Looking at all takes milliseconds for each thousand of conversations. What is rare is not among the newest.
    is_frequent = hits is None and not any((which.tag, which.is_archived, which.is_pinned, which.status))
    for only_recent in (True, False) if is_frequent else (False,):
        if len(ids) < limit:
            query = _page(
                only_recent,
                which.is_archived,
                which.is_pinned,
                which.tag is not None,
                which.source is not None,
                which.status,
                hits is not None,
                before is not None,
            )
            ids = connection.execute(query, of).scalars().all()
    shown = {} if hits is None else {conversation_id: hits[conversation_id] for conversation_id in ids}
    return _details(connection, ids, search.snippets(connection, which.query, shown))


_is_mine = (ConversationRow.owner_id == bindparam("of_owner"), reads.is_shown)
_newest_turn = (
    select(func.max(TurnRow.id)).where(TurnRow.conversation_id == ConversationRow.id).correlate(ConversationRow)
).scalar_subquery()


@cache
def _pinned() -> Select[Any]:
    return (
        select(ConversationRow.id)
        .where(*_is_mine, ConversationRow.pinned_at.is_not(None), ConversationRow.archived_at.is_(None))
        .order_by(ConversationRow.pinned_at.desc(), ConversationRow.id.desc())
        .limit(bindparam("most"))
    )


@cache
def _page(
    only_recent: bool,
    is_archived: bool | None,
    is_pinned: bool | None,
    has_tag: bool,
    has_source: bool,
    status: str | None,
    is_search: bool,
    has_before: bool,
) -> Select[Any]:
    """Selects ids of conversations. Each combination is built once: that takes longer than to run it."""
    conditions: list[Any] = list(_is_mine)
    for wanted, column in ((is_archived, ConversationRow.archived_at), (is_pinned, ConversationRow.pinned_at)):
        if wanted is not None:
            conditions.append(column.is_not(None) if wanted else column.is_(None))
    if has_tag:
        conditions.append(
            exists().where(
                ConversationTagRow.conversation_id == ConversationRow.id, ConversationTagRow.tag == bindparam("of_tag")
            )
        )
    if has_source:
        conditions.append(ConversationRow.source == bindparam("of_source"))
    if status is not None:
        conditions.append(_has_status(status))
    if is_search:
        conditions.append(ConversationRow.id.in_(bindparam("those", expanding=True)))
    query: Any
    if only_recent:
        newest = select(TurnRow.id, TurnRow.conversation_id).order_by(TurnRow.id.desc()).limit(bindparam("n_recent"))
        if has_before:
            newest = newest.where(TurnRow.id < bindparam("before"))
        recent = newest.subquery("newest_turns")
        key: Any = func.max(recent.c.id)
        query = (
            select(ConversationRow.id, key.label("newest_turn"))
            .join_from(recent, ConversationRow, ConversationRow.id == recent.c.conversation_id)
            .group_by(ConversationRow.id)
        )
    else:
        query = select(ConversationRow.id, _newest_turn.label("newest_turn"))
    if has_before:
        # In both cases: one whose newest turn is not before came on an earlier page.
        later = aliased(TurnRow)
        conditions.append(~exists().where(later.conversation_id == ConversationRow.id, later.id >= bindparam("before")))
    chosen: Select[Any] = query.where(*conditions)
    return chosen.order_by(literal_column("newest_turn").desc()).limit(bindparam("most"))


def _has_status(status: str) -> ColumnElement[bool]:
    """As `Listed.status`: that of the first open job, or else of the newest."""
    if status == Status.ERROR:
        other = aliased(JobRow)
        is_open = other.status.in_([literal_column("'queued'"), literal_column("'processing'")])
        failed = select(JobRow.conversation_id).where(
            JobRow.owner_id == bindparam("of_owner"),
            JobRow.status == bindparam("of_failed"),
            ~exists().where(other.conversation_id == JobRow.conversation_id, or_(other.id > JobRow.id, is_open)),
        )
        return ConversationRow.id.in_(failed)
    first = select(JobRow.conversation_id).where(status_is(Status(status)), JobRow.is_first_in_lane)
    return ConversationRow.id.in_(first)


def _details(connection: Connection, ids: Sequence[int], snippets: dict[int, Snippet]) -> list[Listed]:
    """These conversations, in this order."""
    if not ids:
        return []
    tags: dict[int, list[str]] = {}
    for row in connection.execute(_tags(), {"those": list(ids)}):
        tags.setdefault(row.conversation_id, []).append(row.tag)
    found = {
        row.id: Listed(
            public_id=row.public_id,
            title=row.title,
            first_prompt=_first_above(connection, row.head_turn_id) if row.first_prompt is None else row.first_prompt,
            tags=tuple(tags.get(row.id, ())),
            is_pinned=row.pinned_at is not None,
            is_archived=row.archived_at is not None,
            source=row.source,
            n_turns=row.depth + 1,
            status=row.status,
            last_at=row.last_at,
            snippet=snippets.get(row.id),
            cursor=row.newest_turn,
        )
        for row in connection.execute(_select_details(), {"those": list(ids)})
    }
    return [found[conversation_id] for conversation_id in ids]


def _first_above(connection: Connection, head_turn_id: int) -> str | None:
    """The beginning of the first prompt on the path of a fork that has no prompt of its own."""
    found: str | None = connection.execute(_first_on_path(), {"from_turn": head_turn_id}).scalar()
    return found


@cache
def _first_on_path() -> Select[Any]:
    path = turns.path()
    return (
        select(func.substr(MessageRow.content, 1, MAX_TEXT))
        .join_from(path, MessageRow, MessageRow.turn_id == path.c.id)
        .where(MessageRow.role == literal_column("'user'"))
        .order_by(path.c.depth, MessageRow.position)
        .limit(1)
    )


@cache
def _tags() -> Any:
    return (
        select(ConversationTagRow.conversation_id, ConversationTagRow.tag)
        .where(ConversationTagRow.conversation_id.in_(bindparam("those", expanding=True)))
        .order_by(ConversationTagRow.conversation_id, ConversationTagRow.tag)
    )


@cache
def _select_details() -> Select[Any]:
    newest_job = (
        select(func.max(JobRow.id)).where(JobRow.conversation_id == ConversationRow.id).correlate(ConversationRow)
    ).scalar_subquery()
    open_job, head = aliased(JobRow), aliased(TurnRow)
    status_of_first_open = (
        select(open_job.status)
        .where(
            open_job.conversation_id == ConversationRow.id,
            open_job.status.in_([literal_column("'queued'"), literal_column("'processing'")]),
        )
        .order_by(open_job.id)
        .limit(1)
    ).scalar_subquery()
    return (
        select(
            ConversationRow.id,
            ConversationRow.public_id,
            ConversationRow.title,
            ConversationRow.source,
            ConversationRow.pinned_at,
            ConversationRow.archived_at,
            ConversationRow.head_turn_id,
            head.depth,
            first_prompt(ConversationRow.id, MAX_TEXT).scalar_subquery().label("first_prompt"),
            func.coalesce(status_of_first_open, JobRow.status).label("status"),
            func.coalesce(JobRow.processed_at, JobRow.created_at, ConversationRow.created_at).label("last_at"),
            _newest_turn.label("newest_turn"),
        )
        .join(head, head.id == ConversationRow.head_turn_id)
        .outerjoin(JobRow, JobRow.id == newest_job)
        .where(ConversationRow.id.in_(bindparam("those", expanding=True)))
    )


def conversation(connection: Connection, owner_id: int, public_id: str) -> Listed | None:
    """One conversation, as lists show it. None: no such conversation of this owner."""
    found = connection.execute(select(ConversationRow.id).where(reads.has_public_id(owner_id, public_id))).scalar()
    return None if found is None else _details(connection, [found], {})[0]


def tags(connection: Connection, owner_id: int, limit: int = 200) -> list[str]:
    """The tags that the owner's conversations have, in alphabetical order."""
    return list(
        connection.execute(
            select(ConversationTagRow.tag)
            .distinct()
            .join(ConversationRow, ConversationRow.id == ConversationTagRow.conversation_id)
            .where(ConversationRow.owner_id == owner_id, ConversationRow.deleted_at.is_(None))
            .order_by(ConversationTagRow.tag)
            .limit(limit)
        ).scalars()
    )
