"""Jobs over HTTP: submit one, list them, read one, cancel or retry one or many."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Controller, delete, get, patch, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from llamalith_app.contracts.conversation_list import SourceWord
from llamalith_app.contracts.jobs import (
    MAX_ID,
    AttemptList,
    Cancelled,
    CompareAccepted,
    Job,
    JobAccepted,
    JobBriefList,
    JobChange,
    JobCompare,
    JobCreate,
    JobList,
    OpenWord,
    PriorityWord,
    Retried,
    RetryableWord,
)
from llamalith_app.contracts.text import MAX_NAME, id_text
from llamalith_app.errors import BadInput, NotFound, NotNow, NotQueued
from llamalith_app.store.jobs import reads, transitions
from llamalith_app.store.tables import Priority, Status
from llamalith_app.web.request import AppRequest, IdempotencyKey

JobIdInPath = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
OfConversation = Annotated[
    str | None, QueryParameter(min_length=1, max_length=MAX_NAME, description="Only of this conversation.")
]
OfModel = Annotated[str | None, QueryParameter(min_length=1, max_length=MAX_NAME, description="Only for this.")]
FILTERS = ("status", "conversation_id", "model")
"""The filters of a cancel."""
RETRY_FILTERS = (*FILTERS, "error_kind", "limit")


class Jobs(Controller):
    path = "/jobs"
    tags = ("Jobs",)

    @post(status_code=200, summary="Queue a prompt")
    async def make(
        self, request: AppRequest, data: JSONBody[JobCreate], idempotency_key: IdempotencyKey = None
    ) -> JobAccepted:
        """After the answer 200 the job is on disk and will end exactly once."""
        return await request.parts.submissions.submit(
            request.principal,
            request.id,
            data,
            conversation_id=id_text(data.conversation_id),
            key=await request.key(idempotency_key),
        )

    @post("/compare", status_code=200, summary="Queue a prompt for several models")
    async def compare(
        self, request: AppRequest, data: JSONBody[JobCompare], idempotency_key: IdempotencyKey = None
    ) -> CompareAccepted:
        """One job for each model, on turns beside each other: all of them are on disk after the answer 200, none after
        any other. They run in this order. To go on with another reply than the first, name its turn as `parent` of the
        next prompt, or make it the head."""
        if not data.content.strip():
            raise BadInput("content is required")
        if data.model:
            raise BadInput("model: leave it out here; the models stand in models")
        return await request.parts.submissions.compare(
            request.principal,
            request.id,
            data,
            data.models,
            conversation_id=id_text(data.conversation_id),
            key=await request.key(idempotency_key),
        )

    @get(summary="List jobs, newest first")
    async def newest(
        self,
        request: AppRequest,
        status: Annotated[str | None, QueryParameter(description="Only jobs in this state.")] = None,
        conversation_id: Annotated[str | None, QueryParameter(description="Only of this conversation.")] = None,
        source: Annotated[
            SourceWord | None, QueryParameter(description="Only of conversations that were made there.")
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=500)] = 100,
        before: Annotated[
            int | None,
            QueryParameter(ge=1, le=MAX_ID, description="Only jobs with a smaller id: the next page."),
        ] = None,
        texts: Annotated[
            bool,
            QueryParameter(
                description="`false`: without `user_input`, `system_prompt`, `parameters`, `result` and `partial`, of"
                " which a page may have megabytes; why a job failed stands in `error`."
            ),
        ] = True,
    ) -> JobList | JobBriefList:
        filters: dict[str, Any] = {
            "limit": limit,
            "status": status or None,
            "conversation_id": (conversation_id or "").strip() or None,
            "source": source,
            "before": before,
        }
        owner_id, database = request.principal.user_id, request.parts.database
        if texts:
            found = await database.read(reads.newest, owner_id, **filters)
            await request.parts.live.add(found)
            return JobList(jobs=found)
        briefs = await database.read(reads.newest_briefs, owner_id, **filters)
        await request.parts.live.add(briefs)
        return JobBriefList(jobs=briefs)

    @get("/{job_id:str}", summary="Read a job")
    async def one(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        return await read_job(request, job_id)

    @get("/{job_id:str}/attempts", summary="Read every start of a job")
    async def attempts(self, request: AppRequest, job_id: JobIdInPath) -> AttemptList:
        """When each attempt ran, on which worker, and how it ended."""
        found = await request.parts.database.read(reads.attempts, request.principal.user_id, job_id)
        if found is None:
            raise NotFound("Job not found")
        return AttemptList(attempts=found)

    @patch(
        "/{job_id:str}",
        summary="Change a job that waits",
        opt={"conflict": "It has been started, or has ended."},
    )
    async def change(self, request: AppRequest, job_id: JobIdInPath, data: JSONBody[JobChange]) -> Job:
        """Another prompt, for a job that was never started: it keeps its place. Another priority, while it is queued:
        it then stands where it would stand had it been sent with that. To take a prompt out of its conversation, cancel
        the job and delete its turn."""
        if data.content is None and data.priority is None:
            raise BadInput("content or priority is required")
        if data.content is not None:
            await request.parts.branches.edit_prompt(request.principal.user_id, job_id, data.content)
        if data.priority is not None:
            await change_priority(request, job_id, data.priority)
        return await read_job(request, job_id)

    @post("/{job_id:str}/retry", status_code=200, summary="Try a job again")
    async def retry(
        self, request: AppRequest, job_id: JobIdInPath, idempotency_key: IdempotencyKey = None
    ) -> JobAccepted:
        """For a job that ended as `error` or `cancelled`. The same prompt with the same settings becomes a new job, the
        last of its conversation; the old job does not change. A second retry is answered with the same new job."""
        await request.takes_only()
        return await request.parts.submissions.retry(
            request.principal, request.id, job_id, key=await request.key(idempotency_key)
        )

    @post("/retry", status_code=200, summary="Try all jobs again that match")
    async def retry_matching(
        self,
        request: AppRequest,
        status: Annotated[
            list[RetryableWord],
            QueryParameter(min_items=1, max_items=2, description="`error`, `cancelled`, or each once."),
        ],
        conversation_id: OfConversation = None,
        model: OfModel = None,
        error_kind: Annotated[
            str | None,
            QueryParameter(min_length=1, max_length=40, description="Only errors of this kind."),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=500, description="So many at most, the oldest.")] = 100,
        idempotency_key: IdempotencyKey = None,
    ) -> Retried:
        """Retries each job at most once, and as many as the queue has room for; `more` says whether to ask again."""
        await request.takes_only(*RETRY_FILTERS)
        return await request.parts.submissions.retry_matching(
            request.principal,
            request.id,
            {Status(word) for word in status},
            limit=limit,
            conversation_id=conversation_id,
            model=model,
            error_kind=error_kind,
            key=await request.key(idempotency_key),
        )

    @post("/{job_id:str}/cancel", status_code=200, summary="Cancel a job")
    async def cancel(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        """Answers with the job in its final state: cancelled, or another one if it had ended before. No reply is stored
        for a cancelled job; the text written until then appears in `partial` soon after."""
        return await _cancel(request, job_id)

    @post(
        "/{job_id:str}/answer-now",
        status_code=200,
        summary="Let a job answer now",
        opt={"conflict": "It has ended."},
    )
    async def answer_now(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        """Closes the thinking of a reasoning model within about a second, so that its reply begins. A job that waits
        will not think; one that does not think, or not any more, goes on as it does."""
        await request.takes_only()
        await answer_now(request, job_id)
        return await read_job(request, job_id)

    @delete("/{job_id:str}", status_code=200, summary="Cancel a job, by another verb")
    async def delete(self, request: AppRequest, job_id: JobIdInPath) -> Job:
        """The same as `POST …/cancel`: the job stays stored."""
        return await _cancel(request, job_id)

    @post("/cancel", status_code=200, summary="Cancel all jobs that match")
    async def cancel_matching(
        self,
        request: AppRequest,
        status: Annotated[
            list[OpenWord],
            QueryParameter(min_items=1, max_items=2, description="`queued`, `processing`, or each once."),
        ],
        conversation_id: OfConversation = None,
        model: OfModel = None,
    ) -> Cancelled:
        """A filter that is unknown, empty or in a body is refused, because ignoring it would cancel too much."""
        await request.takes_only(*FILTERS)
        n_cancelled = await request.parts.cancellations.cancel_matching(
            request.principal.user_id,
            {Status(word) for word in status},
            conversation_id=conversation_id,
            model=model,
        )
        return Cancelled(ok=True, cancelled=n_cancelled)


async def answer_now(request: AppRequest, job_id: int) -> None:
    """Raises NotFound, and NotNow where the job has ended."""
    if await request.parts.database.write(transitions.answer_now, request.principal.user_id, job_id):
        return
    job = await read_job(request, job_id)
    raise NotNow(f"Job {job_id} is {job.status}: it thinks no more.")


async def change_priority(request: AppRequest, job_id: int, priority: PriorityWord) -> None:
    """Moves a queued job to another class. Raises NotFound, and NotQueued where it has been started."""
    owner_id, database = request.principal.user_id, request.parts.database
    changed = await database.write(transitions.change_priority, owner_id, [job_id], Priority[priority.upper()].value)
    if changed:
        return
    job = await database.read(reads.job_by_id, owner_id, job_id)
    if job is None:
        raise NotFound("Job not found")
    if job.status != "queued":
        raise NotQueued(f"Job {job_id} is {job.status}: only a job that waits can be changed.")


async def read_job(request: AppRequest, job_id: int) -> Job:
    """With its live progress. Raises NotFound."""
    job = await request.parts.database.read(reads.job_by_id, request.principal.user_id, job_id)
    if job is None:
        raise NotFound("Job not found")
    await request.parts.live.add([job])
    return job


async def _cancel(request: AppRequest, job_id: int) -> Job:
    if await request.parts.cancellations.cancel_job(request.principal.user_id, job_id) is None:
        raise NotFound("Job not found")
    return await read_job(request, job_id)
