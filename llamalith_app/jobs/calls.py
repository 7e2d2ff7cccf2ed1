"""Calls whose client waits at the other end of a connection: a job that nobody waits for any more is cancelled.

A client that leaves has a grace: within it the same request joins its job again. Who left is in the record, so another
web process, or the next one, knows it too. Knows no HTTP; `submit.py` stores the job.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import structlog

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs.cancel import Cancellations
from llamalith_app.store import calls
from llamalith_app.store.database import Database

log = structlog.get_logger(__name__)

AGAIN_S = 1.0
"""After a record that could not be used."""
LOOK_S = 60.0
"""Between two looks without news: a process that had the clients may be gone."""


class Calls:
    """`grace_s`: how long a job goes on when its last client has left. `cancels` False: it goes on to its end."""

    def __init__(
        self, database: Database, cancellations: Cancellations, *, grace_s: float, cancels: bool = True
    ) -> None:
        self._database = database
        self._cancellations = cancellations
        self.grace_s = grace_s
        self._cancels = cancels
        self._leaving: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def start(self) -> None:
        """Also cancels what clients of an earlier process left."""
        if self._cancels:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Returns once it is stored who has left."""
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def leave(self, job_id: int) -> None:
        """A client that waited for this job is gone without its answer. Does not wait."""
        leaving = asyncio.create_task(self._leave(job_id))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _leave(self, job_id: int) -> None:
        try:
            await self._database.write(calls.leave, job_id, datetime.now(UTC))
        except StorageUnavailable as error:
            log.warning("it could not be stored that a client left; its job goes on", job_id=job_id, reason=str(error))
        self._news.set()

    async def _watch(self) -> None:
        grace = timedelta(seconds=self.grace_s)
        while True:
            wait_s = LOOK_S
            self._news.clear()
            try:
                first = await self._database.read(calls.first_left)
                now = datetime.now(UTC)
                if first is not None and first + grace <= now:
                    n_cancelled = await self._cancellations.cancel_left(now - grace)
                    if n_cancelled:
                        log.info("jobs cancelled, their clients left", n_jobs=n_cancelled)
                    continue
                if first is not None:
                    wait_s = min(LOOK_S, (first + grace - now).total_seconds())
            except StorageUnavailable:
                wait_s = AGAIN_S
            except Exception:
                log.exception("the watch over clients that left failed unexpectedly")
                wait_s = AGAIN_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass
