"""Jobs with their present progress: position and ETA of a queued job from the record, counts of a running one from
Redis. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from llamalith_app.contracts.jobs import JobBrief, Progress
from llamalith_app.jobs import order
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads
from llamalith_app.streams.progress import ProgressReader


class Live:
    def __init__(self, database: Database, reader: ProgressReader, forecasts: Forecasts) -> None:
        self._database = database
        self._reader = reader
        self._forecasts = forecasts

    async def add(self, found: Sequence[JobBrief]) -> None:
        """Sets the progress of those that are open. Without Redis a running job has an empty one."""
        if not any(job.status in ("queued", "processing") for job in found):
            return
        live = await self._reader.read({job.id: job.attempt for job in found if job.status == "processing"})
        board = await self._forecasts.board()
        for job in found:
            if job.status == "processing" and (progress := live.get(job.id)) is not None:
                self.add_eta(progress, job.model)
                job.progress = progress
        await self._add_positions([job for job in found if job.status == "queued"], board.model_queues)

    def add_eta(self, progress: Progress, model: str) -> None:
        """The seconds that a running job of this model still needs, by the speeds that were last measured."""
        progress.eta_s = _rounded(order.remaining_s(progress, self._forecasts.newest.engines.get(model)))

    async def _add_positions(self, queued: list[JobBrief], model_queues: Mapping[str, order.ModelQueue]) -> None:
        if not queued:
            return
        of_jobs = {job.id: job.model for job in queued}
        queue = await self._database.read(reads.queue, of_jobs)
        forecasts = order.forecasts(of_jobs, queue, model_queues, datetime.now(UTC))
        for job in queued:
            forecast = forecasts[job.id]
            job.progress = Progress(
                phase="queued",
                position=queue.positions.get(job.id),
                waits_for=forecast.waits_for,
                start_eta_s=_rounded(forecast.start_s),
                eta_s=_rounded(forecast.end_s),
            )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def may_grow(job: JobBrief) -> bool:
    """It was cancelled while it ran, so its worker may still store what it had written."""
    return job.status == "cancelled" and job.started_at is not None and job.completion_tokens is None
