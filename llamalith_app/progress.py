"""Live progress of running jobs, beside the record: a short-lived Redis key a job.

The worker puts it beside what it tells by `streams.py`; the web reads it for lists and single jobs. All of it may be
lost at any moment: a reader gets nothing then, soon and without an error. Knows nothing of SQL and of engines.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from llamalith_app.contracts.jobs import Progress

EXPIRE_S = 3600
"""Longer than any model loads; a key that outlives its attempt is never told."""
RETRY_READ_S = 1.0
"""After a failed read Redis is left alone for so long, so that a frozen one does not slow every poll."""


class Published(msgspec.Struct, frozen=True):
    attempt: int
    progress: Progress


def _key(job_id: int) -> str:
    return f"llamalith:progress:{job_id}"


def put(pipeline: Any, job_id: int, attempt: int, progress: Progress) -> None:
    """Adds it to a pipeline of Redis commands."""
    pipeline.set(_key(job_id), msgspec.json.encode(Published(attempt, progress)), ex=EXPIRE_S)


class ProgressReader:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._not_before = 0.0

    async def read(self, attempts: dict[int, int]) -> dict[int, Progress]:
        """Of the running jobs given as job id -> attempt; those of which nothing is known are left out."""
        if not attempts or time.monotonic() < self._not_before:
            return {}
        try:
            values = await self._redis.mget([_key(job_id) for job_id in attempts])
        except (RedisError, OSError, TimeoutError):
            self._not_before = time.monotonic() + RETRY_READ_S
            return {}
        found = {}
        for (job_id, attempt), value in zip(attempts.items(), values, strict=True):
            live = _decode(value) if isinstance(value, bytes) else None
            if live is not None and live.attempt == attempt:
                found[job_id] = live.progress
        return found


def _decode(value: bytes) -> Published | None:
    try:
        return msgspec.json.decode(value, type=Published)
    except msgspec.MsgspecError:
        return None
