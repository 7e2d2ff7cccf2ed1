"""Live progress of running attempts: one Redis key per attempt, with a TTL.

The worker sets it in the pipeline that publishes its stream entries. The web reads it for lists and single jobs. Any
key may be lost at any time: the reader then returns nothing, without an error or a wait. Knows no SQL and no engine.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from llamalith_app.contracts.jobs import Progress

TTL_S = 3600
"""Longer than any model loads. An attempt deletes its key when it ends, unless Redis is unavailable then."""
READ_BACKOFF_S = 1.0
"""After a failed read, reads return nothing for this long, so that a frozen Redis does not slow every poll."""


def _key(record: str, job_id: int, attempt: int) -> str:
    return f"llamalith:progress:{record}:{job_id}.{attempt}"


def put(pipeline: Any, record: str, job_id: int, attempt: int, progress: Progress) -> None:
    """Adds the command that sets an attempt's progress to a pipeline."""
    pipeline.set(_key(record, job_id, attempt), msgspec.json.encode(progress), ex=TTL_S)


def delete(pipeline: Any, record: str, job_id: int, attempt: int) -> None:
    """Adds the command that deletes an attempt's progress to a pipeline."""
    pipeline.unlink(_key(record, job_id, attempt))


class ProgressReader:
    def __init__(self, redis: Redis, record: str) -> None:
        self._redis = redis
        self._record = record
        self._not_before = 0.0

    async def read(self, attempts: dict[int, int]) -> dict[int, Progress]:
        """The progress of running jobs by job id, without those that have none. `attempts`: job id -> attempt."""
        if not attempts or time.monotonic() < self._not_before:
            return {}
        try:
            values = await self._redis.mget([_key(self._record, *attempt) for attempt in attempts.items()])
        except (RedisError, OSError, TimeoutError):
            self._not_before = time.monotonic() + READ_BACKOFF_S
            return {}
        found = {job_id: _decode(value) for job_id, value in zip(attempts, values, strict=True)}
        return {job_id: progress for job_id, progress in found.items() if progress is not None}


def _decode(value: object) -> Progress | None:
    try:
        return msgspec.json.decode(value, type=Progress) if isinstance(value, bytes) else None
    except msgspec.MsgspecError:
        return None
