"""When a job will start and end: what the record and the workers' beats say, put before `order.model_queues`.

Read by the web. One look at the record serves everybody for FRESH_S.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.jobs.order import ModelQueue, merged, model_queues
from llamalith_app.store import jobs, workers
from llamalith_app.store.database import Database

FRESH_S = 0.5
UNKNOWN_S = 60
"""Told to who finds the queue full before anything was measured."""


class Board(NamedTuple):
    engines: dict[str, EngineStatus]
    """By model, over all workers that are alive."""
    queued: dict[str, int]
    model_queues: dict[str, ModelQueue]


class Forecasts:
    def __init__(self, database: Database, models: tuple[str, ...], max_wait: Mapping[int, timedelta]) -> None:
        self._database = database
        self._models = models
        self._max_wait = max_wait
        self.newest = Board({}, {}, {})
        """As it was last looked at, however long ago."""
        self._fresh_until = 0.0

    async def board(self) -> Board:
        if time.monotonic() < self._fresh_until:
            return self.newest
        now = datetime.now(UTC)
        told = await self._database.read(workers.told, now)
        load = await self._database.read(jobs.load, self._models, now)
        engines = merged(one for text in told for one in msgspec.json.decode(text, type=list[EngineStatus]))
        self.newest = Board(engines, load.queued, model_queues(engines, load, self._max_wait, now))
        self._fresh_until = time.monotonic() + FRESH_S
        return self.newest

    async def retry_after_s(self) -> int:
        """Until the next queued job will have started, which makes room for one more."""
        board = await self.board()
        starts = [lane.start_s(1) for model, lane in board.model_queues.items() if board.queued.get(model)]
        return max(1, round(min((start for start in starts if start is not None), default=UNKNOWN_S)))
