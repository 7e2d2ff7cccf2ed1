"""Adds to jobs that have not ended where they stand now: a position and what they wait for from the record, live counts
from Redis, and when that will have an end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import groupby

from llamalith_app.contracts.jobs import Job, Progress
from llamalith_app.jobs import order
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.order import Lane
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
        if not any(job.status in ("queued", "processing") for job in found):
            return
        live = await self._reader.read({job.id: job.attempt for job in found if job.status == "processing"})
        board = await self._forecasts.board()
        for job in found:
            if job.status == "processing" and (progress := live.get(job.id)) is not None:
                self.add_eta(progress, job.model)
                job.progress = progress
        if queued := {job.id: job for job in found if job.status == "queued"}:
            await self._add_places(queued, board.lanes)

    def add_eta(self, progress: Progress, model: str) -> None:
        """To what a running job of the model tells, by the speeds that were last seen."""
        progress.eta_s = _rounded(order.left_s(progress, self._forecasts.newest.engines.get(model)))

    async def _add_places(self, queued: dict[int, Job], lanes: Mapping[str, Lane]) -> None:
        of_jobs = {job.id: job.model for job in queued.values()}
        positions, before = await self._database.read(job_reads.queue, of_jobs)

        def tell(job_id: int, model: str, waits_for: int | None, free_s: float | None) -> float | None:
            """Seconds until its end. `free_s`: until that of the job that it waits for."""
            position, lane = positions.get(job_id), lanes.get(model)
            start_s = eta_s = None
            if position is not None and lane is not None and free_s is not None:
                start_s = lane.start_s(position, free_s)
                eta_s = lane.end_of(start_s)
            if job_id in queued:
                queued[job_id].progress = Progress(
                    phase="queued",
                    position=position,
                    waits_for=waits_for,
                    start_eta_s=_rounded(start_s),
                    eta_s=_rounded(eta_s),
                )
            return eta_s

        for job_id, model in of_jobs.items():
            tell(job_id, model, None, 0.0)
        now = datetime.now(UTC)
        for _, conversation in groupby(before, key=lambda one: one.conversation):
            waits_for: int | None = None
            free_s: float | None = 0.0
            for one in conversation:
                if one.started_at is None:
                    free_s = tell(one.id, one.model, waits_for, free_s)
                else:
                    lane = lanes.get(one.model)
                    free_s = None if lane is None else lane.left_s((now - one.started_at).total_seconds())
                waits_for = one.id


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def may_grow(job: Job) -> bool:
    """Cancelled while it ran: its worker may still add what it had written."""
    return job.status == "cancelled" and job.started_at is not None and job.completion_tokens is None
