"""Jobs and conversations as Server-Sent Events: told as it happens, resumed exactly, ended by the record.

Owns the form on the wire: ids, keep-alives, and how a stream ends. A stream holds no connection of the database and
none of Redis; a client that does not read costs its place in a transcript, and one that leaves stops no job.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from litestar import Controller, Response, get
from litestar.datastructures import ResponseHeader
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from litestar.types import Receive, Scope, Send

from llamalith_app.contracts.events import Event
from llamalith_app.contracts.jobs import Job
from llamalith_app.contracts.text import END
from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.jobs import JobIdInPath
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.store import conversations, job_reads
from llamalith_app.web.follow import ENDED, Followers, Line
from llamalith_app.web.request import AppRequest, Parts
from llamalith_app.web.transcript import FINAL, Cursor

KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
RETRY = b"retry: 1000\n\n"
"""Milliseconds after which a browser comes again."""
COME_AGAIN = b"retry: 1000\n: the server ends; come again\n\n"

JOB_EVENT = re.compile(r"([0-9]{1,9})-([0-9]{1,10})")
LANE_EVENT = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})-([0-9]{1,10})")
NOTHING_TOLD = Cursor(0, 0)
"""Attempts and events count from 1; the last event of a job that was never claimed is of attempt 0."""

AFTER = "The id of the last event that you have: the stream goes on behind it. Empty: from the beginning."
LAST = "The same, as browsers send it when they come again; it wins over `after`."


def _document(form: re.Pattern[str]) -> dict[str, str]:
    # Not checked by the framework: it could not say what an id looks like.
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
    description="Server-Sent Events: `progress`, `delta`, `thinking` and `restart`, and as a job's last one of `done`, "
    "`error` and `cancelled`, whose data is the Job.",
)
NOTHING_MORE = ResponseSpec(
    None, generate_examples=False, description="You have the job's last event: there is nothing more to come."
)

Chunks = AsyncGenerator[bytes, None]


class EventStream(Response[Any]):
    """`source` makes what is sent, chunk by chunk, and hears from the line when to end: when the client is gone, when
    this process ends, and when the session that the stream was opened with is over."""

    def __init__(self, request: AppRequest, source: Callable[[Line], Chunks]) -> None:
        super().__init__(content=None, media_type="text/event-stream")
        self._request = request
        self._followers = request.parts.followers
        self._source = source

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        return self._run

    async def _run(self, _: Scope, receive: Receive, send: Send) -> None:
        line = self._followers.open()
        watching = [asyncio.create_task(_until_gone(receive, line))]
        if self._request.principal.door == "session":
            watching.append(asyncio.create_task(_until_session_is_over(self._request, line)))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": RETRY, "more_body": True})
            async with aclosing(self._source(line)) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            last = COME_AGAIN if line.is_over else b""
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            for watch in watching:
                watch.cancel()
            self._followers.lines.discard(line)


async def _until_gone(receive: Receive, line: Line) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    line.end()


async def _until_session_is_over(request: AppRequest, line: Line) -> None:
    await request.parts.sessions.wait_until_ended(request)
    line.end()


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
        """`progress` tells where the job stands, `delta` brings more of the reply, `thinking` what is no part of it.
        All deltas together are the stored reply; `restart` says to throw away what came so far: the whole follows.
        Whoever comes late gets all from the beginning. The stream ends with exactly one of `done`, `error` and
        `cancelled`; who asks after that one gets 204. A client that leaves stops nothing."""
        cursor, _ = _cursor(last_event_id, after, JOB_EVENT, "1-42")
        owner_id, parts = request.principal.user_id, request.parts
        job = await parts.database.read(job_reads.one, owner_id, job_id)
        if job is None:
            raise NotFound("Job not found")
        if cursor is not None and cursor == (job.attempt, FINAL) and job.status in ENDED:
            return Response(None, status_code=204)
        await parts.live.add([job])
        return EventStream(request, lambda line: _job_events(parts.followers, job, owner_id, cursor, line))

    @get("/conversations/{conversation_id:str}/events", summary="Follow a conversation", responses={200: STREAM})
    async def of_conversation(
        self,
        request: AppRequest,
        conversation_id: PathId,
        after: AfterInLane = None,
        last_event_id: LastInLane = None,
    ) -> Response[Any]:
        """The events of its open jobs, one job after another, and of those that come later. Ids have the job's before
        them, as in `7.1-42`; an id alone comes first. Goes on until the client leaves."""
        cursor, from_job = _cursor(last_event_id, after, LANE_EVENT, "7.1-42")
        owner_id, parts = request.principal.user_id, request.parts
        lane = await parts.database.read(conversations.lane, owner_id, conversation_id, from_job)
        if lane is None:
            raise NotFound("Conversation not found")
        return EventStream(request, lambda line: _lane_events(parts, owner_id, lane, from_job, cursor, line))


def _cursor(
    last_event_id: str | None, after: str | None, form: re.Pattern[str], example: str
) -> tuple[Cursor | None, int | None]:
    """Where to go on, and in which job. Raises BadInput."""
    name, given = ("Last-Event-ID", last_event_id) if last_event_id else ("after", after)
    if not given:
        return None, None
    found = form.fullmatch(given)
    if found is None:
        raise BadInput(f"{name}: expected the id of an event of this stream, such as {example}")
    *job, attempt, n = map(int, found.groups())
    cursor = Cursor(attempt, n)
    return cursor if cursor != NOTHING_TOLD else None, job[0] if job else None


async def _job_events(
    followers: Followers, job: Job, owner_id: int, cursor: Cursor | None, line: Line, prefix: bytes = b""
) -> Chunks:
    """To the job's last event."""
    n_progress = 0
    try:
        followed = await followers.follow(job, owner_id, line)
        while not line.is_over:
            sent, cursor = followed.transcript.read(cursor, prefix)
            progress = followed.transcript.progress_after(n_progress)
            n_progress = followed.transcript.n_progress
            if progress or sent:
                yield b"".join((progress, *sent))
            if cursor is not None and cursor.n == FINAL:
                return
            if not sent and not await line.wait(KEEP_ALIVE_S):
                yield KEEP_ALIVE
    finally:
        followers.leave(job.id, line)


