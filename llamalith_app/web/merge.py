"""Several sources of chunks as one stream: each at its own pace, none before the reader has taken what came before.

Knows no event and no format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from llamalith_app.web import sse
from llamalith_app.web.follow import Followers, OpenStream

Source = Callable[[OpenStream], sse.Chunks]
"""Makes chunks until the OpenStream that it is given is over."""
MAX_KEPT = 4
"""Chunks that wait for the reader."""


async def chunks(
    followers: Followers, sources: Sequence[Source], stream: OpenStream
) -> AsyncGenerator[tuple[int | None, bytes], None]:
    """Each chunk with the place of its source, until the stream is over; a heartbeat, of no source, where none came for
    `heartbeat_s`. The stream is over with the first source that ends. Raises what a source raises."""
    made: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(MAX_KEPT)
    opened = [followers.open() for _ in sources]

    async def take(place: int) -> None:
        try:
            async with aclosing(sources[place](opened[place])) as of_one:
                async for chunk in of_one:
                    if chunk != sse.HEARTBEAT:
                        await made.put((place, chunk))
                        stream.news.set()
        finally:
            stream.end()

    tasks = [asyncio.create_task(take(place)) for place in range(len(sources))]
    try:
        while not stream.is_over:
            while not made.empty() and not stream.is_over:
                yield made.get_nowait()
            if not await stream.wait(followers.timings.heartbeat_s):
                yield None, sse.HEARTBEAT
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for one in opened:
            one.end()
            followers.forget(one)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
