"""Checks whether jobs can run: the database, Redis, and a worker that is alive. Serves `/readyz`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from redis.asyncio import Redis
from redis.exceptions import RedisError

from llamalith_app.contracts.health import Readiness
from llamalith_app.errors import StorageUnavailable
from llamalith_app.store import workers
from llamalith_app.store.database import Database

FRESH_S = 0.5
"""A result is reused for so long, so that many probes cost no more than one."""
DATABASE_TIMEOUT_S = 2


class ReadinessCheck:
    """Checks at most once in FRESH_S seconds. `redis` needs a timeout of its own."""

    def __init__(self, database: Database, redis: Redis) -> None:
        self._database = database
        self._redis = redis
        self._lock = asyncio.Lock()
        self._read_at = 0.0
        self._last: Readiness | None = None

    async def check(self) -> Readiness:
        """The result of a check at most FRESH_S seconds old. Does not raise: failures are part of the result."""
        async with self._lock:
            if self._last is None or time.monotonic() - self._read_at > FRESH_S:
                self._last = await self._check_now()
                self._read_at = time.monotonic()
            return self._last

    async def _check_now(self) -> Readiness:
        database, worker = "ok", "unknown"
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT_S):
                n_alive = await self._database.read(workers.n_alive, datetime.now(UTC))
            worker = "ok" if n_alive else "no worker is alive"
        except (StorageUnavailable, TimeoutError) as error:
            database = str(error) or f"no answer within {DATABASE_TIMEOUT_S} s"
        redis = "ok"
        try:
            await self._redis.ping()
        except (RedisError, OSError, TimeoutError):
            redis = "no answer"
        return Readiness(ready=database == redis == worker == "ok", database=database, redis=redis, worker=worker)
