"""Live progress of running attempts, beside the record: a short-lived Redis key an attempt.

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
"""Longer than any model loads; only an attempt that could not say its end to Redis leaves a key for so long."""
RETRY_READ_S = 1.0
"""After a failed read Redis is left alone for so long, so that a frozen one does not slow every poll."""


def _key(record: str, job_id: int, attempt: int) -> str:
    return f"llamalith:progress:{record}:{job_id}.{attempt}"


def put(pipeline: Any, record: str, job_id: int, attempt: int, progress: Progress) -> None:
    """Adds it to a pipeline of Redis commands."""
    pipeline.set(_key(record, job_id, attempt), msgspec.json.encode(progress), ex=EXPIRE_S)


def forget(pipeline: Any, record: str, job_id: int, attempt: int) -> None:
    """Adds to a pipeline that this attempt is over."""
    pipeline.unlink(_key(record, job_id, attempt))


class ProgressReader:
    def __init__(self, redis: Redis, record: str) -> None:
        self._redis = redis
        self._record = record
        self._not_before = 0.0

    async def read(self, attempts: dict[int, int]) -> dict[int, Progress]:
        """Of the running jobs given as job id -> attempt; those of which nothing is known are left out."""
        if not attempts or time.monotonic() < self._not_before:
            return {}
        try:
            values = await self._redis.mget([_key(self._record, *attempt) for attempt in attempts.items()])
        except (RedisError, OSError, TimeoutError):
            self._not_before = time.monotonic() + RETRY_READ_S
            return {}
        told = {job_id: _decode(value) for job_id, value in zip(attempts, values, strict=True)}
        return {job_id: progress for job_id, progress in told.items() if progress is not None}


def _decode(value: object) -> Progress | None:
    try:
        return msgspec.json.decode(value, type=Progress) if isinstance(value, bytes) else None
    except msgspec.MsgspecError:
        return None
