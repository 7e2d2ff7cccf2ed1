"""Server-Sent Events: how events look on the wire, and the response that sends them.

Knows what a transcript's events are, and nothing of where they come from. Another format of the same events stands
beside this module, not in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from litestar import Response
from litestar.types import Receive, Scope, Send

from llamalith_app.web.follow import OpenStream
from llamalith_app.web.request import AppRequest
from llamalith_app.web.transcript import JobEvent

HEARTBEAT = b": keep-alive\n\n"
RETRY = b"retry: 1000\n\n"
"""Milliseconds after which a browser connects again."""
COME_AGAIN = b"retry: 1000\n: the server ends; come again\n\n"

Chunks = AsyncGenerator[bytes, None]


def frames(events: Iterable[JobEvent], id_prefix: bytes = b"") -> bytes:
    """The events as one chunk. Their data goes in as it is: JSON on one line."""
    return b"".join([_frame(event, id_prefix) for event in events])


def _frame(event: JobEvent, id_prefix: bytes) -> bytes:
    attempt, n, kind, data = event
    if kind == "progress":
        return b"event: progress\ndata: %b\n\n" % data
    return b"id: %b%d-%d\nevent: %b\ndata: %b\n\n" % (id_prefix, attempt, n, kind.encode(), data)


def id_alone(last_id: bytes) -> bytes:
    """A frame that only sets the id from which the client will resume."""
    return b"id: %b\n\n" % last_id


class EventStream(Response[Any]):
    """Sends what `source` yields, chunk by chunk; the OpenStream ends `source`. `greeting`: comes first. `farewell`:
    makes what comes last where the stream ended before its source did. `on_left`: is called then."""

    def __init__(
        self,
        request: AppRequest,
        source: Callable[[OpenStream], Chunks],
        *,
        greeting: bytes = RETRY,
        farewell: Callable[[], bytes] = lambda: COME_AGAIN,
        on_left: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(content=None, media_type="text/event-stream")
        self._request = request
        self._source = source
        self._greeting = greeting
        self._farewell = farewell
        self._on_left = on_left

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        return self._run

    async def _run(self, _: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        is_whole = False
        try:
            async with open_stream(self._request, receive) as stream:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if self._greeting:
                    await send({"type": "http.response.body", "body": self._greeting, "more_body": True})
                async with aclosing(self._source(stream)) as chunks:
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                is_whole = not stream.is_over
                last = b"" if is_whole else self._farewell()
                await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            if not is_whole:
                self._on_left()


@asynccontextmanager
async def open_stream(request: AppRequest, receive: Receive) -> AsyncIterator[OpenStream]:
    """An open request that waits for events. It is over when the client is gone, when this process ends, and when the
    session that it was sent with is over."""
    followers = request.parts.followers
    stream = followers.open()
    watching = [asyncio.create_task(_end_with_client(receive, stream))]
    if request.principal.door == "session":
        watching.append(asyncio.create_task(_end_with_session(request, stream)))
    try:
        yield stream
    finally:
        for task in watching:
            task.cancel()
        followers.forget(stream)


async def _end_with_client(receive: Receive, stream: OpenStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.client_left = True
    stream.end()


async def _end_with_session(request: AppRequest, stream: OpenStream) -> None:
    await request.parts.sessions.wait_until_ended(request)
    stream.end()
