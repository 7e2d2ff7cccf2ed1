"""The worker process: its composition root, its timers, its drain.

Hints wake it, its own look finds what no hint told, its beat keeps its leases, its watch stops what lost its lease
(a cancel is nothing else), its sweep ends those of others that are gone. Imports nothing of the web.
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

from llamalith_app.errors import StorageUnavailable
from llamalith_app.grammars import grammar
from llamalith_app.jobs import queue
from llamalith_app.jobs.worker import memory
from llamalith_app.jobs.worker.generate import Generation
from llamalith_app.jobs.worker.pool import Pool
from llamalith_app.jobs.worker.sweep import BEAT_S, SWEEP_S, Sweeper, hold_lock
from llamalith_app.settings.config import Config
from llamalith_app.store import jobs, workers
from llamalith_app.store.database import Database
from llamalith_app.store.record import record_id
from llamalith_app.store.tables import Outcome
from llamalith_app.streams import resume
from llamalith_app.supervise import signals

WATCH_S = 0.2
"""Between two looks at which leases still hold, while anything runs: so long a cancel waits to be heard."""
TROUBLE_S = 1.0
"""The least pause after a timer that failed."""
TEND_S = 1.0
"""Between two looks for models that were idle for long, or are missing."""
GIVE_BACK_S = 2.0
"""How long a drain waits for the jobs that it stopped, and again for those that were loading."""

log = structlog.get_logger(__name__)


class Worker:
    """`engine_argv`: the command of the engine child where it is not the real one."""

    def __init__(
        self,
        config: Config,
        engine_argv: Sequence[str] | None = None,
        *,
        redis_timeout_s: float = queue.TIMEOUT_S,
        queue_timings: queue.Timings = queue.TIMINGS,
    ) -> None:
        self._config = config
        self._queue_timings = queue_timings
        self._models = {model.name: model for model in config.models}
        self._database = Database(config.database_path)
        self._redis = queue.redis_without_retries(config.redis_url, redis_timeout_s)
        self._history_redis = queue.redis_without_retries(config.redis_url, resume.RESUME_TIMEOUT_S)
        budget_mb = config.memory_budget_mb
        self._pool = Pool(
            self._models,
            budget_bytes=memory.machine_bytes() if budget_mb is None else budget_mb * memory.MIB,
            worker_count=config.n_slots,
            idle_unload_s=config.idle_unload_s,
            state_dir=str(config.data_dir / "states") if config.state_cache_mb else "",
            state_max_bytes=config.state_cache_mb * memory.MIB,
            engine_argv=engine_argv,
        )
        self._lock_path = config.data_dir / "run" / f"worker-{os.getpid()}-{os.urandom(4).hex()}.lock"
        self._timers: list[asyncio.Task[None]] = []
        self._pauses: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._hurried = asyncio.Event()

    async def start(self) -> None:
        self._lock = hold_lock(self._lock_path)
        await self._pool.survey()
        n_slots = {model: plan.n_slots for model, plan in self._pool.plans.items()}
        self._database.open()
        self.id = await self._registered(sum(n_slots.values()))
        self.generation = Generation(
            self._database,
            self._pool,
            self._redis,
            self._history_redis,
            record=record_id(self._config.database_path),
            worker_id=self.id,
            models=self._models,
            grammars=grammar.load(self._config.grammar_dir),
            max_wait=self._config.max_wait_s,
            wake_later=self._look_after,
        )
        days = self._config.retention_days
        self._sweeper = Sweeper(
            self._database,
            self.id,
            lambda: self.generation.running,
            self._look_after,
            self._tell_engines,
            None if days is None else timedelta(days=days),
        )
        self._wakers = queue.Wakers(self._config.redis_url, n_slots, self.generation.start, self._queue_timings)
        self._wakers.start()
        self._timers = [
            asyncio.create_task(self._each(SWEEP_S, self._sweep_and_look)),
            asyncio.create_task(self._each(BEAT_S, self._beat)),
            asyncio.create_task(self._each(WATCH_S, self._watch)),
            asyncio.create_task(self._each(TEND_S, self._tend)),
        ]
        log.info("worker ready", worker_id=self.id, n_slots=n_slots, memory_mib=self._pool.budget_bytes // memory.MIB)

    async def drain(self, grace_s: float) -> None:
        """Claims nothing more, lets running jobs end for `grace_s` seconds, gives the others back, and ends."""
        self.generation.draining.set()
        await self._wakers.stop()
        log.info("draining", running=len(self.generation.running), grace_s=grace_s)
        hurried = asyncio.create_task(self._hurried.wait())
        all_ended = asyncio.create_task(self.generation.settled(grace_s))
        await asyncio.wait({hurried, all_ended}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        all_ended.cancel()
        settled = await self.generation.settled(0)
        if not settled:
            for running in list(self.generation.running.values()):
                self.generation.stop(running, Outcome.RELEASED)
            settled = await self.generation.settled(GIVE_BACK_S)
        # An engine that is still loading hears no cancel, but its end.
        await self._pool.close()
        await self.generation.settled(GIVE_BACK_S)
        self._stopped.set()
        await asyncio.gather(*self._timers, *self._pauses)
        # A database that was locked kept the timers waiting too, and may be free by now.
        settled = await self.generation.settled(0)
        try:
            if settled:
                await self._database.write_lightly(workers.end, self.id, datetime.now(UTC))
                await self._database.close()
                self._lock_path.unlink(missing_ok=True)
        except StorageUnavailable:
            settled = False
        await self._redis.aclose()
        await self._history_redis.aclose()
        # The lock is free from here on: whoever sweeps next takes what could not be given back.
        self._lock.close()
        log.log(
            logging.INFO if settled else logging.ERROR,
            "worker ended" if settled else "worker ended before it could give back its jobs",
            worker_id=self.id,
        )

    def hurry(self) -> None:
        """Cuts the grace of a drain short: what runs is given back now."""
        self._hurried.set()

    async def _registered(self, n_slots: int) -> int:
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
                await asyncio.sleep(TROUBLE_S)

    async def _sweep_and_look(self) -> None:
        await self._sweeper.sweep()
        await self.generation.look()

    def _tell_engines(self) -> str:
        return msgspec.json.encode(self._pool.told(self.generation.speeds)).decode()

    async def _tend(self) -> None:
        self._pool.tend(time.monotonic())
        self._pool.watch(TEND_S)

    async def _beat(self) -> None:
        if mine := list(self.generation.running):
            await self._database.write_lightly(jobs.beat, mine)

    async def _watch(self) -> None:
        """Stops what holds its lease no more: it was cancelled, or another worker took it away."""
        mine = self.generation.running
        asked = [lease_token for lease_token, running in mine.items() if running.ends_as is None]
        if not asked:
            return
        held = {lease.lease_token for lease in await self._database.read(jobs.held, self.id)}
        for lease_token in asked:
            if lease_token not in held and lease_token in mine:
                self.generation.stop(mine[lease_token], Outcome.LOST)

    async def _each(self, seconds: float, act: Callable[[], Awaitable[None]]) -> None:
        """Now and then until the drain's end, whatever the database says meanwhile."""
        while not self._stopped.is_set():
            pause = max(seconds, TROUBLE_S)
            try:
                await act()
                pause = seconds
            except StorageUnavailable as error:
                log.warning("the record cannot be used now", reason=str(error))
            except Exception:
                log.exception("a timer failed unexpectedly")
            await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        """Ends early when the worker does; a task that is cancelled in a read would leave its connection behind."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    def _look_after(self, pause: timedelta) -> None:
        async def look() -> None:
            await self._pause(pause.total_seconds() + 0.01)
            with contextlib.suppress(StorageUnavailable):  # the next sweep looks again
                await self.generation.look()

        task = asyncio.create_task(look())
        self._pauses.add(task)
        task.add_done_callback(self._pauses.discard)


async def run(
    config: Config, *, grace_s: float, engine_argv: Sequence[str] | None = None, supervised: bool = False
) -> None:
    """Runs until SIGTERM, SIGINT or SIGHUP, then drains; a second SIGTERM or SIGINT ends the process at once.

    `supervised`: by `up`, which uses SIGKILL for that. While it lives, a second SIGTERM only says that somebody else
    told all processes of the service, as systemd does; once it is gone, the next `up` asks for the place, and gets it
    as soon as the jobs are given back.
    """
    parent_pid = os.getppid()
    ended = asyncio.Event()
    insisted = False
    loop = asyncio.get_running_loop()
    worker = Worker(config, engine_argv)

    def on_signal(number: int) -> None:
        nonlocal insisted
        if insisted and signals.kills_when_repeated(number):
            if not supervised:
                os._exit(128 + number)
            if os.getppid() != parent_pid:
                worker.hurry()
        insisted |= signals.kills_when_repeated(number)
        ended.set()

    for number in signals.requests_to_end():
        loop.add_signal_handler(number, on_signal, number)
    starting, asked_to_end = asyncio.ensure_future(worker.start()), asyncio.ensure_future(ended.wait())
    await asyncio.wait((starting, asked_to_end), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # Nothing is claimed before the end of the start; a row of this worker is swept as one of a dead worker.
        log.info("worker ended before it was ready")
        return
    await starting
    await asked_to_end
    await worker.drain(grace_s)
