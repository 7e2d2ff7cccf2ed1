"""The only way to cancel: a job, a conversation, or what a filter finds; and what follows once that is on disk.

A worker learns of it from the record: the lease that it runs under is gone. Knows no HTTP and no engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs.queue import Hints
from llamalith_app.store import jobs
from llamalith_app.store.database import Database
from llamalith_app.store.tables import Status

CHUNK_JOBS = 1000
"""Jobs cancelled in one transaction at most, so that others can write between them."""
OPEN = (Status.QUEUED, Status.PROCESSING)


class Cancellations:
    def __init__(
        self,
        database: Database,
        hints: Hints,
        models: tuple[str, ...],
        tell_ended: Callable[[Collection[int]], None],
    ) -> None:
        """`tell_ended` tells those who follow these jobs, without waiting."""
        self._database = database
        self._hints = hints
        self._models = models
        self._tell_ended = tell_ended

    async def one(self, owner_id: int, job_id: int) -> Status | None:
        """The state that won, cancelled or an end that came before; None: no such job of this owner. Raises
        StorageUnavailable with nothing stored, as all of these do."""
        status = await self._database.write(jobs.cancel, owner_id, job_id, datetime.now(UTC))
        if status is Status.CANCELLED:
            await self._ended([job_id])
        return status

    async def matching(
        self,
        owner_id: int,
        statuses: Collection[Status] = OPEN,
        *,
        conversation_id: str | None = None,
        model: str | None = None,
    ) -> int:
        """How many of an owner's jobs in these open states were cancelled, those that came in meanwhile included."""
        n_cancelled, more = 0, True
        while more:
            cancelled = await self._database.write(
                jobs.cancel_open,
                owner_id,
                datetime.now(UTC),
                statuses=statuses,
                limit=CHUNK_JOBS,
                conversation_id=conversation_id,
                model=model,
            )
            n_cancelled += len(cancelled)
            more = len(cancelled) >= CHUNK_JOBS
            await self._ended(cancelled)
        return n_cancelled

    async def _ended(self, cancelled: list[int]) -> None:
        """After the commit, for each job that a cancel ended: whoever follows it hears of it from here, and what
        waited behind it is woken."""
        self._tell_ended(cancelled)
        with contextlib.suppress(StorageUnavailable):  # cancelled they are; a worker's own look finds what is free
            for waiting in await self._database.read(jobs.newly_runnable, cancelled, datetime.now(UTC)):
                if waiting.model in self._models:
                    self._hints.send(waiting.model, waiting.job_id, waiting.attempt + 1)
