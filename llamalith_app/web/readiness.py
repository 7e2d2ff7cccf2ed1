"""Can the application do its work: the database, Redis and a worker, looked at as seldom as probes allow."""

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
"""A readiness that is younger is told again, so that a crowd of probes costs no more than one."""


class Readings:
    """What /readyz last saw."""

    def __init__(self, database: Database, redis: Redis) -> None:
        self._database = database
        self._redis = redis
        self._lock = asyncio.Lock()
        self._read_at = 0.0
        self._last: Readiness | None = None

    async def read(self) -> Readiness:
        async with self._lock:
            if self._last is None or time.monotonic() - self._read_at > FRESH_S:
                self._last = await self._look()
                self._read_at = time.monotonic()
            return self._last

    async def _look(self) -> Readiness:
        database, worker = "ok", "unknown"
        try:
            async with asyncio.timeout(2):
                n_alive = await self._database.read(workers.n_alive, datetime.now(UTC))
            worker = "ok" if n_alive else "no worker is alive"
        except (StorageUnavailable, TimeoutError) as error:
            database = str(error) or "no answer within 2 s"
        redis = "ok"
        try:
            await self._redis.ping()
        except (RedisError, OSError, TimeoutError):
            redis = "no answer"
        return Readiness(ready=database == redis == worker == "ok", database=database, redis=redis, worker=worker)
