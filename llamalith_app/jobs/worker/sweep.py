"""Takes leases away from attempts that nobody makes any more, gives up what waited longer than it may, and forgets what
is not to be kept any longer.

A lease is dead when the worker that holds it is gone from this machine (its lock file is free), or when its beat
stood still for STALE_S of this process's own clock; no wall clock decides. Knows no engine and no Redis.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Container, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import structlog

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs import order
from llamalith_app.store import jobs, keys, retention, workers
from llamalith_app.store.database import Database
from llamalith_app.store.tables import Outcome
from llamalith_app.supervise.pidfile import is_held

SWEEP_S = 2.0
BEAT_S = 3.0
STALE_S = 3 * BEAT_S
SLOW_WRITE_S = 1.0
"""A write that waited longer means that others could not write either."""
GIVE_UP_JOBS = 1000
"""Jobs given up in one transaction at most, so that others can write between them."""
FORGET_KEYS = 1000
"""Old Idempotency-Keys deleted in one sweep at most."""
EXPIRE_JOBS = 100
"""Ended jobs deleted in one sweep at most: some hundred rows, and four million jobs a day."""
LOOK_THROUGH = 1000
"""Conversations looked at in one sweep for what is left of expired ones: a million in half an hour."""
LOST = "The worker that ran this job is gone."

log = structlog.get_logger(__name__)


def hold_lock(path: Path) -> IO[str]:
    """The sign that this process lives: the kernel frees it with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")  # noqa: SIM115 - open as long as the process
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _forget(lock_path: str) -> None:
    with contextlib.suppress(OSError):  # of another user, or read-only: it is only litter
        Path(lock_path).unlink()


class Sweeper:
    """`held_here`: the lease tokens of what this worker is running; their beat is its own affair.
    `retention`: how long ended jobs are kept; None: for ever.
    `wake_later` is told how long from now a job will be due again; `tell_engines` says what is told of them.
    """

    def __init__(
        self,
        database: Database,
        worker_id: int,
        held_here: Callable[[], Container[str]],
        wake_later: Callable[[timedelta], None],
        tell_engines: Callable[[], str],
        retention: timedelta | None = None,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._held_here = held_here
        self._wake_later = wake_later
        self._tell_engines = tell_engines
        self._retention = retention
        self._looked_through = 0
        """The last conversation that was looked at; 0: the next round begins."""
        self._seen: dict[str, tuple[int, float]] = {}
        """Lease token -> its beat, and since when it stands there."""
        self._unserved: set[str] = set()
        self._looked_at = time.monotonic()
        self._clock = 0.0
        """Seconds that this process was there to see: one that was frozen must not judge others by that time."""

    async def sweep(self) -> None:
        await self._see_that_beats_can_be_written()
        for sibling in await self._database.read(workers.not_ended):
            if sibling.id != self._worker_id and is_held(sibling.lock_path) is False:
                held = await self._database.read(jobs.held, sibling.id)
                await self._take(held, f"worker {sibling.id} ended")
                await self._database.write_lightly(workers.end, sibling.id, datetime.now(UTC))
                _forget(sibling.lock_path)
        looked_at, self._looked_at = self._looked_at, time.monotonic()
        self._clock += min(self._looked_at - looked_at, 2 * SWEEP_S)
        now = self._clock
        held = await self._database.read(jobs.held)
        self._seen = {
            lease.lease_token: seen
            if (seen := self._seen.get(lease.lease_token)) and seen[0] == lease.beat
            else (lease.beat, now)
            for lease in held
        }
        here = self._held_here()
        stale = [
            lease
            for lease in held
            # A process that was frozen must not judge what it runs; what it claimed and does not run, it must.
            if lease.lease_token not in here and now - self._seen[lease.lease_token][1] >= STALE_S
        ]
        await self._take(stale, "its beat stood still")
        await self._give_up()
        if await self._database.read(keys.has_old, datetime.now(UTC)):
            await self._database.write_lightly(keys.forget, datetime.now(UTC), FORGET_KEYS)
        await self._expire()
        await self._say_what_nobody_serves()

    async def _say_what_nobody_serves(self) -> None:
        """They may be out of the configuration, or their worker may come back: only people can tell."""
        queued = await self._database.read(jobs.n_queued_by_model)
        unserved = queued.keys() - await self._database.read(workers.served, datetime.now(UTC))
        for model in sorted(unserved - self._unserved):
            log.warning("jobs wait for a model that no worker serves; cancel them, or bring it back", model=model)
        self._unserved = unserved

    async def _expire(self) -> None:
        if self._retention is None:
            return
        until = datetime.now(UTC) - self._retention
        if await self._database.read(retention.has_expired, until):
            n_expired = await self._database.write_lightly(retention.expire, until, EXPIRE_JOBS)
            log.info("jobs expired", n_jobs=n_expired)
        looked = await self._database.read(retention.look_through, until, self._looked_through, LOOK_THROUGH)
        if looked.forgotten:
            n_gone = await self._database.write_lightly(retention.forget_conversations, until, looked.forgotten)
            log.info("empty conversations expired", n_conversations=n_gone)
        self._looked_through = looked.last

    async def _give_up(self) -> None:
        n_given_up = GIVE_UP_JOBS
        while n_given_up == GIVE_UP_JOBS:
            given_up = await self._database.write(jobs.expire_queued, datetime.now(UTC), GIVE_UP_JOBS)
            n_given_up = len(given_up)
            if given_up:
                log.warning("jobs waited longer than they may", n_jobs=n_given_up, first=given_up[0])

    async def _see_that_beats_can_be_written(self) -> None:
        """While the database takes no writes every beat stands still, and none of them means a death."""
        started = time.monotonic()
        try:
            await self._database.write_lightly(workers.beat, self._worker_id, datetime.now(UTC), self._tell_engines())
        except StorageUnavailable:
            self._seen.clear()
            raise
        if time.monotonic() - started > SLOW_WRITE_S:
            self._seen.clear()

    async def _take(self, leases: Iterable[jobs.ActiveLease], why: str) -> None:
        for lease in leases:
            pause = order.retry_backoff(lease.attempt)
            status = await self._database.write(
                jobs.fail,
                lease.job_id,
                lease.lease_token,
                datetime.now(UTC),
                outcome=Outcome.LOST,
                kind="worker_lost",
                reason=LOST,
                pause=pause,
                seen_beat=lease.beat,
            )
            if status is not None:
                self._wake_later(pause)
                log.warning("lease taken away", job_id=lease.job_id, why=why, status=status.value)
