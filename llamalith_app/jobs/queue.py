"""The sole speaker of SAQ: hints that there is work, and the workers that hear them.

A hint says "there is work for this model" and nothing more; it may be lost, doubled or late. There is one SAQ
queue a model. Knows nothing of SQL: what to do with a hint is the caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.exceptions import RedisError
from saq import Job, Worker
from saq.queue.redis import RedisQueue
from saq.types import ListenCallback, WorkerInfo

from llamalith_app.errors import ConfigError

OLDEST_REDIS = (6, 2)
HINT_TIMEOUT_S = 0.2
HINT_PAUSE_S = 0.01
"""Between two hints of one model. A worker that woke goes on until nothing is left, so more would say nothing new."""
PENDING_HINTS = 16
"""Hints of one model that wait to be sent; the oldest are dropped, the worker's own look finds their jobs."""
MIRROR_S = 5.0
"""How often a task tells SAQ its progress; SAQ cancels what is silent for HEARTBEAT_S."""
HEARTBEAT_S = 60
REFUSED_S = 1.0
"""Until a Redis that refuses is asked again."""
STOP_S = 2.0

log = structlog.get_logger(__name__)


class Hint(NamedTuple):
    job_id: int
    attempt: int


class TaskProgress(NamedTuple):
    """What SAQ, and so its monitor, is told of a task: a fraction and its words."""

    fraction: float
    meta: dict[str, Any]


def impatient_redis(url: str, timeout_s: float | None = None) -> Redis:
    """A client for what may fail: an answer within `timeout_s` (None: HINT_TIMEOUT_S) or an error, no second try."""
    timeout_s = HINT_TIMEOUT_S if timeout_s is None else timeout_s
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _patient_redis(url: str) -> Redis:
    # Without its own retries a SAQ worker burns a core while Redis is away and runs what it had finished again.
    return Redis.from_url(
        url,
        socket_timeout=15,
        socket_connect_timeout=5,
        health_check_interval=15,
        retry=Retry(EqualJitterBackoff(cap=2, base=0.1), -1),
    )


async def refuse_old_redis(url: str) -> None:
    """Raises ConfigError for a server older than OLDEST_REDIS; says nothing of one that is away."""
    redis = impatient_redis(url)
    try:
        info = await redis.info("server")
    except (RedisError, OSError):
        return
    finally:
        await redis.aclose()
    version = str(info.get("redis_version", ""))
    try:
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return
    if numbers < OLDEST_REDIS:
        needed = ".".join(map(str, OLDEST_REDIS))
        raise ConfigError([f"REDIS_URL: this server is Redis {version}; {needed} or newer is needed"])


class _PatientQueue(RedisQueue):
    """SAQ asks anew at once when Redis refuses, as one does whose disk or memory is full: half a core for nothing, and
    a traceback for each of its timers."""

    _is_refused = False

    async def dequeue(self, timeout: float = 0, poll_interval: float = 0.0) -> Job | None:  # noqa: ASYNC109 - SAQ's own
        try:
            job = await super().dequeue(timeout, poll_interval)
        except RedisError as error:
            if not self._is_refused:
                log.warning("redis refuses; jobs start by the worker's own look", queue=self.name, reason=str(error))
            self._is_refused = True
            await asyncio.sleep(REFUSED_S)
            return None
        self._is_refused = False
        return job

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        with contextlib.suppress(RedisError):
            return await super().sweep(lock, abort)
        return []

    async def listen(
        self,
        job_keys: Iterable[str],
        callback: ListenCallback,
        timeout: float | None = 10,  # noqa: ASYNC109 - SAQ's own
        poll_interval: float = 0.5,
    ) -> None:
        """A sweep would wait here for a dead worker to end its task, by a subscription. SAQ cancels the task that reads
        it without waiting for its end and forgets it: now and then it is destroyed while it is pending, or reads on
        beside the next one, which fails then as fast as it can. Nobody ends such a task, so nothing is waited for."""

    async def write_worker_info(self, worker_id: str, info: WorkerInfo, ttl: int) -> None:
        with contextlib.suppress(RedisError):
            await super().write_worker_info(worker_id, info, ttl)


def saq_queue(redis: Redis, model: str) -> RedisQueue:
    return _PatientQueue(redis, name=f"llamalith:{model}", dump=msgspec.json.encode, load=msgspec.json.decode)


