"""Hints from web to worker, over SAQ: `Hints` sends them, `Wakers` receives them.

A hint says "there is work for this model" and nothing more. It may be lost, late, or arrive twice. Each model has one
SAQ queue. Only this module and `monitor.py` use SAQ. Knows no SQL: the worker decides what to do with a hint.
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
from llamalith_app.supervise.tasks import cancel_until_ended

MIN_REDIS_VERSION = (6, 2)
TIMEOUT_S = 0.2
"""How long a client without retries waits for Redis."""
HINT_INTERVAL_S = 0.01
"""Pause between two hints for one model. A worker that is awake runs all due jobs, so more hints say nothing new."""
PENDING_HINTS = 16
"""Hints for one model that wait to be sent. The oldest are dropped; the worker finds their jobs when it polls."""
HEARTBEAT_S = 60
"""SAQ cancels a task that has not updated its progress for this long."""
ERROR_BACKOFF_S = 1.0
"""Pause after Redis has answered with an error."""

log = structlog.get_logger(__name__)


class Hint(NamedTuple):
    job_id: int
    attempt: int


class TaskProgress(NamedTuple):
    """The progress of a task as SAQ stores it and its monitor shows it."""

    fraction: float
    """From 0 to 1."""
    meta: dict[str, Any]


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """How `Wakers` waits, in seconds."""

    mirror_s: float = 5.0
    """How often a task's progress is written to SAQ; well below HEARTBEAT_S."""
    stop_s: float = 2.0
    """How long a stop waits for SAQ's tasks, twice: first for their end, then for their cancellation."""


TIMINGS = Timings()


def redis_without_retries(url: str, timeout_s: float = TIMEOUT_S) -> Redis:
    """A client for calls that may fail: each gets an answer within `timeout_s` seconds, or raises."""
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _redis_with_retries(url: str) -> Redis:
    # Without retries a SAQ worker keeps a core busy while Redis is away, and runs finished tasks again.
    return Redis.from_url(
        url,
        socket_timeout=15,
        socket_connect_timeout=5,
        health_check_interval=15,
        retry=Retry(EqualJitterBackoff(cap=2, base=0.1), -1),
    )


async def refuse_old_redis(url: str, timeout_s: float = TIMEOUT_S) -> None:
    """Raises ConfigError if the server is older than MIN_REDIS_VERSION. Does nothing if it does not answer in time."""
    redis = redis_without_retries(url, timeout_s)
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
    if numbers < MIN_REDIS_VERSION:
        needed = ".".join(map(str, MIN_REDIS_VERSION))
        raise ConfigError([f"REDIS_URL: this server is Redis {version}; {needed} or newer is needed"])


class _PatientQueue(RedisQueue):
    """A SAQ queue that pauses after an error.

    A Redis whose disk or memory is full answers every command with an error. SAQ then tries again at once, which costs
    half a core and logs a traceback for each of its timers.
    """

    _has_failed = False

    async def dequeue(self, timeout: float = 0, poll_interval: float = 0.0) -> Job | None:  # noqa: ASYNC109 - SAQ's own
        try:
            job = await super().dequeue(timeout, poll_interval)
        except RedisError as error:
            if not self._has_failed:
                log.warning("redis answers with an error; workers poll for jobs", queue=self.name, reason=str(error))
            self._has_failed = True
            await asyncio.sleep(ERROR_BACKOFF_S)
            return None
        self._has_failed = False
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
        """Does nothing. SAQ's sweep would subscribe here and wait until a dead worker ends its task: for ever.

        SAQ's own version also leaks: it cancels the task that reads the subscription without awaiting it. That task is
        sometimes destroyed while pending, or goes on reading beside the next one, which then fails in a tight loop.
        """

    async def write_worker_info(self, worker_id: str, info: WorkerInfo, ttl: int) -> None:
        with contextlib.suppress(RedisError):
            await super().write_worker_info(worker_id, info, ttl)


def saq_queue(redis: Redis, model: str) -> RedisQueue:
    """The model's SAQ queue over this client."""
    return _PatientQueue(redis, name=f"llamalith:{model}", dump=msgspec.json.encode, load=msgspec.json.decode)


