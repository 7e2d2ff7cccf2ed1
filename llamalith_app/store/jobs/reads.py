"""Jobs as people read them: one, a list, places in the queue, attempts.

Reads only; the modules beside this one change a job. Runs in a snapshot of `store/database.py`. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    null,
    select,
    tuple_,
)
from sqlalchemy.orm import aliased

from llamalith_app.contracts.jobs import Attempt, Job, JobBrief, JobError
from llamalith_app.contracts.parameters import Parameters
from llamalith_app.store.tables import (
    AttemptRow,
    ConversationRow,
    JobRow,
    MessageRow,
    Priority,
    Status,
    status_is,
)

_again = aliased(JobRow)
was_tried_again = exists().where(_again.retry_of == JobRow.id)

MAX_PAGE_CHARS = 10_000_000
"""Characters of prompts and replies in one list."""
RANKED = 1000
"""Jobs of a model whose places are told in lists; further back only a single job's place is counted. And open jobs of
conversations that are looked at to tell when one starts that waits for others."""


class Open(NamedTuple):
    """A job that has not ended."""

    id: int
    conversation: int
    model: str
    started_at: datetime | None
    """None: it waits."""


class Queue(NamedTuple):
    """Where some queued jobs stand."""

    positions: dict[int, int]
    """By job id: the place in the queue of its model, 1 is the next."""
    before: list[Open]
    """By conversation, in the order in which they run: what is open there, up to these jobs and beyond."""


def queue(connection: Connection, of_jobs: Mapping[int, str]) -> Queue:
    """Of queued jobs, with their models. Of each model the first RANKED places are told, and that of a single job;
    of conversations where one of them waits for another, the first RANKED jobs together."""
    before = _open_before(connection, of_jobs)
    positions = {}
    if len(of_jobs) > 1 or before:
        positions = _positions(connection, {*of_jobs.values(), *(one.model for one in before)})
    if len(of_jobs) == 1:
        (job_id,) = of_jobs
        if job_id not in positions and (place := _position(connection, job_id)) is not None:
            positions[job_id] = place
    return Queue(positions, before)


def _open_before(connection: Connection, job_ids: Iterable[int]) -> list[Open]:
    behind = select(JobRow.conversation_id).where(
        JobRow.id.in_(list(job_ids)), status_is(Status.QUEUED), ~JobRow.is_head
    )
    rows = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.model, JobRow.started_at, JobRow.status)
        .where(status_is(Status.QUEUED, Status.PROCESSING), JobRow.conversation_id.in_(behind))
        .order_by(JobRow.conversation_id, JobRow.id)
        .limit(RANKED)
    )
    return [
        Open(job_id, conversation, model, started_at if status == Status.PROCESSING else None)
        for job_id, conversation, model, started_at, status in rows
    ]


def _positions(connection: Connection, of_models: set[str]) -> dict[int, int]:
    found = {}
    for model in of_models:
        ids = connection.execute(
            select(JobRow.id)
            .where(status_is(Status.QUEUED), JobRow.model == model)
            .order_by(JobRow.priority, JobRow.id)
            .limit(RANKED)
        ).scalars()
        found.update({job_id: place for place, job_id in enumerate(ids, start=1)})
    return found


def _position(connection: Connection, job_id: int) -> int | None:
    """One queued job's place, however far back."""
    job = connection.execute(
        select(JobRow.model, JobRow.priority).where(status_is(Status.QUEUED), JobRow.id == job_id)
    ).first()
    if job is None:
        return None
    before = connection.execute(
        select(func.count()).where(
            status_is(Status.QUEUED),
            JobRow.model == job.model,
            tuple_(JobRow.priority, JobRow.id) < tuple_(job.priority, job_id),
        )
    ).scalar_one()
    return before + 1


def one(connection: Connection, owner_id: int, job_id: int) -> Job | None:
    row = connection.execute(_one(), {"of_owner": owner_id, "of_job": job_id}).mappings().first()
    return None if row is None else as_job(row)


