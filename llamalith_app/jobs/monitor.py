"""What SAQ's own monitor shows: its queues, its workers, its tasks with the progress they report.

Reads only. The monitor's page is SAQ's script; this is the other side of it, without SAQ's Retry, which would run a
running task twice. The record of jobs is SQL, and this module does not know it.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import MsgspecError
from redis.exceptions import RedisError
from saq.queue.redis import RedisQueue
from saq.web.common import STATIC_PATH, job_dict

from llamalith_app.errors import RedisUnavailable
from llamalith_app.jobs.queue import impatient_redis, saq_queue


@contextmanager
def _readable() -> Iterator[None]:
    """An absent Redis, and what SAQ says of an entry that is none of its own, as RedisUnavailable."""
    try:
        yield
    except (RedisError, OSError, MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RedisUnavailable(str(error) or type(error).__name__) from error


class Monitor:
    def __init__(self, redis_url: str, models: tuple[str, ...]) -> None:
        self._redis = impatient_redis(redis_url)
        self._queues: dict[str, RedisQueue] = {}
        for model in models:
            queue = saq_queue(self._redis, model)
            # SAQ's script puts names into addresses as they are.
            name = re.sub(r"[^\w.:-]", "_", queue.name, flags=re.ASCII)
            while name in self._queues:
                name += "_"
            self._queues[name] = queue
        self.assets = {
            "snabbdom.js": gzip.decompress((STATIC_PATH / "snabbdom.js.gz").read_bytes()),
            "app.js": (STATIC_PATH / "app.js").read_bytes(),
            "pico.min.css": gzip.decompress((STATIC_PATH / "pico.min.css.gz").read_bytes()),
        }
        """SAQ ships two of them compressed only; a client may not take that."""

    async def queues(self) -> list[dict[str, Any]]:
        """Raises RedisUnavailable, as the other two do."""
        return [await self._info(name, jobs=False) for name in self._queues]

    async def queue(self, name: str) -> dict[str, Any] | None:
        return await self._info(name, jobs=True) if name in self._queues else None

    async def job(self, name: str, key: str) -> dict[str, Any] | None:
        if name not in self._queues:
            return None
        with _readable():
            job = await self._queues[name].job(key)
        return None if job is None else job_dict(job) | {"queue": name}

    async def close(self) -> None:
        await self._redis.aclose()

    async def _info(self, name: str, *, jobs: bool) -> dict[str, Any]:
        with _readable():
            info = await self._queues[name].info(jobs=jobs)
        # The script shows text, no objects.
        shown = [job | {"kwargs": repr(job.get("kwargs"))} for job in info["jobs"]]
        return {**info, "name": name, "jobs": shown}
