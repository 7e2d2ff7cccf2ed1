"""Reads what `order.model_queues` needs for its forecasts: the queues and the workers' heartbeats in the database.

Used by the web process. One reading serves all requests for FRESH_S seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.jobs.order import ModelQueue, merge_statuses, model_queues
from llamalith_app.store import workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import waiting

FRESH_S = 0.5
MOST_S = 60
"""The longest Retry-After of a full queue, and the one while no job has been measured yet. Some clients do not come
again after a longer one."""


class Board(NamedTuple):
    """Engines and queues of all models at one moment, each by model."""

    engines: dict[str, EngineStatus]
    """Merged over all workers that are alive."""
    queued: dict[str, int]
    """Numbers of queued jobs."""
    model_queues: dict[str, ModelQueue]


class Forecasts:
    """`max_wait`: by priority, as `order.max_wait_by_priority` returns it."""

    def __init__(self, database: Database, models: tuple[str, ...], max_wait: Mapping[int, timedelta]) -> None:
        self._database = database
        self._models = models
        self._max_wait = max_wait
        self.newest = Board({}, {}, {})
        """The last reading, however old."""
        self._fresh_until = 0.0

    async def board(self) -> Board:
        """A reading at most FRESH_S seconds old. Raises StorageUnavailable."""
        if time.monotonic() < self._fresh_until:
            return self.newest
        now = datetime.now(UTC)
        reported = await self._database.read(workers.statuses, now)
        load = await self._database.read(waiting.queue_depth, self._models, now)
        engines = merge_statuses(
            status for text in reported for status in msgspec.json.decode(text, type=list[EngineStatus])
        )
        self.newest = Board(engines, load.queued, model_queues(engines, load, self._max_wait, now))
        self._fresh_until = time.monotonic() + FRESH_S
        return self.newest

    async def retry_after_s(self) -> int:
        """Seconds until a queued job starts and makes room for another one; 1 to MOST_S. Raises StorageUnavailable."""
        board = await self.board()
        starts = [queue.start_s(1) for model, queue in board.model_queues.items() if board.queued.get(model)]
        return max(1, round(min((start for start in starts if start is not None and start < MOST_S), default=MOST_S)))
