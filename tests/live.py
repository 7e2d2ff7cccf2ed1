"""What a worker would put into Redis."""

from __future__ import annotations

from redis.asyncio import Redis

from llamalith_app.contracts.jobs import Progress
from llamalith_app.streams import progress


async def publish(redis: Redis, record: str, job_id: int, attempt: int, state: Progress) -> None:
    pipeline = redis.pipeline()
    progress.put(pipeline, record, job_id, attempt, state)
    await pipeline.execute()
