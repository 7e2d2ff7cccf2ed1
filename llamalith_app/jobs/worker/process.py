"""The worker of one process: its composition root, its timers, its drain. `run.py` says when it drains.

Hints wake it, its poll finds jobs without a hint, its heartbeat keeps its leases, its lease check stops attempts that
lost theirs (as by a cancel), its sweep takes the leases of workers that are gone. Imports nothing of the web.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import structlog

from llamalith_app.engine.client.factory import LocalEngines
from llamalith_app.engine.client.local import DEFAULT_TIMINGS, LocalTimings
from llamalith_app.engine.client.protocol import EngineFactory
from llamalith_app.errors import StorageUnavailable
from llamalith_app.grammars import grammar
from llamalith_app.jobs import queue
from llamalith_app.jobs.wishes import WishReader
from llamalith_app.jobs.worker import memory, sweep
from llamalith_app.jobs.worker.attempt import AttemptExecutor, AttemptTimings
from llamalith_app.jobs.worker.dispatch import Dispatcher
from llamalith_app.jobs.worker.pool import Pool
from llamalith_app.jobs.worker.running import StopReason
from llamalith_app.jobs.worker.settle import Settler
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.jobs.worker.sweep import SweepBatches, Sweeper, SweepTimings, hold_lock
from llamalith_app.jobs.worker.tasks import TaskSet
from llamalith_app.settings.config import Config
from llamalith_app.store import workers
from llamalith_app.store.database import LOCK_DEADLINE_S, Database
from llamalith_app.store.jobs import leases, transitions
from llamalith_app.store.jobs.transitions import UNKNOWN_TIMES, AttemptTimes
from llamalith_app.store.record import record_id
from llamalith_app.streams import publisher
from llamalith_app.streams.publisher import StreamPublisher

log = structlog.get_logger(__name__)


class WorkerTimings(msgspec.Struct, frozen=True, kw_only=True):
    lease_check_s: float = 0.2
    """Between two checks of which leases still hold, while anything runs: the longest that a cancel is not noticed."""
    tend_s: float = 1.0
    """Between two looks for models that were idle for long, are to be preloaded, or have hung."""
    trouble_s: float = 1.0
    """The least pause after a timer that failed."""
    give_back_s: float = 2.0
    """How long a drain waits for the attempts that it stopped, and again for those that were loading."""
    redis_timeout_s: float = queue.TIMEOUT_S
    """Of the client that publishes."""
    lock_deadline_s: float = LOCK_DEADLINE_S
    """How long a write waits for another process's transaction."""
    queue: queue.Timings = queue.TIMINGS
    sweep: SweepTimings = SweepTimings()
    attempt: AttemptTimings = AttemptTimings()
    stream: publisher.Timings = publisher.TIMINGS


TIMINGS = WorkerTimings()


def local_engines(
    config: Config, argv: Sequence[str] | None = None, timings: LocalTimings = DEFAULT_TIMINGS
) -> LocalEngines:
    """The engines of a worker with this configuration. `argv`: the command of the child; None: the real engine."""
    return LocalEngines(
        default_n_slots=config.n_slots,
        state_dir=str(config.data_dir / "states") if config.state_cache_mb else "",
        state_max_bytes=config.state_cache_mb * memory.MIB,
        argv=argv,
        timings=timings,
    )


