"""Jobs and conversations as streams of events: sent as they happen, resumed exactly, ended by the record.

Owns the ids that a client resumes from. A stream holds no connection of the database and none of Redis. A client that
does not read costs its cursor and no more; a client that leaves stops no job.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Annotated, Any

from litestar import Controller, Response, get
from litestar.datastructures import ResponseHeader
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter

from llamalith_app.contracts.events import Event
from llamalith_app.contracts.jobs import Job
from llamalith_app.contracts.text import END
from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.jobs import JobIdInPath
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.store import conversations
from llamalith_app.store.jobs import reads
from llamalith_app.web import lane as lane_stream
from llamalith_app.web import sse
from llamalith_app.web.follow import ENDED, OpenStream
from llamalith_app.web.request import AppRequest, Parts
from llamalith_app.web.transcript import FINAL, Cursor

JOB_EVENT = re.compile(r"([0-9]{1,9})-([0-9]{1,10})")
LANE_EVENT = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})-([0-9]{1,10})")
NOTHING_YET = Cursor(0, 0)
"""Attempts and events count from 1. The final event of a job that was never claimed is of attempt 0."""

AFTER = "The id of the last event that you have: the stream resumes after it. Empty: from the beginning."
LAST = "The same, as browsers send it when they reconnect; it takes precedence over `after`."


def _document(form: re.Pattern[str]) -> dict[str, str]:
    # Documented here but not validated by the framework, whose error could not say what an id looks like.
    return {"pattern": f"^(?:{form.pattern})?{END}"}


After = Annotated[str | None, QueryParameter(description=AFTER, schema_extra=_document(JOB_EVENT))]
AfterInLane = Annotated[str | None, QueryParameter(description=AFTER, schema_extra=_document(LANE_EVENT))]
Last = Annotated[str | None, HeaderParameter(name="Last-Event-ID", description=LAST, schema_extra=_document(JOB_EVENT))]
LastInLane = Annotated[
    str | None, HeaderParameter(name="Last-Event-ID", description=LAST, schema_extra=_document(LANE_EVENT))
]
STREAM = ResponseSpec(
    data_container=Event | Job,
    media_type="text/event-stream",
    generate_examples=False,
    description="Server-Sent Events: `progress`, `delta`, `thinking` and `restart`. A job's last event is `done`, "
    "`error` or `cancelled`; its data is the Job.",
)
NOTHING_MORE = ResponseSpec(
    None, generate_examples=False, description="You have the job's last event; nothing follows it."
)


class Events(Controller):
    path = ""
    tags = ("Events",)

    @get(
        "/jobs/{job_id:str}/events",
        summary="Follow a job as it is written",
        responses={200: STREAM, 204: NOTHING_MORE},
        response_headers=[ResponseHeader(name="X-Accel-Buffering", value="no", documentation_only=True)],
    )
    async def of_job(
        self, request: AppRequest, job_id: JobIdInPath, after: After = None, last_event_id: Last = None
    ) -> Response[Any]:
        """`progress` says where the job stands. `delta` brings more of the reply, `thinking` more of what is not part
        of it. All deltas together are the stored reply. `restart` means: discard everything so far, all of it follows.
        A late reader gets the whole stream. The stream ends with exactly one of `done`, `error` and `cancelled`; a
        request for what comes after that one is answered 204. A client that leaves stops nothing."""
        cursor, _ = _cursor(last_event_id, after, JOB_EVENT, "1-42")
        owner_id, parts = request.principal.user_id, request.parts
        job = await parts.database.read(reads.job_by_id, owner_id, job_id)
        if job is None:
            raise NotFound("Job not found")
        if cursor is not None and cursor == (job.attempt, FINAL) and job.status in ENDED:
            return Response(None, status_code=204)
        await parts.live.add([job])
        return sse.EventStream(request, lambda stream: _job_chunks(parts, job, owner_id, cursor, stream))

    @get("/conversations/{conversation_id:str}/events", summary="Follow a conversation", responses={200: STREAM})
    async def of_conversation(
        self,
        request: AppRequest,
        conversation_id: PathId,
        after: AfterInLane = None,
        last_event_id: LastInLane = None,
    ) -> Response[Any]:
        """The events of its open jobs, one job after another, and of jobs that are added later. An event's id begins
        with its job's, as in `7.1-42`; the first id comes alone. The stream ends when the client leaves."""
        cursor, from_job = _cursor(last_event_id, after, LANE_EVENT, "7.1-42")
        owner_id, parts = request.principal.user_id, request.parts
        lane = await parts.database.read(conversations.lane, owner_id, conversation_id, from_job)
        if lane is None:
            raise NotFound("Conversation not found")
        return sse.EventStream(
            request,
            lambda stream: lane_stream.chunks(
                parts,
                owner_id,
                lane,
                from_job,
                cursor,
                stream,
                first_id=lambda job_id: b"%d.0-0" % job_id,
                of_job=lambda job: _job_chunks(
                    parts, job, owner_id, cursor if job.id == from_job else None, stream, b"%d." % job.id
                ),
            ),
        )


def _cursor(
    last_event_id: str | None, after: str | None, form: re.Pattern[str], example: str
) -> tuple[Cursor | None, int | None]:
    """Where to resume, and in which job. Raises BadInput."""
    name, given = ("Last-Event-ID", last_event_id) if last_event_id else ("after", after)
    if not given:
        return None, None
    found = form.fullmatch(given)
    if found is None:
        raise BadInput(f"{name}: expected the id of an event of this stream, such as {example}")
    *job, attempt, n = map(int, found.groups())
    cursor = Cursor(attempt, n)
    return cursor if cursor != NOTHING_YET else None, job[0] if job else None


async def _job_chunks(
    parts: Parts, job: Job, owner_id: int, cursor: Cursor | None, stream: OpenStream, id_prefix: bytes = b""
) -> sse.Chunks:
    async with aclosing(parts.followers.events(job, owner_id, cursor, stream)) as batches:
        async for batch in batches:
            yield sse.frames(batch, id_prefix) if batch else sse.HEARTBEAT