async def enqueue(queue: RedisQueue, hint: Hint) -> None:
    await queue.enqueue(
        "wake",
        job_id=hint.job_id,
        key=f"j{hint.job_id}.a{hint.attempt}",
        timeout=0,
        heartbeat=HEARTBEAT_S,
        retries=1,
        ttl=60,
    )


class Hints:
    """Sends hints beside the answers of the web process; never makes one wait, never raises."""

    def __init__(self, redis_url: str, models: tuple[str, ...]) -> None:
        self._redis = impatient_redis(redis_url)
        self._queues = {model: saq_queue(self._redis, model) for model in models}
        self._pending: dict[str, deque[Hint]] = {model: deque(maxlen=PENDING_HINTS) for model in models}
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._away = False

    def send(self, model: str, job_id: int, attempt: int = 1) -> None:
        """`attempt`: the one that the hint is for; part of SAQ's key, so that a dead worker's entry blocks nothing."""
        if (pending := self._pending.get(model)) is None:
            return  # it was offered when the answer was given that is repeated now
        pending.append(Hint(job_id, attempt))
        if (sender := self._senders.get(model)) is None or sender.done():
            self._senders[model] = asyncio.create_task(self._send_pending(model))

    async def close(self) -> None:
        for sender in self._senders.values():
            sender.cancel()
        await asyncio.gather(*self._senders.values(), return_exceptions=True)
        await self._redis.aclose()

    async def _send_pending(self, model: str) -> None:
        pending = self._pending[model]
        while pending:
            hint = pending.popleft()
            try:
                await enqueue(self._queues[model], hint)
            except (RedisError, OSError, TimeoutError) as error:
                pending.clear()
                if not self._away:
                    log.warning("redis is away; jobs start by the worker's own look", reason=str(error))
                self._away = True
            else:
                if self._away:
                    log.info("redis is back")
                self._away = False
            await asyncio.sleep(HINT_PAUSE_S)


class Wakers:
    """One SAQ worker a model in this process, each with as many tasks as the model has slots (`n_slots`, by model).

    `wake(model, tell)` starts the work; `tell` takes the progress to show. A task that SAQ cancels leaves its work
    running: what runs is decided by leases, not by SAQ.
    """

    def __init__(
        self,
        redis_url: str,
        n_slots: Mapping[str, int],
        wake: Callable[[str, Callable[[TaskProgress], None]], asyncio.Task[None]],
    ) -> None:
        self._redis = _patient_redis(redis_url)
        self._wake = wake
        self._workers = [self._worker(model, n) for model, n in n_slots.items()]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(worker.start()) for worker in self._workers]

    async def stop(self) -> None:
        """Within some seconds: what the tasks began goes on by itself.

        Bounded, because an ending task tells Redis of its work, patiently, and Redis may be away. SAQ's own stop is not
        used: it forgets the tasks that it waits for, and nobody would hold them while they end.
        """
        ending = [*self._tasks]
        for worker in self._workers:
            worker.event.set()
            ending += worker.tasks
            for task in worker.tasks:
                task.cancel()
            worker.tasks.clear()
        if not ending:
            return
        _, late = await asyncio.wait(ending, timeout=STOP_S)
        # What SAQ left behind would otherwise connect anew, after everything was closed.
        self._redis.set_retry(Retry(NoBackoff(), 0))
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=STOP_S)
        await self._redis.aclose()

    def _worker(self, model: str, n_slots: int) -> Worker[Any]:
        async def wake(ctx: dict[str, Any], job_id: int) -> None:  # noqa: ARG001 - for people who look at the queue
            await self._run(model, ctx["job"])

        worker = Worker[Any](
            saq_queue(self._redis, model),
            functions=[("wake", wake)],
            concurrency=n_slots,
            dequeue_timeout=5,
            timers={"schedule": 3600, "worker_info": 10, "sweep": 15, "abort": 3600},
        )
        worker.SIGNALS = []
        return worker

    async def _run(self, model: str, job: Job) -> None:
        latest: list[TaskProgress] = []

        def tell(progress: TaskProgress) -> None:
            latest[:] = [progress]

        work = self._wake(model, tell)
        while not work.done():
            await asyncio.wait([work], timeout=MIRROR_S)
            if not work.done():
                progress = latest[0] if latest else TaskProgress(0.0, {})
                await job.update(progress=progress.fraction, meta=progress.meta)
        work.result()
