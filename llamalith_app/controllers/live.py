"""Adds to jobs that have not ended where they stand now: a position from the record, live counts from Redis,
and when that will have an end."""

from __future__ import annotations

from llamalith_app.contracts.jobs import Job, Progress
from llamalith_app.jobs import order
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.progress import ProgressReader
from llamalith_app.store import job_reads
from llamalith_app.store.database import Database


class Live:
    def __init__(self, database: Database, reader: ProgressReader, forecasts: Forecasts) -> None:
        self._database = database
        self._reader = reader
        self._forecasts = forecasts

    async def add(self, found: list[Job]) -> None:
        """Without Redis a running job keeps an empty progress."""
        positions = await self._positions([job for job in found if job.status == "queued"])
        live = await self._reader.read({job.id: job.attempt for job in found if job.status == "processing"})
        if not any(job.status in ("queued", "processing") for job in found):
            return
        board = await self._forecasts.board()
        for job in found:
            if job.status == "queued":
                lane, position = board.lanes.get(job.model), positions.get(job.id)
                job.progress = Progress(phase="queued", position=position)
                if lane is not None and position is not None:
                    job.progress.start_eta_s = _rounded(lane.start_s(position))
                    job.progress.eta_s = _rounded(lane.end_s(position))
            elif job.status == "processing" and (progress := live.get(job.id)) is not None:
                self.add_eta(progress, job.model)
                job.progress = progress

    def add_eta(self, progress: Progress, model: str) -> None:
        """To what a running job of the model tells, by the speeds that were last seen."""
        progress.eta_s = _rounded(order.left_s(progress, self._forecasts.newest.engines.get(model)))

    async def _positions(self, queued: list[Job]) -> dict[int, int | None]:
        if len(queued) == 1:
            job_id = queued[0].id
            return {job_id: await self._database.read(job_reads.position, job_id)}
        if queued:
            return dict(await self._database.read(job_reads.positions, {job.model for job in queued}))
        return {}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def may_grow(job: Job) -> bool:
    """Cancelled while it ran: its worker may still add what it had written."""
    return job.status == "cancelled" and job.started_at is not None and job.completion_tokens is None
