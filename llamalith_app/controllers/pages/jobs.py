"""The list of jobs and what its buttons do: cancel one, cancel all queued ones, try one again."""

from __future__ import annotations

from typing import Annotated, Literal

from litestar import Controller, get, post
from litestar.params import FromQuery, QueryParameter
from litestar.response import Redirect, Template

from llamalith_app.contracts.jobs import MAX_ID, Job, StatusWord
from llamalith_app.controllers.jobs import JobIdInPath
from llamalith_app.controllers.models import engines
from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.controllers.pages.redirects import referring_page, see_other
from llamalith_app.errors import NotFound
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import Status
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest

NEWEST_ON_DASHBOARD = 10
JOBS_ON_PAGE = 50

StatusFilter = StatusWord | Literal[""]
Limit = Annotated[int, QueryParameter(ge=1, le=JOBS_ON_PAGE)]
BeforeJob = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)]


class JobsPage(Controller):
    path = "/jobs"
    include_in_schema = False

    @get(opt=PAGE)
    async def jobs(
        self, request: AppRequest, status: FromQuery[StatusFilter] = "", before: BeforeJob = None
    ) -> Template:
        jobs = await newest_jobs(request, status, JOBS_ON_PAGE, before)
        return page(request, "jobs", jobs=jobs, statuses=list(Status), status=status, before=before, limit=JOBS_ON_PAGE)

    @get("/rows", opt=BACKGROUND_PAGE)
    async def rows(
        self,
        request: AppRequest,
        status: FromQuery[StatusFilter] = "",
        before: BeforeJob = None,
        limit: Limit = JOBS_ON_PAGE,
    ) -> Template:
        """The list alone, for the script that polls it; the dashboard's also shows the engines."""
        jobs = await newest_jobs(request, status, limit, before)
        shown = await engines(request.parts) if limit == NEWEST_ON_DASHBOARD else []
        return page(request, "_rows", jobs=jobs, engines=shown, status=status, before=before, limit=limit)

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

    @post("/cancel", opt=PAGE, status_code=303)
    async def cancel_queued(self, request: AppRequest) -> Redirect:
        await request.parts.cancellations.cancel_matching(request.principal.user_id, {Status.QUEUED})
        return see_other("/chat/jobs?status=queued")


async def newest_jobs(request: AppRequest, status: str, limit: int, before: int | None) -> list[Job]:
    """At most `limit` jobs, newest first, with their live progress; an empty `status` means any."""
    jobs = await request.parts.database.read(
        reads.newest,
        request.principal.user_id,
        limit=limit,
        status=status or None,
        before=before,
        max_text=EXCERPT_CHARS,
    )
    await request.parts.live.add(jobs)
    return jobs
