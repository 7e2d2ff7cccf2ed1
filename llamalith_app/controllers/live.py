"""Adds to jobs that have not ended where they stand now: a position from the record, live counts from Redis."""

from __future__ import annotations

from llamalith_app.contracts.jobs import Job, Progress
from llamalith_app.progress import ProgressReader
from llamalith_app.store import jobs
from llamalith_app.store.database import Database


class Live:
    def __init__(self, database: Database, reader: ProgressReader) -> None:
        self._database = database
        self._reader = reader

    async def add(self, found: list[Job]) -> None:
        """Without Redis a running job keeps an empty progress."""
        positions = await self._positions([job for job in found if job.status == "queued"])
        live = await self._reader.read({job.id: job.attempt for job in found if job.status == "processing"})
        for job in found:
            if job.status == "queued":
                job.progress = Progress(phase="queued", position=positions.get(job.id))
            elif job.status == "processing":
                job.progress = live.get(job.id)

    async def _positions(self, queued: list[Job]) -> dict[int, int | None]:
        if len(queued) == 1:
            job_id = queued[0].id
            return {job_id: await self._database.read(jobs.position, job_id)}
        if queued:
            return dict(await self._database.read(jobs.positions, {job.model for job in queued}))
        return {}
