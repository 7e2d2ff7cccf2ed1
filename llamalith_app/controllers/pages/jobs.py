"""The table of jobs, its filters, and what is done with one of its jobs or with all that match."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Annotated, Any, NamedTuple

import msgspec
from litestar import Controller, get, post
from litestar.params import QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import BulkDone, BulkForm, JobsFilter, PriorityForm
from llamalith_app.contracts.jobs import MAX_ID, Job
from llamalith_app.controllers.jobs import JobIdInPath, change_priority
from llamalith_app.controllers.pages import EXCERPT_CHARS, SOURCES
from llamalith_app.controllers.pages.query import query_fields
from llamalith_app.controllers.pages.redirects import referring_page, see_other
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.jobs.bulk import BulkAction
from llamalith_app.store.jobs import listing
from llamalith_app.store.jobs.listing import Count, JobFilter
from llamalith_app.store.tables import Priority, Status
from llamalith_app.web.html import page, query
from llamalith_app.web.request import AppRequest
from llamalith_app.web.zone import zone_of

JOBS_ON_PAGE = 50
AGES = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30)}

BeforeJob = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)]


class JobsPage(Controller):
    path = "/jobs"
    include_in_schema = False

    @get(opt=PAGE)
    async def jobs(self, request: AppRequest, before: BeforeJob = None) -> Template:
        return await _render(request, "jobs", before, done=query_fields(request, BulkDone))

    @get("/rows", opt=BACKGROUND_PAGE)
    async def rows(self, request: AppRequest, before: BeforeJob = None) -> Template:
        """The table alone, for the script that polls it."""
        return await _render(request, "_jobs", before)

    @post("/{job_id:str}/cancel", opt=PAGE, status_code=303)
    async def cancel(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        if await request.parts.cancellations.cancel_job(request.principal.user_id, job_id) is None:
            raise NotFound("There is no such job.")
        return see_other(f"{referring_page(request)}#job-{job_id}")

    @post("/{job_id:str}/retry", opt=PAGE, status_code=303)
    async def retry(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        """Back to the page of the button, at the new job. A job that was tried again before leads to that one."""
        again = await request.parts.submissions.retry(request.principal, request.id, job_id)
        return see_other(f"{referring_page(request)}#job-{again.job_id}")

    @post("/{job_id:str}/priority", opt=PAGE, status_code=303)
    async def change_class(self, request: AppRequest, job_id: JobIdInPath) -> Redirect:
        form = await request.form_as(PriorityForm)
        await change_priority(request, job_id, form.priority)
        return see_other(f"{referring_page(request)}#job-{job_id}")

    @get("/bulk", opt=PAGE)
    async def ask_about_all(self, request: AppRequest) -> Template:
        """How many jobs an action on all that match concerns, before it is done."""
        form = query_fields(request, BulkForm)
        newest = await request.parts.database.read(listing.newest_id, request.principal.user_id)
        form = msgspec.structs.replace(form, newest=str(newest))
        action = _action(form, zone_of(request))
        concerned = await request.parts.bulk.count(request.principal.user_id, action)
        fields = msgspec.structs.asdict(form)
        return page(
            request,
            "bulk",
            form=form,
            fields=fields,
            concerned=concerned,
            back=_address(form),
            is_filtered=bool(_query(form)),
        )

    @post("/bulk", opt=PAGE, status_code=303)
    async def act_on_all(self, request: AppRequest) -> Redirect:
        form = await request.form_as(BulkForm)
        done = await request.parts.bulk.run(request.principal, request.id, _action(form, zone_of(request)))
        outcome = {"did": form.action, "n": done.n_jobs, "more": "1" if done.is_more else ""}
        return see_other(f"/chat/jobs?{query(_filter_fields(form) | outcome)}")


class _Table(NamedTuple):
    jobs: list[Job]
    counts: dict[Status, Count]
    older: int | None


async def _render(request: AppRequest, template: str, before: int | None, **context: Any) -> Template:
    form = query_fields(request, JobsFilter)
    owner_id, database = request.principal.user_id, request.parts.database
    wanted = job_filter(form, zone_of(request))

    def read(connection: Any) -> _Table:
        found = listing.search(connection, owner_id, wanted, limit=JOBS_ON_PAGE, before=before)
        jobs = listing.excerpts(connection, owner_id, found.ids, EXCERPT_CHARS)
        return _Table(jobs, listing.count_by_status(connection, owner_id, wanted), found.older)

    table = await database.read(read)
    await request.parts.live.add(table.jobs)
    fields = _filter_fields(form)
    return page(
        request,
        template,
        jobs=table.jobs,
        counts=table.counts,
        older=table.older,
        before=before,
        form=form,
        fields=fields,
        is_filtered=any(value for name, value in fields.items() if name != "status"),
        statuses=list(Status),
        priorities=[priority.name.lower() for priority in Priority],
        models=request.parts.models,
        sources=SOURCES,
        zone=zone_of(request),
        **context,
    )


def job_filter(form: JobsFilter, zone: tzinfo) -> JobFilter:
    """What the form asks for, now; `zone` decides where its days begin. Raises BadInput."""
    since = _day("since", form.since, zone)
    if form.age:
        within = datetime.now(UTC) - AGES[form.age]
        since = within if since is None else max(since, within)
    return JobFilter(
        status=form.status or None,
        model=form.model or None,
        priority=Priority[form.priority.upper()].value if form.priority else None,
        text=form.q.strip() or None,
        since=since,
        until=_day("until", form.until, zone, further=1),
        source=form.source or None,
    )


def _day(name: str, text: str, zone: tzinfo, *, further: int = 0) -> datetime | None:
    """When the day so many days further begins."""
    if not text:
        return None
    try:
        # Some days from the ends of time, so that a day more is one too.
        day = max(date.fromisoformat(text), date(2, 1, 1))
        if day.year == 9999:
            return None
        return datetime.combine(day + timedelta(days=further), time.min, zone).astimezone(UTC)
    except ValueError:
        raise BadInput(f"{name}: there is no such day; expected one such as 2026-11-30") from None


def _action(form: BulkForm, zone: tzinfo) -> BulkAction:
    if form.action == "priority" and not form.to:
        raise BadInput("to: expected one of interactive, normal, batch")
    to = Priority[form.to.upper()].value if form.to else None
    return BulkAction(form.action, job_filter(form, zone), int(form.newest), to)


def _filter_fields(form: JobsFilter) -> dict[str, Any]:
    return {name: getattr(form, name) for name in JobsFilter.__struct_fields__}


def _query(form: JobsFilter) -> str:
    return query(_filter_fields(form))


def _address(form: JobsFilter) -> str:
    asked = _query(form)
    return f"/chat/jobs?{asked}" if asked else "/chat/jobs"
