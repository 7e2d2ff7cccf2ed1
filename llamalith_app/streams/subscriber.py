"""How entries are read from Redis: `history` for what a stream holds, and a `StreamSubscriber` for what is published
from now on. Knows no SQL, no HTTP and no engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis

from llamalith_app.streams import wire
from llamalith_app.streams.wire import UNAVAILABLE, Entry
from llamalith_app.supervise.tasks import cancel_until_ended

PAGE = 1000
"""Entries of one XRANGE."""
SILENCE_S = 15.0
"""After so long without a message the connection is pinged; after as long again it counts as lost."""
CLOSE_S = 5.0
MAX_BACKOFF_S = 2.0
"""The longest pause between two attempts to connect; the first pause is a tenth of it."""

log = structlog.get_logger(__name__)


async def history(redis: Redis, record: str, job_id: int, after: tuple[int, int] = (0, 0)) -> list[Entry]:
    """The entries behind `after` (attempt, n) that the stream holds. Raises one of UNAVAILABLE, and ValueError for what
    is no entry."""
    found: list[Entry] = []
    while True:
        page: Any = await redis.xrange(wire.stream_key(record, job_id), min=f"({after[0]}-{after[1]}", count=PAGE)
        found += [wire.parse_entry(event_id, fields) for event_id, fields in page]
        if len(page) < PAGE:
            return found
        after = found[-1][:2]


class StreamSubscriber:
    """Receives the entries of the jobs that somebody follows, over one connection; reconnects by itself.

    `on_entry` gets each entry, and may raise MsgspecError for one that it cannot decode. `on_ready` gets a job whose
    later entries will all reach `on_entry`; the earlier ones are its history. Both run in the event loop and must not
    wait.
    """

    def __init__(
        self, redis: Redis, record: str, on_entry: Callable[[int, Entry], None], on_ready: Callable[[int], None]
    ) -> None:
        self._redis = redis
        self._record = record
        self._on_entry = on_entry
        self._on_ready = on_ready
        self._job_ids: set[int] = set()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    def follow(self, job_id: int) -> None:
        self._job_ids.add(job_id)
        if self.connected:
            self._on_ready(job_id)
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._stay_subscribed())

    def unfollow(self, job_id: int) -> None:
        self._job_ids.discard(job_id)

    async def close(self) -> None:
        """Within CLOSE_S seconds."""
        if self._task is not None:
            await cancel_until_ended([self._task], within_s=CLOSE_S)

    async def _stay_subscribed(self) -> None:
        pause = 0.0
        while True:
            started = time.monotonic()
            try:
                await self._receive()
            except UNAVAILABLE as error:
                self.connected = False
                if pause == 0.0:
                    log.warning("not subscribed to streams: redis is away", reason=str(error))
            pause = 0.0 if time.monotonic() - started > SILENCE_S else pause
            pause = min(max(2 * pause, MAX_BACKOFF_S / 10), MAX_BACKOFF_S)
            await asyncio.sleep(pause)

    async def _receive(self) -> None:
        """Runs until the connection is lost, then raises one of UNAVAILABLE."""
        pubsub: Any = self._redis.pubsub()
        is_pinged = False
        try:
            await pubsub.subscribe(wire.channel_name(self._record))
            while True:
                message = await pubsub.get_message(timeout=SILENCE_S)
                if message is None:
                    if is_pinged:
                        raise TimeoutError("Redis is silent")
                    await pubsub.ping()
                is_pinged = message is None
                if message is not None:
                    self._dispatch(message)
        finally:
            self.connected = False
            with contextlib.suppress(*UNAVAILABLE):
                await pubsub.aclose()

    def _dispatch(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self.connected = True
            for job_id in self._job_ids:
                self._on_ready(job_id)
        elif message["type"] == "message" and self._job_ids:
            try:
                for job_id, entry in wire.decode_messages(message["data"]):
                    if job_id in self._job_ids:
                        self._on_entry(job_id, entry)
            except msgspec.MsgspecError as error:
                log.warning("a message has an unknown form; is every process of one version?", reason=str(error))
