"""Jobs over HTTP: make one, list them, read one, cancel one or many."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from llamalith_app.contracts import parameters
from llamalith_app.contracts.jobs import Cancelled, Job, JobAccepted, JobCreate, JobList, OpenWord
from llamalith_app.controllers.request import AppRequest
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.store import jobs
from llamalith_app.store.tables import Status

MAX_ID = 2**63 - 1
JobIdInPath = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
FILTERS = ("status", "conversation_id", "model")
"""Of the jobs to cancel."""


class Jobs(Controller):
    path = "/jobs"
    tags = ("Jobs",)

    @post(status_code=200, summary="Queue a prompt")
    async def make(self, request: AppRequest, data: JSONBody[JobCreate]) -> JobAccepted:
        """Answered 200, it is on disk and will get exactly one answer."""
        return await request.parts.submissions.submit(
            request.principal.user_id,
            request.id,
            content=data.content,
            conversation_id=data.conversation_id,
            model=data.model,
            system_prompt=data.system_prompt,
            assistant_context=data.assistant_context,
            grammar_name=data.grammar_name,
            priority=data.priority,
            parameters=parameters.said(data),
            timeout_s=data.timeout_s,
            queue_timeout_s=data.queue_timeout_s,
        )

    @get(summary="List jobs, newest first")
    async def newest(
        self,
        request: AppRequest,
        status: Annotated[str | None, QueryParameter(description="Only jobs in this state.")] = None,
        conversation_id: Annotated[str | None, QueryParameter(description="Only of this conversation.")] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=500)] = 100,
        before: Annotated[
            int | None,
            QueryParameter(ge=1, le=MAX_ID, description="Only jobs with a smaller id: the next page."),
        ] = None,
    ) -> JobList:
        found = await request.parts.database.read(
            jobs.newest,
            request.principal.user_id,
            limit=limit,
            status=status or None,
            conversation_id=conversation_id or None,
            before=before,
        )
        await request.parts.live.add(found)
        return JobList(jobs=found)

    @get("/{job_id:str}", summary="Read a job")
    async def one(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        return await _read(request, job_id)

    @post("/{job_id:str}/cancel", status_code=200, summary="Cancel a job")
    async def cancel(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        """Answers with the job in the state that won: cancelled for good, or the end that came before. What was
        written until then stands in `partial` soon after; a reply is not stored."""
        return await _cancel(request, job_id)

    @delete("/{job_id:str}", status_code=200, summary="Cancel a job, by another verb")
    async def delete(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        """The same as `POST …/cancel`: its record stays."""
        return await _cancel(request, job_id)

    @post("/cancel", status_code=200, summary="Cancel all jobs that match")
    async def cancel_matching(
        self,
        request: AppRequest,
        status: Annotated[
            list[OpenWord],
            QueryParameter(min_items=1, max_items=2, description="`queued`, `processing`, or each once."),
        ],
        conversation_id: Annotated[
            str | None, QueryParameter(min_length=1, max_length=200, description="Only of this conversation.")
        ] = None,
        model: Annotated[str | None, QueryParameter(min_length=1, max_length=200, description="Only for this.")] = None,
    ) -> Cancelled:
        """A filter that is not known, or is empty, is refused: it would cancel more than was meant."""
        if unknown := sorted(set(request.query_params) - set(FILTERS)):
            raise BadInput(f"{unknown[0][:80]}: unknown filter; these exist: {', '.join(FILTERS)}")
        n_cancelled = await request.parts.cancellations.matching(
            request.principal.user_id,
            {Status(word) for word in status},
            conversation_id=conversation_id,
            model=model,
        )
        return Cancelled(ok=True, cancelled=n_cancelled)


async def _read(request: AppRequest, job_id: int) -> Job:
    job = await request.parts.database.read(jobs.one, request.principal.user_id, job_id)
    if job is None:
        raise NotFound("Job not found")
    await request.parts.live.add([job])
    return job


async def _cancel(request: AppRequest, job_id: int) -> Job:
    if await request.parts.cancellations.one(request.principal.user_id, job_id) is None:
        raise NotFound("Job not found")
    return await _read(request, job_id)
