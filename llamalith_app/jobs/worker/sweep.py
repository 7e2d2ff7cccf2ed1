"""Releases the leases of attempts that nobody makes any more, expires jobs that waited longer than they may, and
deletes what is not to be kept any longer. New messages come into the index of words.

A lease is dead when the worker that holds it is gone from this machine (its lock file is free), or when its heartbeat
has not moved for `stale_s` of this process's own clock; no wall clock decides. Knows no engine and no Redis.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Container, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import msgspec
import structlog

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs import order
from llamalith_app.store import keys, retention, search, titles, workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import leases, transitions, waiting
from llamalith_app.store.tables import Outcome
from llamalith_app.supervise.pidfile import is_held

LOST = "The worker that ran this job is gone."
UNSTORED_KEPT = timedelta(minutes=1)
"""How long an ended job is kept that its OpenAI client did not want stored: a client that lost the connection may come
again for the answer."""

log = structlog.get_logger(__name__)


class SweepTimings(msgspec.Struct, frozen=True, kw_only=True):
    sweep_s: float = 2.0
    """Between two sweeps of one worker."""
    heartbeat_s: float = 3.0
    """Between two heartbeats of a lease."""
    stale_s: float = 9.0
    """A lease without a heartbeat for so long is dead: three of them."""
    slow_write_s: float = 1.0
    """A write that waited longer means that other workers could not write their heartbeats either."""


class SweepBatches(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows one transaction or one sweep changes at most, so that others can write between them."""

    overdue_jobs: int = 1000
    """In one transaction."""
    old_keys: int = 1000
    """Idempotency-Keys deleted in one sweep."""
    expired_jobs: int = 100
    """Ended jobs deleted in one sweep: some hundred rows, and four million jobs a day."""
    titles: int = 10
    """Titles that are asked for in one sweep, and as many that are collected."""
    conversations: int = 1000
    """Searched in one sweep for what is left of expired ones: a million in half an hour."""


TIMINGS, BATCHES = SweepTimings(), SweepBatches()