def attempts(connection: Connection, owner_id: int, job_id: int) -> list[Attempt] | None:
    """Every start of a job, the first first. None: no such job of this owner."""
    if connection.execute(select(JobRow.id).where(JobRow.id == job_id, JobRow.owner_id == owner_id)).first() is None:
        return None
    rows = connection.execute(
        select(
            AttemptRow.attempt,
            AttemptRow.worker_id,
            AttemptRow.started_at,
            AttemptRow.ended_at,
            AttemptRow.outcome,
            AttemptRow.kind,
            AttemptRow.reason,
        )
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.attempt)
    ).mappings()
    return [Attempt(**row) for row in rows]


def some(connection: Connection, job_ids: Iterable[int], max_text: int) -> list[Job]:
    """Whoever owns them: for what a stream asks about jobs that it was let follow."""
    rows = connection.execute(_some(max_text), {"of_jobs": list(job_ids)}).mappings()
    return [as_job(row) for row in rows]


def newest(
    connection: Connection,
    owner_id: int,
    *,
    limit: int,
    status: str | None = None,
    conversation_id: str | None = None,
    before: int | None = None,
    max_text: int | None = None,
) -> list[Job]:
    """An owner's jobs, newest first; `before`: only those with a smaller id; `max_text`: of each text so many
    characters.

    Ends early, though never empty, once its texts come to MAX_PAGE_CHARS.
    """
    query = _newest(as_read(None, max_text), owner_id, limit, status, conversation_id, before)
    return [job for _, job in _within_a_page(connection, query)]


def newest_briefs(
    connection: Connection,
    owner_id: int,
    *,
    limit: int,
    status: str | None = None,
    conversation_id: str | None = None,
    before: int | None = None,
) -> list[JobBrief]:
    """As `newest`, without a look at any text; never ends early."""
    brief = select(*_BRIEF, JobRow.error.label("reason")).join(
        ConversationRow, ConversationRow.id == JobRow.conversation_id
    )
    rows = connection.execute(_newest(brief, owner_id, limit, status, conversation_id, before)).mappings()
    return [JobBrief(**_brief(dict(row))) for row in rows]


def _newest(
    query: Select[Any], owner_id: int, limit: int, status: str | None, conversation_id: str | None, before: int | None
) -> Select[Any]:
    query = query.order_by(JobRow.id.desc()).limit(limit)
    # Not both: SQLite would go through all that the owner has.
    if conversation_id is None:
        query = query.where(JobRow.owner_id == owner_id)
    else:
        query = query.where(JobRow.conversation_id == conversation_of(owner_id, conversation_id))
    if status is not None:
        query = query.where(JobRow.status == status)
    if before is not None:
        query = query.where(JobRow.id < before)
    return query


def n_text_chars(job: Job) -> int:
    return len(job.user_input) + len(job.system_prompt) + len(job.result or "") + len(job.partial or "")


def _within_a_page(connection: Connection, query: Select[Any]) -> Iterator[tuple[RowMapping, Job]]:
    n_chars = 0
    # Row by row: a page of long prompts would otherwise stand in memory before it could be cut.
    with connection.execute(query.execution_options(stream_results=True, max_row_buffer=16)) as rows:
        for row in rows.mappings():
            job = as_job(row)
            yield row, job
            n_chars += n_text_chars(job) + len(row["parameters"] or "") + len(row["unenforced"] or "")
            if n_chars >= MAX_PAGE_CHARS:
                return


_reply = aliased(MessageRow)
_prompt = (
    select(MessageRow.content)
    .where(MessageRow.turn_id == JobRow.turn_id, MessageRow.role == literal_column("'user'"))
    .order_by(MessageRow.position.desc())
    .limit(1)
    .correlate(JobRow)
    .scalar_subquery()
)


def of_turns(
    connection: Connection, owner_id: int, turn_ids: Sequence[int], *, oldest_first: bool = False
) -> dict[int, Job]:
    """The jobs of these turns, by turn, the newest first or the oldest; ends early as `newest`."""
    query = (
        as_read(owner_id)
        .add_columns(JobRow.turn_id)
        .where(JobRow.turn_id.in_(turn_ids))
        .order_by(JobRow.turn_id if oldest_first else JobRow.turn_id.desc())
    )
    return {row["turn_id"]: job for row, job in _within_a_page(connection, query)}


