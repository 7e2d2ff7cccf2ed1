"""Jobs over HTTP: make one, list them, read one."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from llamalith_app.contracts import parameters
from llamalith_app.contracts.jobs import Job, JobAccepted, JobCreate, JobList
from llamalith_app.controllers.request import AppRequest
from llamalith_app.errors import NotFound
from llamalith_app.store import jobs

MAX_ID = 2**63 - 1


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
    async def one(self, request: AppRequest, job_id: Annotated[int, PathParameter(ge=1, le=MAX_ID)]) -> Job:
        job = await request.parts.database.read(jobs.one, request.principal.user_id, job_id)
        if job is None:
            raise NotFound("Job not found")
        await request.parts.live.add([job])
        return job
