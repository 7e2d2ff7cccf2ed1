"""Reads jobs as clients see them: one job, lists, places in the queue, attempts.

Writes nothing. Runs in a snapshot of `store/database.py`. Knows no HTTP.
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
    or_,
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
    Source,
    Status,
    status_is,
)

_retry = aliased(JobRow)
_TIMES = (AttemptRow.loaded_at, AttemptRow.prompt_read_at, AttemptRow.first_token_at)
is_kept = ConversationRow.deleted_at.is_(None)
is_shown = and_(
    is_kept, or_(ConversationRow.source.is_(None), ConversationRow.source != literal_column(f"'{Source.TITLE}'"))
)
"""Neither deleted nor made by the product for itself."""
is_listed = JobRow.conversation_id.not_in(
    select(ConversationRow.id)
    .where(ConversationRow.deleted_at.is_not(None))
    .union_all(
        select(ConversationRow.id).where(
            ConversationRow.source == literal_column(f"'{Source.TITLE}'"), ConversationRow.title_by.is_(None)
        )
    )
)
"""The same of a job, for queries without its conversation. There are few conversations of either kind at any time."""
was_retried = exists().where(_retry.retry_of == JobRow.id)

MAX_PAGE_CHARS = 10_000_000
"""The most characters of texts in one list; the job that exceeds it is the last."""
MAX_RANKED = 1000
"""Jobs of each model whose places are read for a list; beyond them only a single job's place is counted. Also the limit
of open jobs that are read of the conversations in which a job waits for others."""


class OpenJob(NamedTuple):
    """A job that has not ended."""

    id: int
    conversation: int
    model: str
    started_at: datetime | None
    """None: it waits."""


class QueuePlaces(NamedTuple):
    """The places of some queued jobs."""

    positions: dict[int, int]
    """By job id: the place in the queue of its model, 1 is the next."""
    before: list[OpenJob]
    """The open jobs of those conversations in which one of them waits for another job; by conversation, in the order in
    which they run."""


def queue_places(connection: Connection, of_jobs: Mapping[int, str]) -> QueuePlaces:
    """The places of queued jobs, given as job id -> model. Only the first MAX_RANKED places of each model are returned,
    and that of a single job at any place. `before` has at most MAX_RANKED jobs in all."""
    before = _open_jobs_around(connection, of_jobs)
    positions = {}
    if len(of_jobs) > 1 or before:
        positions = _positions(connection, {*of_jobs.values(), *(job.model for job in before)})
    if len(of_jobs) == 1:
        (job_id,) = of_jobs
        if job_id not in positions and (place := _position(connection, job_id)) is not None:
            positions[job_id] = place
    return QueuePlaces(positions, before)


def _open_jobs_around(connection: Connection, job_ids: Iterable[int]) -> list[OpenJob]:
    behind = select(JobRow.conversation_id).where(
        JobRow.id.in_(list(job_ids)), status_is(Status.QUEUED), ~JobRow.is_first_in_lane
    )
    rows = connection.execute(
        select(JobRow.id, JobRow.conversation_id, JobRow.model, JobRow.started_at, JobRow.status)
        .where(status_is(Status.QUEUED, Status.PROCESSING), JobRow.conversation_id.in_(behind))
        .order_by(JobRow.conversation_id, JobRow.id)
        .limit(MAX_RANKED)
    )
    return [
        OpenJob(job_id, conversation, model, started_at if status == Status.PROCESSING else None)
        for job_id, conversation, model, started_at, status in rows
    ]


def _positions(connection: Connection, of_models: set[str]) -> dict[int, int]:
    found = {}
    for model in of_models:
        ids = connection.execute(
            select(JobRow.id)
            .where(status_is(Status.QUEUED), JobRow.model == model)
            .order_by(JobRow.priority, JobRow.id)
            .limit(MAX_RANKED)
        ).scalars()
        found.update({job_id: place for place, job_id in enumerate(ids, start=1)})
    return found


def _position(connection: Connection, job_id: int) -> int | None:
    """The place of one queued job in the queue of its model, 1 is the next. None: it is not queued."""
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


def job_by_id(connection: Connection, owner_id: int, job_id: int, *, or_deleted: bool = False) -> Job | None:
    """One job with all texts. None: no such job of this owner; with `or_deleted` one of a deleted conversation counts,
    too."""
    row = connection.execute(_select_by_id(or_deleted), {"of_owner": owner_id, "of_job": job_id}).mappings().first()
    return None if row is None else job_from_row(row)


def attempts(connection: Connection, owner_id: int, job_id: int) -> list[Attempt] | None:
    """All attempts of a job, oldest first. None: no such job of this owner."""
    mine = (
        select(JobRow.id)
        .join(ConversationRow, ConversationRow.id == JobRow.conversation_id)
        .where(JobRow.id == job_id, JobRow.owner_id == owner_id, is_kept)
    )
    if connection.execute(mine).first() is None:
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
            *_TIMES,
        )
        .where(AttemptRow.job_id == job_id)
        .order_by(AttemptRow.attempt)
    ).mappings()
    return [Attempt(**row) for row in rows]


def jobs_by_id(connection: Connection, job_ids: Iterable[int], max_text: int) -> list[Job]:
    """The jobs with these ids, whoever owns them; the caller checks access. `max_text`: characters of each text."""
    rows = connection.execute(_select_by_ids(max_text), {"of_jobs": list(job_ids)}).mappings()
    return [job_from_row(row) for row in rows]


def newest(
    connection: Connection,
    owner_id: int,
    *,
    limit: int,
    status: str | None = None,
    conversation_id: str | None = None,
    source: str | None = None,
    before: int | None = None,
    max_text: int | None = None,
) -> list[Job]:
    """An owner's jobs, newest first. `before`: only jobs with a smaller id. `source`: of their conversation, a value of
    Source. `max_text`: characters of each text.

    The list ends before `limit` once its texts reach MAX_PAGE_CHARS, but has at least one job where one matches.
    """
    of = _page_parameters(owner_id, limit, status, conversation_id, source, before)
    return [job for _, job in _jobs_of_a_page(connection, _select_newest(max_text, frozenset(of)), of)]


def newest_briefs(
    connection: Connection,
    owner_id: int,
    *,
    limit: int,
    status: str | None = None,
    conversation_id: str | None = None,
    source: str | None = None,
    before: int | None = None,
) -> list[JobBrief]:
    """As `newest`, without texts, so it never ends before `limit`."""
    of = _page_parameters(owner_id, limit, status, conversation_id, source, before)
    rows = connection.execute(_select_newest_briefs(frozenset(of)), of).mappings()
    return [JobBrief(**_brief(dict(row))) for row in rows]


def _page_parameters(
    owner_id: int, limit: int, status: str | None, conversation_id: str | None, source: str | None, before: int | None
) -> dict[str, Any]:
    """Without those that are None: they filter nothing."""
    of = {
        "of_owner": owner_id,
        "most": limit,
        "of_status": status,
        "of_public_id": None if conversation_id is None else conversation_id.strip(),
        "of_source": source,
        "before_job": before,
    }
    return {name: value for name, value in of.items() if value is not None}


def _newest(query: Select[Any], given: frozenset[str]) -> Select[Any]:
    """`given`: the names of the parameters that it will be executed with."""
    query = query.order_by(JobRow.id.desc()).limit(bindparam("most"))
    owner_id: BindParameter[int] = bindparam("of_owner")
    # Not both conditions: SQLite would scan all jobs of the owner.
    if "of_public_id" not in given:
        query = query.where(JobRow.owner_id == owner_id, is_shown)
    else:
        query = query.where(JobRow.conversation_id == conversation_id_of(owner_id, bindparam("of_public_id")))
    if "of_status" in given:
        query = query.where(JobRow.status == bindparam("of_status"))
    if "of_source" in given:
        query = query.where(ConversationRow.source == bindparam("of_source"))
    if "before_job" in given:
        query = query.where(JobRow.id < bindparam("before_job"))
    return query


def n_text_chars(job: Job) -> int:
    texts = (job.user_input, job.system_prompt, job.result, job.partial, job.thinking)
    return sum(len(text) for text in texts if text is not None)


def _jobs_of_a_page(
    connection: Connection, query: Select[Any], parameters: Mapping[str, Any]
) -> Iterator[tuple[RowMapping, Job]]:
    n_chars = 0
    # Row by row, so that a page of long prompts is never in memory as a whole.
    options = {"stream_results": True, "max_row_buffer": 16}
    with connection.execute(query, parameters, execution_options=options) as rows:
        for row in rows.mappings():
            job = job_from_row(row)
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


def jobs_by_turn(connection: Connection, turn_ids: Sequence[int], *, oldest_first: bool = False) -> dict[int, Job]:
    """The jobs of these turns by turn id, newest first unless `oldest_first`. Ends early, as `newest` does.

    Whoever owns them; the caller checks access.
    """
    query = _select_by_turns(oldest_first)
    return {job.turn_id: job for _, job in _jobs_of_a_page(connection, query, {"of_turns": turn_ids})}


_BRIEF = (
    JobRow.id,
    ConversationRow.public_id.label("conversation_id"),
    JobRow.turn_id,
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
    JobRow.thinking_tokens,
    JobRow.omitted_messages,
    JobRow.timeout_s,
    JobRow.not_after,
    JobRow.max_attempts,
    JobRow.retry_of,
    select(_retry.id).where(_retry.retry_of == JobRow.id).scalar_subquery().label("retried_as"),
    case((and_(status_is(Status.QUEUED), JobRow.attempt > 0), JobRow.not_before), else_=null()).label(
        "next_attempt_at"
    ),
)


def select_jobs(owner_id: int | BindParameter[int] | None, max_text: int | None = None) -> Select[Any]:
    """A query for rows that `job_from_row` takes: of this owner's conversations that are not deleted, or of all where
    `owner_id` is None. `max_text` cuts each text."""

    def text(column: Any) -> Any:
        return column if max_text is None else func.substr(column, 1, max_text)

    query = (
        select(
            *_BRIEF,
            func.coalesce(text(_prompt), "").label("user_input"),
            text(JobRow.system_prompt).label("system_prompt"),
            text(case((status_is(Status.ERROR), JobRow.error), else_=_reply.content)).label("result"),
            # JSON cannot be cut, and callers that cut texts do not use it.
            (JobRow.parameters if max_text is None else null()).label("parameters"),
            (JobRow.unenforced if max_text is None else null()).label("unenforced"),
            JobRow.reply_problem,
            text(JobRow.partial).label("partial"),
            text(func.coalesce(_reply.thinking, JobRow.partial_thinking)).label("thinking"),
            _reply.thinking_s,
            *_TIMES,
        )
        .join(ConversationRow, ConversationRow.id == JobRow.conversation_id)
        .outerjoin(_reply, and_(_reply.turn_id == JobRow.turn_id, _reply.is_reply))
        .outerjoin(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
    )
    return query if owner_id is None else query.where(JobRow.owner_id == owner_id, is_kept)


@cache
def _select_by_id(or_deleted: bool) -> Select[Any]:
    owner_id: BindParameter[int] = bindparam("of_owner")
    mine = select_jobs(None).where(JobRow.owner_id == owner_id) if or_deleted else select_jobs(owner_id)
    return mine.where(JobRow.id == bindparam("of_job"))


@cache
def _select_by_ids(max_text: int) -> Select[Any]:
    return select_jobs(None, max_text).where(JobRow.id.in_(bindparam("of_jobs", expanding=True)))


@cache
def _select_by_turns(oldest_first: bool) -> Select[Any]:
    # No condition on the owner: for more than a few turns, SQLite would scan all jobs of the owner.
    return (
        select_jobs(None)
        .where(JobRow.turn_id.in_(bindparam("of_turns", expanding=True)))
        .order_by(JobRow.turn_id if oldest_first else JobRow.turn_id.desc())
    )


@cache
def _select_newest(max_text: int | None, given: frozenset[str]) -> Select[Any]:
    return _newest(select_jobs(None, max_text), given)


@cache
def _select_newest_briefs(given: frozenset[str]) -> Select[Any]:
    brief = select(*_BRIEF, JobRow.error.label("reason"))
    return _newest(brief.join(ConversationRow, ConversationRow.id == JobRow.conversation_id), given)


def job_from_row(row: RowMapping) -> Job:
    fields: dict[str, Any] = dict(row)
    fields["parameters"] = decode_parameters(fields["parameters"])
    fields["unenforced"] = decode_unenforced(fields["unenforced"])
    fields["reason"] = fields["result"]
    return Job(**_brief(fields))


def _brief(fields: dict[str, Any]) -> dict[str, Any]:
    """Makes columns into fields of JobBrief, in place."""
    kind, reason, not_after = fields.pop("error_kind"), fields.pop("reason"), fields.pop("not_after")
    fields["priority"] = Priority(fields["priority"]).name.lower()
    fields["error"] = None if kind is None else JobError(kind=kind, reason=reason)
    fields["queue_timeout_s"] = None if not_after is None else seconds_between(fields["created_at"], not_after)
    return fields


def decode_parameters(stored: str | None) -> Parameters | None:
    return None if stored is None else msgspec.json.decode(stored, type=Parameters)


def decode_unenforced(stored: str | None) -> list[str]:
    return [] if stored is None else msgspec.json.decode(stored, type=list[str])


def has_public_id(owner_id: int | BindParameter[int], public_id: str | BindParameter[str]) -> ColumnElement[bool]:
    """The conversation of that owner and public id, unless it is deleted. Ids are stored trimmed, so blanks around the
    given one do not count; a parameter's value is to be trimmed by the caller."""
    name = public_id.strip() if isinstance(public_id, str) else public_id
    return and_(ConversationRow.owner_id == owner_id, ConversationRow.public_id == name, is_kept)


def conversation_id_of(owner_id: int | BindParameter[int], public_id: str | BindParameter[str]) -> Any:
    return select(ConversationRow.id).where(has_public_id(owner_id, public_id)).scalar_subquery()


def seconds_between(start: datetime, end: datetime) -> float:
    return round((end - start).total_seconds(), 6)
