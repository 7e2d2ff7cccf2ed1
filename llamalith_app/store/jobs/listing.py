"""Reads jobs by filters that combine: status, model, class, source, time and text.

Only owner, status and id stand in an index. All else is looked for in the newest jobs of a window, so that a read takes
about as long in a large record as in a small one; who gets fewer jobs than asked for goes on where the window ended.
Times become ids first, because ids rise with the time. Writes nothing. Runs in a snapshot of `store/database.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, bindparam, exists, func, or_, select

from llamalith_app.contracts.jobs import Job
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import ConversationRow, JobRow, MessageRow, Status

WINDOW_JOBS = 10_000
"""Jobs that one search goes through, by the columns of their rows."""
WINDOW_TEXTS = 2000
"""The same where their texts are read too."""
SEARCHED_CHARS = 2000
"""Of a prompt, from its beginning: a million characters in each of two thousand jobs would take seconds."""
MAX_COUNTED = 2000
"""Counts end here, and say that there are more."""
MAX_COUNTED_TEXTS = 300
"""The same where texts are read."""
MAX_ID_DIGITS = 15


_NEXT_BY_ID = select(JobRow.id, JobRow.created_at).where(JobRow.id >= bindparam("from_id")).order_by(JobRow.id).limit(1)


class JobFilter(NamedTuple):
    """What a job must be. None: anything."""

    status: str | None = None
    model: str | None = None
    priority: int | None = None
    text: str | None = None
    """Stands at the beginning of its prompt or in the reason of its error, in any case; or it is its number."""
    since: datetime | None = None
    until: datetime | None = None
    """Accepted before this."""
    source: str | None = None
    """Where its conversation was made; a value of Source."""

    @property
    def needs_rows(self) -> bool:
        """Whether an index alone cannot tell which jobs match."""
        return any(wanted is not None for wanted in (self.model, self.priority, self.text, self.source))


class Found(NamedTuple):
    """The ids of one search, newest first."""

    ids: list[int]
    older: int | None
    """There may be more: search on before this id. None: there are none."""


class Count(NamedTuple):
    n: int
    is_more: bool
    """There are at least `n`."""


def search(
    connection: Connection,
    owner_id: int,
    wanted: JobFilter,
    *,
    limit: int,
    before: int | None = None,
    also: Sequence[ColumnElement[bool]] = (),
) -> Found:
    """At most `limit` ids of the owner's jobs that match and have a smaller id than `before`, out of one window.
    `also`: further conditions on JobRow."""
    window = _window(connection, owner_id, wanted, before, WINDOW_JOBS if wanted.text is None else WINDOW_TEXTS)
    matching = [*_conditions(wanted), *also]
    if not matching:
        # The window would be read whole.
        ids = list(connection.execute(window.query.limit(limit + 1)).scalars())
        return Found(ids[:limit], ids[limit - 1] if len(ids) > limit else None)
    inner = window.query.limit(window.size).subquery("searched")
    ids = list(
        connection.execute(
            select(JobRow.id)
            .where(JobRow.id.in_(select(inner.c.id)), *matching)
            .order_by(JobRow.id.desc())
            .limit(limit + 1)
        ).scalars()
    )
    if len(ids) > limit:
        return Found(ids[:limit], ids[limit - 1])
    last, n_seen = connection.execute(select(func.min(inner.c.id), func.count())).one()
    return Found(ids, last if n_seen == window.size else None)


def count_by_status(connection: Connection, owner_id: int, wanted: JobFilter) -> dict[Status, Count]:
    """How many jobs of each status match the rest of the filter, each counted up to a limit."""
    return {status: _count(connection, owner_id, wanted._replace(status=status.value)) for status in Status}


def _count(connection: Connection, owner_id: int, wanted: JobFilter) -> Count:
    window = _window(connection, owner_id, wanted, None, MAX_COUNTED if wanted.text is None else MAX_COUNTED_TEXTS)
    inner = window.query.limit(window.size).subquery("searched")
    n_seen = connection.execute(select(func.count()).select_from(inner)).scalar_one()
    if not wanted.needs_rows:
        return Count(n_seen, n_seen == window.size)
    n_found = connection.execute(
        select(func.count()).where(JobRow.id.in_(select(inner.c.id)), *_conditions(wanted))
    ).scalar_one()
    return Count(n_found, n_seen == window.size)


def newest_id(connection: Connection, owner_id: int) -> int:
    """Of the owner's jobs; 0: there is none."""
    return connection.execute(select(func.max(JobRow.id)).where(JobRow.owner_id == owner_id)).scalar() or 0


def excerpts(connection: Connection, owner_id: int, job_ids: Collection[int], max_text: int) -> list[Job]:
    """These jobs of the owner, newest first. `max_text`: characters of each text."""
    rows = connection.execute(
        reads.select_jobs(owner_id, max_text).where(JobRow.id.in_(list(job_ids))).order_by(JobRow.id.desc())
    ).mappings()
    return [reads.job_from_row(row) for row in rows]


class _Window(NamedTuple):
    query: Any
    """Selects the ids of the jobs to look through, newest first, without a limit."""
    size: int


def _window(connection: Connection, owner_id: int, wanted: JobFilter, before: int | None, size: int) -> _Window:
    query = select(JobRow.id).where(JobRow.owner_id == owner_id, reads.is_listed).order_by(JobRow.id.desc())
    if wanted.status is not None:
        query = query.where(JobRow.status == wanted.status)
    if wanted.since is not None:
        query = query.where(JobRow.id >= _first_id_from(connection, wanted.since))
    if wanted.until is not None:
        first_after = _first_id_from(connection, wanted.until)
        before = first_after if before is None else min(before, first_after)
    if before is not None:
        query = query.where(JobRow.id < before)
    return _Window(query, size)


def _first_id_from(connection: Connection, moment: datetime) -> int:
    """The smallest id from which on jobs were accepted at that moment or later; one more than any, if none was.

    A binary search by the primary key. Where the clock was set back, some jobs count as of the other side.
    """
    low, high = 1, (connection.execute(select(func.max(JobRow.id))).scalar() or 0) + 1
    while low < high:
        middle = (low + high) // 2
        found = connection.execute(_NEXT_BY_ID, {"from_id": middle}).first()
        if found is None or found.created_at >= moment:
            high = middle
        else:
            low = found.id + 1
    return low


def _conditions(wanted: JobFilter) -> list[ColumnElement[bool]]:
    """Those that the window does not apply."""
    conditions: list[ColumnElement[bool]] = []
    if wanted.model is not None:
        conditions.append(JobRow.model == wanted.model)
    if wanted.priority is not None:
        conditions.append(JobRow.priority == wanted.priority)
    if wanted.source is not None:
        # By the key of each job's conversation: for a list of them SQLite would read all conversations.
        conditions.append(
            exists().where(ConversationRow.id == JobRow.conversation_id, ConversationRow.source == wanted.source)
        )
    if wanted.text is not None:
        conditions.append(_has_text(wanted.text))
    return conditions


def _has_text(text: str) -> ColumnElement[bool]:
    prompts = select(MessageRow.turn_id).where(
        MessageRow.turn_id == JobRow.turn_id,
        MessageRow.role == "user",
        func.substr(MessageRow.content, 1, SEARCHED_CHARS).icontains(text, autoescape=True),
    )
    places = [prompts.exists(), JobRow.error.icontains(text, autoescape=True)]
    number = text.removeprefix("#")
    if number.isascii() and number.isdigit() and len(number) <= MAX_ID_DIGITS:
        places.append(JobRow.id == int(number))
    return or_(*places)