def hold_lock(path: Path) -> IO[str]:
    """Shows that this process lives: the kernel frees the lock with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")  # noqa: SIM115 - open as long as the process
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _delete_lock(lock_path: str) -> None:
    with contextlib.suppress(OSError):  # of another user, or read-only: the file does no harm
        Path(lock_path).unlink()


class Sweeper:
    """`held_here`: the lease tokens of the attempts that this worker is running, which it does not sweep.
    `retention`: how long ended jobs are kept; None: for ever. `v1_retention`: the same for those of OpenAI clients.
    `restorable`: how long deleted conversations are.
    `auto_titles`: whether conversations of the page get titles.
    `wake_later` is called with how long from now a job will
    be due again; `engine_statuses` returns, as JSON, what the worker's row says of its engines.
    """

    def __init__(
        self,
        database: Database,
        worker_id: int,
        held_here: Callable[[], Container[str]],
        wake_later: Callable[[timedelta], None],
        engine_statuses: Callable[[], str],
        retention: timedelta | None = None,
        *,
        v1_retention: timedelta | None = None,
        restorable: timedelta = timedelta(days=1),
        auto_titles: bool = False,
        timings: SweepTimings = TIMINGS,
        batches: SweepBatches = BATCHES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._held_here = held_here
        self._wake_later = wake_later
        self._engine_statuses = engine_statuses
        self._retention = retention
        self._v1_retention = v1_retention
        self._restorable = restorable
        self._auto_titles = auto_titles
        self._timings = timings
        self._batches = batches
        self._last_searched = 0
        """The id of the last conversation that was searched; 0: the next round begins."""
        self._seen_heartbeats: dict[str, tuple[int, float]] = {}
        """Lease token -> its heartbeat, and since when in `_awake_s` it has not moved."""
        self._unserved: set[str] = set()
        self._clock = clock
        self._swept_at = clock()
        self._awake_s = 0.0
        """Seconds for which this process ran: a process that was frozen must not count that time against others."""

    async def sweep(self) -> None:
        """Raises StorageUnavailable."""
        await self._check_that_heartbeats_can_be_written()
        await self._release_leases_of_dead_workers()
        await self._release_stale_leases()
        await self._expire_overdue()
        if await self._database.read(keys.has_expired_keys, datetime.now(UTC)):
            await self._database.write_lightly(keys.delete_expired, datetime.now(UTC), self._batches.old_keys)
        await self._delete_expired()
        await self._delete_expired_calls(UNSTORED_KEPT, stored=False)
        if self._v1_retention is not None:
            await self._delete_expired_calls(self._v1_retention, stored=True)
        await self._remove_deleted()
        if self._auto_titles:
            await self._make_titles()
        await search.catch_up(self._database)
        await self._log_unserved_models()

    async def _release_leases_of_dead_workers(self) -> None:
        for sibling in await self._database.read(workers.not_ended):
            if sibling.id != self._worker_id and is_held(sibling.lock_path) is False:
                held = await self._database.read(leases.active_leases, sibling.id)
                await self._release(held, f"worker {sibling.id} ended")
                await self._database.write_lightly(workers.end, sibling.id, datetime.now(UTC))
                _delete_lock(sibling.lock_path)

    async def _release_stale_leases(self) -> None:
        swept_at, self._swept_at = self._swept_at, self._clock()
        self._awake_s += min(self._swept_at - swept_at, 2 * self._timings.sweep_s)
        now = self._awake_s
        held = await self._database.read(leases.active_leases)
        self._seen_heartbeats = {
            lease.lease_token: seen
            if (seen := self._seen_heartbeats.get(lease.lease_token)) and seen[0] == lease.heartbeat
            else (lease.heartbeat, now)
            for lease in held
        }
        here = self._held_here()
        stale = [
            lease
            for lease in held
            # A process that was frozen must not release what it runs; what it claimed and does not run, it must.
            if lease.lease_token not in here
            and now - self._seen_heartbeats[lease.lease_token][1] >= self._timings.stale_s
        ]
        await self._release(stale, "its heartbeat did not move")

    async def _log_unserved_models(self) -> None:
        """The model may be gone from the configuration, or its worker may come back: only people know."""
        queued = await self._database.read(waiting.n_queued_by_model)
        unserved = queued.keys() - await self._database.read(workers.served_models, datetime.now(UTC))
        for model in sorted(unserved - self._unserved):
            log.warning("jobs wait for a model that no worker serves; cancel them, or bring it back", model=model)
        self._unserved = unserved

    async def _delete_expired(self) -> None:
        if self._retention is None:
            return
        until = datetime.now(UTC) - self._retention
        if await self._database.read(retention.has_expired_jobs, until):
            n_expired = await self._database.write_lightly(
                retention.delete_expired_jobs, until, self._batches.expired_jobs
            )
            log.info("jobs expired", n_jobs=n_expired)
        found = await self._database.read(
            retention.scan_conversations, until, self._last_searched, self._batches.conversations
        )
        if found.expired:
            n_gone = await self._database.write_lightly(retention.delete_expired_conversations, until, found.expired)
            log.info("empty conversations expired", n_conversations=n_gone)
        self._last_searched = found.last

    async def _delete_expired_calls(self, kept: timedelta, *, stored: bool) -> None:
        until = datetime.now(UTC) - kept
        if await self._database.read(retention.has_expired_calls, until, stored=stored):
            n_expired = await self._database.write_lightly(
                retention.delete_expired_calls, until, self._batches.expired_jobs, stored=stored
            )
            log.info("jobs of OpenAI clients expired", n_jobs=n_expired)

    async def _remove_deleted(self) -> None:
        until = datetime.now(UTC) - self._restorable
        if await self._database.read(retention.deleted_conversations, until):
            n_turns = await self._database.write_lightly(retention.remove_deleted, until, self._batches.expired_jobs)
            log.info("deleted conversations removed", n_turns=n_turns)

    async def _make_titles(self) -> None:
        found = await self._database.read(titles.work, datetime.now(UTC), self._batches.titles)
        for fork_id in found.collect:
            await self._database.write_lightly(titles.collect, fork_id)
        for conversation_id in found.ask_for:
            await self._database.write_lightly(titles.ask, conversation_id, datetime.now(UTC))
        if found.ask_for:
            self._wake_later(timedelta())

    async def _expire_overdue(self) -> None:
        """Ends jobs that waited longer for their first start than their `queue_timeout_s` allows."""
        n_expired = limit = self._batches.overdue_jobs
        while n_expired == limit:
            expired = await self._database.write(transitions.expire_queued, datetime.now(UTC), limit)
            n_expired = len(expired)
            if expired:
                log.warning("jobs waited longer than they may", n_jobs=n_expired, first=expired[0])

    async def _check_that_heartbeats_can_be_written(self) -> None:
        """While the database takes no writes no heartbeat moves, and none of them means a death."""
        started_at = self._clock()
        try:
            await self._database.write_lightly(
                workers.heartbeat, self._worker_id, datetime.now(UTC), self._engine_statuses()
            )
        except StorageUnavailable:
            self._seen_heartbeats.clear()
            raise
        if self._clock() - started_at > self._timings.slow_write_s:
            self._seen_heartbeats.clear()

    async def _release(self, leases: Iterable[leases.ActiveLease], why: str) -> None:
        for lease in leases:
            pause = order.retry_backoff(lease.attempt)
            status = await self._database.write(
                transitions.fail,
                lease.job_id,
                lease.lease_token,
                datetime.now(UTC),
                outcome=Outcome.LOST,
                kind="worker_lost",
                reason=LOST,
                pause=pause,
                seen_heartbeat=lease.heartbeat,
            )
            if status is not None:
                self._wake_later(pause)
                log.warning("lease taken away", job_id=lease.job_id, why=why, status=status.value)