class Worker:
    """`engines`: None: `local_engines`."""

    def __init__(
        self,
        config: Config,
        engines: EngineFactory | None = None,
        *,
        timings: WorkerTimings = TIMINGS,
        batches: SweepBatches = sweep.BATCHES,
    ) -> None:
        self._config = config
        self._timings = timings
        self._batches = batches
        self._models = {model.name: model for model in config.models}
        self._database = Database(config.database_path, timings.lock_deadline_s)
        self._redis = queue.redis_without_retries(config.redis_url, timings.redis_timeout_s)
        self._history_redis = queue.redis_without_retries(config.redis_url, timings.attempt.resume_timeout_s)
        budget_mb = config.memory_budget_mb
        self._budget_bytes = memory.machine_bytes() if budget_mb is None else budget_mb * memory.MIB
        self._pool = Pool(
            self._models,
            engines or local_engines(config),
            budget_bytes=self._budget_bytes,
            idle_unload_s=config.idle_unload_s,
        )
        self._speeds = Speeds()
        self._lock_path = config.data_dir / "run" / f"worker-{os.getpid()}-{os.urandom(4).hex()}.lock"
        self._timers: list[asyncio.Task[None]] = []
        self._noted_times: dict[str, AttemptTimes] = {}
        """How far the running attempts came, as the record has it; by lease token."""
        self._later_polls = TaskSet()
        self._stopped = asyncio.Event()
        self._hurried = asyncio.Event()

    async def start(self) -> None:
        self._lock = hold_lock(self._lock_path)
        await self._pool.survey()
        n_slots = {model: plan.n_slots for model, plan in self._pool.plans.items()}
        self._database.open()
        self.id = await self._register(sum(n_slots.values()))
        self.dispatcher = self._make_dispatcher()
        self._wishes = WishReader(self._redis, record_id(self._config.database_path), self._models)
        self._sweeper = self._make_sweeper()
        self._wakers = queue.Wakers(self._config.redis_url, n_slots, self.dispatcher.wake, self._timings.queue)
        self._wakers.start()
        timings = self._timings
        self._timers = [
            asyncio.create_task(self._repeat(timings.sweep.sweep_s, self._sweep_and_poll)),
            asyncio.create_task(self._repeat(timings.sweep.heartbeat_s, self._heartbeat)),
            asyncio.create_task(self._repeat(timings.lease_check_s, self._check_leases)),
            asyncio.create_task(self._repeat(timings.tend_s, self._tend)),
            asyncio.create_task(self._repeat(timings.tend_s, self._fulfil_wishes)),
        ]
        log.info("worker ready", worker_id=self.id, n_slots=n_slots, memory_mib=self._budget_bytes // memory.MIB)

    def _make_dispatcher(self) -> Dispatcher:
        tasks, record = TaskSet(), record_id(self._config.database_path)
        settler = Settler(self._database, self._speeds, self._poll_later)
        attempts = AttemptExecutor(
            self._database,
            StreamPublisher(self._redis, record, self._timings.stream),
            self._history_redis,
            settler,
            record=record,
            models=self._models,
            grammars=grammar.load(self._config.grammar_dir),
            tasks=tasks,
            timings=self._timings.attempt,
        )
        return Dispatcher(
            self._database,
            self._pool,
            attempts,
            settler,
            worker_id=self.id,
            models=self._models,
            max_wait=self._config.max_wait_s,
            tasks=tasks,
            wake_later=self._poll_later,
        )

    def _make_sweeper(self) -> Sweeper:
        days, v1_days = self._config.retention_days, self._config.v1_keep_days
        return Sweeper(
            self._database,
            self.id,
            lambda: self.dispatcher.running,
            self._poll_later,
            self._engine_statuses,
            None if days is None else timedelta(days=days),
            v1_retention=None if v1_days is None else timedelta(days=v1_days),
            restorable=timedelta(days=self._config.restore_days),
            auto_titles=self._config.auto_titles,
            timings=self._timings.sweep,
            batches=self._batches,
        )

    async def drain(self, grace_s: float) -> None:
        """Claims nothing more, lets running jobs end for `grace_s` seconds, gives the others back, and ends."""
        self.dispatcher.draining.set()
        await self._wakers.stop()
        log.info("draining", running=len(self.dispatcher.running), grace_s=grace_s)
        await self._wait_for_grace(grace_s)
        give_back_s = self._timings.give_back_s
        if not await self.dispatcher.all_end(0):
            self.dispatcher.stop_all(StopReason.DRAIN)
            await self.dispatcher.all_end(give_back_s)
        # An engine that is still loading reads no cancel, but can be ended.
        await self._pool.close()
        await self.dispatcher.all_end(give_back_s)
        self._stopped.set()
        await asyncio.gather(*self._timers)
        await self._later_polls.all_end()
        # A database that was locked kept the timers waiting too, and may be free by now.
        has_given_back = await self.dispatcher.all_end(0) and await self._leave_record()
        await self._redis.aclose()
        await self._history_redis.aclose()
        # The lock is free from here on: whoever sweeps next takes what could not be given back.
        self._lock.close()
        log.log(
            logging.INFO if has_given_back else logging.ERROR,
            "worker ended" if has_given_back else "worker ended before it could give back its jobs",
            worker_id=self.id,
        )

    async def _wait_for_grace(self, grace_s: float) -> None:
        """Until nothing runs any more, the grace is over, or the drain is hurried."""
        hurried = asyncio.create_task(self._hurried.wait())
        all_ended = asyncio.create_task(self.dispatcher.all_end(grace_s))
        await asyncio.wait({hurried, all_ended}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        all_ended.cancel()

    async def _leave_record(self) -> bool:
        """False: the database cannot be used now."""
        try:
            await self._database.write_lightly(workers.end, self.id, datetime.now(UTC))
            await self._database.close()
            self._lock_path.unlink(missing_ok=True)
        except StorageUnavailable:
            return False
        return True

    def hurry(self) -> None:
        """Cuts the grace of a drain short: what runs is given back now."""
        self._hurried.set()

    async def _register(self, n_slots: int) -> int:
        """The worker's id, once the database takes writes."""
        while True:
            try:
                return await self._database.write(
                    workers.register,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    lock_path=str(self._lock_path),
                    models=list(self._models),
                    n_slots=n_slots,
                    now=datetime.now(UTC),
                )
            except StorageUnavailable as error:
                log.warning("a worker waits for the database", reason=str(error))
                await asyncio.sleep(self._timings.trouble_s)

    async def _sweep_and_poll(self) -> None:
        await self._sweeper.sweep()
        await self.dispatcher.poll()

    def _engine_statuses(self) -> str:
        return msgspec.json.encode(self._pool.statuses(self._speeds)).decode()

    async def _tend(self) -> None:
        self._pool.tend(time.monotonic())
        self._pool.watch(self._timings.tend_s)

    async def _fulfil_wishes(self) -> None:
        for model, wish in (await self._wishes.read()).items():
            if self._pool.load(model) if wish.word == "load" else self._pool.unload(model):
                log.info("a wish is fulfilled", model=model, wish=wish.word)
                self._wishes.fulfilled(model, wish)

    async def _heartbeat(self) -> None:
        if not (mine := dict(self.dispatcher.running)):
            return
        await self._database.write_lightly(leases.heartbeat, list(mine))
        times = {lease_token: running.times for lease_token, running in mine.items()}
        if new := {
            token: known for token, known in times.items() if known != self._noted_times.get(token, UNKNOWN_TIMES)
        }:
            await self._database.write_lightly(transitions.note_times, new)
        self._noted_times = times

    async def _check_leases(self) -> None:
        """Stops attempts whose lease is lost: the job was cancelled, or another worker took the lease away. Closes the
        thinking of those that are to answer now."""
        mine = self.dispatcher.running
        to_check = [lease_token for lease_token, running in mine.items() if running.stop_reason is None]
        if not to_check:
            return
        held = {lease.lease_token: lease for lease in await self._database.read(leases.active_leases, self.id)}
        for lease_token in to_check:
            if (running := mine.get(lease_token)) is None:
                continue
            if lease_token not in held:
                running.stop(StopReason.LEASE_LOST)
            elif held[lease_token].answers_now:
                running.answer_now()

    async def _repeat(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        """Until the drain's end, whatever the database answers meanwhile."""
        while not self._stopped.is_set():
            pause_s = max(seconds, self._timings.trouble_s)
            try:
                await act()
                pause_s = seconds
            except StorageUnavailable as error:
                log.warning("the record cannot be used now", reason=str(error))
            except Exception:
                log.exception("a timer failed unexpectedly")
            await self._pause(pause_s)

    async def _pause(self, seconds: float) -> None:
        """Ends early when the worker does; a task that is cancelled in a read would leave its connection behind."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    def _poll_later(self, pause: timedelta) -> None:
        async def poll() -> None:
            await self._pause(pause.total_seconds() + 0.01)
            with contextlib.suppress(StorageUnavailable):  # the next sweep polls again
                await self.dispatcher.poll()

        self._later_polls.start(poll())