async def _lane_events(
    parts: Parts, owner_id: int, lane: conversations.Lane, from_job: int | None, cursor: Cursor | None, line: Line
) -> Chunks:
    waiting = deque(lane.job_ids)
    last_id = max(lane.newest_job, *waiting, 0)
    followed = parts.followers.follow_lane(lane, line)
    try:
        if from_job is None:
            # Who has to come again before anything was told misses no job that ended in between.
            yield b"id: %d.0-0\n\n" % (waiting[0] if waiting else last_id + 1)
        while not line.is_over:
            if not waiting and followed.newest_job > last_id:
                waiting.extend(await parts.database.read(conversations.jobs_after, lane.conversation_id, last_id))
                last_id = max(followed.newest_job, *waiting)
            if waiting:
                job_id = waiting.popleft()
                chunks = _lane_job(parts, owner_id, job_id, cursor if job_id == from_job else None, line)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        yield chunk
            elif not await line.wait(KEEP_ALIVE_S):
                yield KEEP_ALIVE
    finally:
        parts.followers.leave_lane(lane.conversation_id, line)


async def _lane_job(parts: Parts, owner_id: int, job_id: int, cursor: Cursor | None, line: Line) -> Chunks:
    job = await parts.database.read(job_reads.one, owner_id, job_id)
    if job is None or (cursor is not None and cursor.n == FINAL and job.status in ENDED):
        return
    await parts.live.add([job])
    chunks = _job_events(parts.followers, job, owner_id, cursor, line, b"%d." % job_id)
    async with aclosing(chunks):
        async for chunk in chunks:
            yield chunk