_BRIEF = (
    JobRow.id,
    ConversationRow.public_id.label("conversation_id"),
    JobRow.model,
    JobRow.status,
    JobRow.created_at,
    JobRow.processed_at,
    JobRow.grammar_name,
    JobRow.priority,
    JobRow.attempt,
    JobRow.started_at,
    JobRow.error_kind,
    JobRow.finish_reason,
    JobRow.reply_valid,
    JobRow.prompt_tokens,
    JobRow.prompt_tokens_reused,
    JobRow.completion_tokens,
    JobRow.omitted_messages,
    JobRow.timeout_s,
    JobRow.not_after,
    JobRow.max_attempts,
    JobRow.retry_of,
    select(_again.id).where(_again.retry_of == JobRow.id).scalar_subquery().label("retried_as"),
    case((and_(status_is(Status.QUEUED), JobRow.attempt > 0), JobRow.not_before), else_=null()).label(
        "next_attempt_at"
    ),
)


def as_read(owner_id: int | BindParameter[int] | None, max_text: int | None = None) -> Select[Any]:
    def text(column: Any) -> Any:
        return column if max_text is None else func.substr(column, 1, max_text)

    query = (
        select(
            *_BRIEF,
            func.coalesce(text(_prompt), "").label("user_input"),
            text(JobRow.system_prompt).label("system_prompt"),
            text(case((status_is(Status.ERROR), JobRow.error), else_=_reply.content)).label("result"),
            # Whole or not at all: where texts are cut, nobody reads it.
            (JobRow.parameters if max_text is None else null()).label("parameters"),
            (JobRow.unenforced if max_text is None else null()).label("unenforced"),
            JobRow.reply_problem,
            text(JobRow.partial).label("partial"),
        )
        .join(ConversationRow, ConversationRow.id == JobRow.conversation_id)
        .outerjoin(_reply, and_(_reply.turn_id == JobRow.turn_id, _reply.is_reply))
    )
    return query if owner_id is None else query.where(JobRow.owner_id == owner_id)


@cache
def _one() -> Select[Any]:
    return as_read(bindparam("of_owner")).where(JobRow.id == bindparam("of_job"))


@cache
def _some(max_text: int) -> Select[Any]:
    return as_read(None, max_text).where(JobRow.id.in_(bindparam("of_jobs", expanding=True)))


def as_job(row: RowMapping) -> Job:
    fields: dict[str, Any] = dict(row)
    fields.pop("turn_id", None)
    fields["parameters"] = parameters(fields["parameters"])
    fields["unenforced"] = unenforced(fields["unenforced"])
    return Job(**_brief(fields | {"reason": fields["result"]}))


def _brief(fields: dict[str, Any]) -> dict[str, Any]:
    """From columns to fields, for those that a job without its texts has too."""
    kind, reason, not_after = (fields.pop(column) for column in ("error_kind", "reason", "not_after"))
    return fields | {
        "priority": Priority(fields["priority"]).name.lower(),
        "error": None if kind is None else JobError(kind=kind, reason=reason),
        "queue_timeout_s": None if not_after is None else seconds_between(fields["created_at"], not_after),
    }


def parameters(stored: str | None) -> Parameters | None:
    return None if stored is None else msgspec.json.decode(stored, type=Parameters)


def unenforced(stored: str | None) -> list[str]:
    return [] if stored is None else msgspec.json.decode(stored, type=list[str])


def is_named(owner_id: int, public_id: str) -> ColumnElement[bool]:
    """Whoever asks: an id is stored without blanks before and after it, so those do not count."""
    return and_(ConversationRow.owner_id == owner_id, ConversationRow.public_id == public_id.strip())


def conversation_of(owner_id: int, public_id: str) -> Any:
    return select(ConversationRow.id).where(is_named(owner_id, public_id)).scalar_subquery()


def seconds_between(start: datetime, end: datetime) -> float:
    return round((end - start).total_seconds(), 6)
