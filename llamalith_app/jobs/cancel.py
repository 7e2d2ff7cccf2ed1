"""Cancels jobs: one, those of a conversation, those that match a filter, those of conversations that it deletes, or
those whose clients left. Called by the controllers of API and pages, and by `calls.py`.

After the commit it publishes their ends and sends hints for the jobs that can run now. A running job's worker finds
out by reading the database: its lease is gone. Knows no HTTP and no engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs.queue import Hints
from llamalith_app.store import calls, conversation_changes
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions, waiting
from llamalith_app.store.tables import Status

CHUNK_JOBS = 1000
"""At most this many jobs are cancelled in one transaction, so that others can write in between."""
OPEN = (Status.QUEUED, Status.PROCESSING)


class Cancellations:
    def __init__(
        self,
        database: Database,
        hints: Hints,
        models: tuple[str, ...],
        publish_ended: Callable[[Collection[int]], None],
    ) -> None:
        """`publish_ended` publishes to the readers of these jobs that they have ended; it returns at once."""
        self._database = database
        self._hints = hints
        self._models = models
        self._publish_ended = publish_ended

    async def cancel_job(self, owner_id: int, job_id: int) -> Status | None:
        """The job's final state: cancelled, or another one if it had ended before. None: the owner has no such job.

        Raises StorageUnavailable; nothing was stored then.
        """
        status = await self._database.write(transitions.cancel, owner_id, job_id, datetime.now(UTC))
        if status is Status.CANCELLED:
            await self._after_commit([job_id])
        return status

    async def cancel_matching(
        self,
        owner_id: int,
        statuses: Collection[Status] = OPEN,
        *,
        conversation_id: str | None = None,
        model: str | None = None,
    ) -> int:
        """Cancels the owner's jobs in these open states and returns how many; includes jobs submitted meanwhile.

        Raises StorageUnavailable; some of the jobs may be cancelled then.
        """
        n_cancelled, more = 0, True
        while more:
            cancelled = await self._database.write(
                transitions.cancel_open,
                owner_id,
                datetime.now(UTC),
                statuses=statuses,
                limit=CHUNK_JOBS,
                conversation_id=conversation_id,
                model=model,
            )
            n_cancelled += len(cancelled)
            more = len(cancelled) >= CHUNK_JOBS
            await self._after_commit(cancelled)
        return n_cancelled

    async def cancel_jobs(self, owner_id: int, job_ids: Collection[int]) -> int:
        """Cancels those of these jobs that are open and the owner's, in one transaction, and returns how many.

        Raises StorageUnavailable; nothing was stored then.
        """
        cancelled = await self._database.write(transitions.cancel_jobs, owner_id, job_ids, datetime.now(UTC))
        await self._after_commit(cancelled)
        return len(cancelled)

    async def delete_conversations(self, owner_id: int, public_ids: Collection[str]) -> conversation_changes.Deletion:
        """Deletes these conversations and cancels their open jobs, all or nothing. Ids that name none are left out.

        Raises StorageUnavailable.
        """
        deletion = await self._database.write(
            conversation_changes.delete_conversations, owner_id, public_ids, datetime.now(UTC)
        )
        await self._after_commit(deletion.cancelled)
        return deletion

    async def cancel_left(self, until: datetime) -> int:
        """Cancels the jobs of OpenAI clients that the last client left by then, and returns how many.

        Raises StorageUnavailable; nothing was stored then.
        """
        cancelled = await self._database.write(calls.cancel_left, until, datetime.now(UTC))
        await self._after_commit(cancelled)
        return len(cancelled)

    async def _after_commit(self, cancelled: list[int]) -> None:
        """Publishes the end of these jobs, and wakes workers for the jobs that waited behind them."""
        self._publish_ended(cancelled)
        with contextlib.suppress(StorageUnavailable):  # the cancel is stored; workers find the next jobs when they poll
            for runnable in await self._database.read(waiting.newly_runnable, cancelled, datetime.now(UTC)):
                if runnable.model in self._models:
                    self._hints.send(runnable.model, runnable.job_id, runnable.attempt + 1)