async def enqueue(queue: RedisQueue, hint: Hint) -> None:
    """Sends one hint. SAQ ignores a second one with the same job and attempt. Raises RedisError, OSError."""
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
    """Sends hints in the background of the web process: no answer waits for Redis, and no failure is raised.

    `timeout_s`: seconds that one hint may take.
    """

    def __init__(self, redis_url: str, models: tuple[str, ...], *, timeout_s: float = TIMEOUT_S) -> None:
        self._redis = redis_without_retries(redis_url, timeout_s)
        self._queues = {model: saq_queue(self._redis, model) for model in models}
        self._pending: dict[str, deque[Hint]] = {model: deque(maxlen=PENDING_HINTS) for model in models}
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._away = False

    def send(self, model: str, job_id: int, attempt: int = 1) -> None:
        """Schedules a hint and returns at once; does nothing for a model that is not configured.

        `attempt` is the number of the attempt that the hint is for. It is part of SAQ's key: the entry that a dead
        worker left for an earlier attempt then blocks nothing.
        """
        if (pending := self._pending.get(model)) is None:
            return  # the answer to an Idempotency-Key is repeated, and its model has been removed since
        pending.append(Hint(job_id, attempt))
        if (sender := self._senders.get(model)) is None or sender.done():
            self._senders[model] = asyncio.create_task(self._send_pending(model))

    async def close(self) -> None:
        """Drops the hints that are not sent yet: workers poll for their jobs."""
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
                    log.warning("redis is away; workers poll for jobs", reason=str(error))
                self._away = True
            else:
                if self._away:
                    log.info("redis is back")
                self._away = False
            await asyncio.sleep(HINT_INTERVAL_S)


class Wakers:
    """The receiving side: one SAQ worker for each model, each with as many tasks as the model has slots.

    `n_slots` maps models to slots. `wake(model, report)` starts the work and returns its task; the work calls `report`
    with its progress. If SAQ cancels a task, the work goes on: leases decide what runs, not SAQ.
    """

    def __init__(
        self,
        redis_url: str,
        n_slots: Mapping[str, int],
        wake: Callable[[str, Callable[[TaskProgress], None]], asyncio.Task[None]],
        timings: Timings = TIMINGS,
    ) -> None:
        self._timings = timings
        self._redis = _redis_with_retries(redis_url)
        self._wake = wake
        self._workers = [self._worker(model, n) for model, n in n_slots.items()]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to listen, in tasks of this loop."""
        self._tasks = [asyncio.create_task(worker.start()) for worker in self._workers]

    async def stop(self) -> None:
        """Stops listening, within twice `stop_s` seconds. Work that was started goes on.

        The wait is bounded because a task that ends writes to Redis, with retries, and Redis may be away. SAQ's own
        `stop` is not used: it drops its references to the tasks that it waits for.
        """
        # A worker whose start has not begun would make its event and its tasks after this.
        await asyncio.sleep(0)
        ending = [*self._tasks]
        for worker in self._workers:
            worker.event.set()
            ending += worker.tasks
            for task in worker.tasks:
                task.cancel()
            worker.tasks.clear()
        if not ending:
            return
        _, late = await asyncio.wait(ending, timeout=self._timings.stop_s)
        self._redis.set_retry(Retry(NoBackoff(), 0))
        await cancel_until_ended(late, within_s=self._timings.stop_s)
        await self._redis.aclose()

    def _worker(self, model: str, n_slots: int) -> Worker[Any]:
        async def wake(ctx: dict[str, Any], job_id: int) -> None:  # noqa: ARG001 - shown in SAQ's monitor
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

        def report(progress: TaskProgress) -> None:
            latest[:] = [progress]

        work = self._wake(model, report)
        while not work.done():
            await asyncio.wait([work], timeout=self._timings.mirror_s)
            if not work.done():
                progress = latest[0] if latest else TaskProgress(0.0, {})
                await job.update(progress=progress.fraction, meta=progress.meta)
        work.result()
