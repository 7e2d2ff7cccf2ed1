"""Serves the data that SAQ's own monitor page shows: queues, workers, and tasks with their progress.

Called by `controllers/monitor.py`. It only reads: SAQ's Retry button would run a running task twice. Knows nothing of
the jobs in the database.
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
from llamalith_app.jobs.queue import TIMEOUT_S, redis_without_retries, saq_queue


@contextmanager
def _readable() -> Iterator[None]:
    """Raises RedisUnavailable if Redis does not answer or holds an entry that SAQ cannot read."""
    try:
        yield
    except (RedisError, OSError, MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RedisUnavailable(str(error) or type(error).__name__) from error


class Monitor:
    """Reads SAQ's queues of these models. `timeout_s`: seconds that one question to Redis may take."""

    def __init__(self, redis_url: str, models: tuple[str, ...], *, timeout_s: float = TIMEOUT_S) -> None:
        self._redis = redis_without_retries(redis_url, timeout_s)
        self._queues: dict[str, RedisQueue] = {}
        for model in models:
            queue = saq_queue(self._redis, model)
            # SAQ's script puts queue names into URLs without encoding them.
            name = re.sub(r"[^\w.:-]", "_", queue.name, flags=re.ASCII)
            while name in self._queues:
                name += "_"
            self._queues[name] = queue
        self.assets = {
            "snabbdom.js": gzip.decompress((STATIC_PATH / "snabbdom.js.gz").read_bytes()),
            "app.js": (STATIC_PATH / "app.js").read_bytes(),
        }
        """The page's scripts by name. SAQ ships one of them only compressed, which some clients do not accept. Its
        stylesheet is left out: it would style our frame as well."""

    async def queues(self) -> list[dict[str, Any]]:
        """All queues, without their tasks. Raises RedisUnavailable, as `queue` and `job` do."""
        return [await self._info(name, jobs=False) for name in self._queues]

    async def queue(self, name: str) -> dict[str, Any] | None:
        """One queue with its tasks; None if there is none of that name."""
        return await self._info(name, jobs=True) if name in self._queues else None

    async def job(self, name: str, key: str) -> dict[str, Any] | None:
        """One task of a queue; None if the queue or the task does not exist."""
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
        # SAQ's script shows text only, no objects.
        shown = [job | {"kwargs": repr(job.get("kwargs"))} for job in info["jobs"]]
        return {**info, "name": name, "jobs": shown}
