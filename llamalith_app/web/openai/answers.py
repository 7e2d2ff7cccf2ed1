"""The answer to a call: waits for the job, tells it in the client's shape, and says when the client left.

Owns the life of the open request. A client that leaves before its answer is told to `jobs/calls.py`. Knows no shape:
a `Telling` has that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
from litestar import Response
from litestar.types import Receive, Scope, Send

from llamalith_app.contracts.events import Delta, ProgressEvent, Thinking
from llamalith_app.contracts.jobs import Job
from llamalith_app.errors import Ending
from llamalith_app.web import openai_errors as errors
from llamalith_app.web import sse
from llamalith_app.web.follow import ENDED, OpenStream
from llamalith_app.web.openai.told import Kind, Said, Telling, comment
from llamalith_app.web.request import AppRequest

ALIVE_S = 15.0
"""After so long without an event a stream says that it is alive: some clients do not count comments."""
KEEP_ALIVE = b": keep-alive\n\n"
RESTARTED = "The reply was begun anew, and differs from what you have. Send the call again: the job goes on."
ENDING = "This process ends before the reply is there. Send the call again: the job goes on."

Left = Callable[[int], None]


class WholeAnswer(Response[Any]):
    """Answers once the job has ended: with its reply, or with why there is none."""

    def __init__(self, request: AppRequest, job: Job, telling: Telling, left: Left) -> None:
        super().__init__(content=None)
        self._request = request
        self._job = job
        self._telling = telling
        self._left = left

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        return self._run

    async def _run(self, _: Scope, receive: Receive, send: Send) -> None:
        is_answered = False
        try:
            async with sse.open_stream(self._request, receive) as stream:
                job = await self._ended(stream)
                status, content = self._content(job)
                body = msgspec.json.encode(content)
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                if job is None:
                    headers.append((b"retry-after", str(Ending.retry_after_s).encode()))
                if not stream.client_left:
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    await send({"type": "http.response.body", "body": body, "more_body": False})
                    is_answered = job is not None and not stream.client_left
        finally:
            if not is_answered:
                self._left(self._job.id)

    async def _ended(self, stream: OpenStream) -> Job | None:
        """None: the client is gone, or this process ends."""
        if self._job.status in ENDED:
            return self._job
        events = self._request.parts.followers.events(self._job, self._request.principal.user_id, None, stream)
        async with aclosing(events) as batches:
            async for batch in batches:
                if batch and batch[-1].kind in ENDED:
                    return msgspec.json.decode(batch[-1].data, type=Job)
        return None

    def _content(self, job: Job | None) -> tuple[int, msgspec.Struct]:
        if job is None:
            return Ending.status, errors.body(Ending.status, Ending.type, ENDING)
        if job.status == "done":
            return 200, self._telling.whole(job)
        return errors.FINAL, errors.of_job(job)


def stream_answer(request: AppRequest, job: Job, telling: Telling, left: Left) -> sse.EventStream:
    """Answers at once, and goes on as the job is written."""
    return sse.EventStream(
        request,
        lambda stream: _chunks(request, job, telling, stream, left),
        # A client of OpenAI's would take a line that is no comment and no data for an event.
        greeting=b"",
        farewell=lambda: telling.failure(errors.body(Ending.status, Ending.type, ENDING)),
        on_left=lambda: left(job.id),
    )


async def _chunks(request: AppRequest, job: Job, telling: Telling, stream: OpenStream, left: Left) -> sse.Chunks:
    said: dict[Kind, Said] = {"delta": Said(), "thinking": Said()}
    told_at = time.monotonic()
    yield telling.begin() or KEEP_ALIVE
    events = request.parts.followers.events(job, request.principal.user_id, None, stream)
    async with aclosing(events) as batches:
        async for batch in batches:
            chunk, comments, is_other = b"", b"", False
            for event in batch:
                if event.kind == "progress":
                    comments += comment(msgspec.json.decode(event.data, type=ProgressEvent))
                elif event.kind == "restart":
                    for text in said.values():
                        text.restart()
                elif event.kind == "delta":
                    chunk += _piece(telling, said, "delta", msgspec.json.decode(event.data, type=Delta).text)
                elif event.kind == "thinking":
                    chunk += _piece(telling, said, "thinking", msgspec.json.decode(event.data, type=Thinking).text)
                elif event.kind == "done" and any(text.is_behind for text in said.values()):
                    is_other = True
                else:
                    ended = msgspec.json.decode(event.data, type=Job)
                    chunk += telling.end(ended) if ended.status == "done" else telling.failure(errors.of_job(ended))
            if is_other or any(text.differs for text in said.values()):
                left(job.id)
                yield telling.failure(errors.body(errors.FINAL, "restarted", RESTARTED))
                return
            if not chunk and time.monotonic() - told_at >= ALIVE_S:
                chunk = telling.alive()
            if chunk:
                told_at = time.monotonic()
            if comments or chunk or not batch:
                yield comments + chunk or KEEP_ALIVE


def _piece(telling: Telling, said: dict[Kind, Said], kind: Kind, text: str) -> bytes:
    new = said[kind].add(text)
    return telling.piece(kind, new) if new else b""
