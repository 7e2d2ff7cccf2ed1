"""Who gets a place: looks for due jobs, reserves places for them, claims them, and has their attempts run.

Woken by SAQ's tasks, by the worker's own poll, and by the end of each attempt. Redis decides nothing here: the record
says what is due, `jobs/order.py` which is next, the pool where there is room. Holds the attempts that run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import structlog

from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs import order
from llamalith_app.jobs.worker.attempt import AttemptExecutor
from llamalith_app.jobs.worker.pool import Pool, Reservation
from llamalith_app.jobs.worker.running import RunningAttempt, StopReason
from llamalith_app.jobs.worker.settle import Settler
from llamalith_app.jobs.worker.task_mirror import Show, TaskMirror
from llamalith_app.jobs.worker.tasks import TaskSet
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions, waiting

log = structlog.get_logger(__name__)


class _Start(NamedTuple):
    """A place, and the class of the job that is to be claimed for it."""

    reservation: Reservation
    priority: int
    is_counted: bool
    """As `order.counts_towards_relief` says."""


class Dispatcher:
    """`tasks` holds everything that runs here; `wake_later` is called with how long from now to poll again."""

    def __init__(
        self,
        database: Database,
        pool: Pool,
        attempts: AttemptExecutor,
        settler: Settler,
        *,
        worker_id: int,
        models: Iterable[str],
        max_wait: MaxWait,
        tasks: TaskSet,
        wake_later: Callable[[timedelta], None],
    ) -> None:
        self._database = database
        self._pool = pool
        self._attempts = attempts
        self._settler = settler
        self._worker_id = worker_id
        self._models = list(models)
        self._max_wait = order.max_wait_by_priority(max_wait)
        self._tasks = tasks
        self._wake_later = wake_later
        self._n_started = 0
        self._mirrors: set[TaskMirror] = set()
        self.running: dict[str, RunningAttempt] = {}
        """By lease token."""
        self.draining = asyncio.Event()

    async def poll(self) -> None:
        """Starts as much of what is due as there are places for, and returns at once. Raises StorageUnavailable."""
        for start in await self._reserve_due():
            self._begin(start)

    def wake(self, model: str, show: Show) -> asyncio.Task[None]:
        """`run_next` as a task of its own, which goes on when its caller is cancelled."""
        return self._tasks.start(self.run_next(model, show))

    async def run_next(self, model: str, show: Show) -> None:
        """Runs due jobs one after another while there are any and there is a place for them: which, the order
        decides, not the hint that woke this. Places beyond the one that this takes get tasks of their own.

        Where others run `model` already and no task of SAQ shows them, this one shows their progress instead: a busy
        queue is seen to be busy.
        """
        try:
            start = self._begin_all_but_first(await self._reserve_due())
        except StorageUnavailable as error:
            _log_no_claims(error)
            return
        if start is not None:
            await self._run_until_idle(start, self._new_mirror(start, show))
        while (mirror := self._hidden_mirror(model)) is not None:
            mirror.show_in(show)
            await mirror.ended.wait()

    async def all_end(self, within_s: float) -> bool:
        """Once draining: waits for all that was started; False: something still runs."""
        return await self._tasks.all_end(within_s)

    def stop_all(self, reason: StopReason) -> None:
        for running in list(self.running.values()):
            running.stop(reason)

    async def _reserve_due(self) -> list[_Start]:
        """Places for as much of what is due as can start now, best first."""
        starts: list[_Start] = []
        if self.draining.is_set():
            return starts
        now = datetime.now(UTC)
        due = await self._database.read(waiting.due, self._models, now)
        # No await from here on: what has room now gets its place.
        while not self.draining.is_set():
            capacities = {group.model: self._pool.capacity(group.model) for group in due}
            n_started = self._n_started + sum(start.is_counted for start in starts)
            best = order.next_start(due, capacities, self._max_wait, n_started, now)
            reservation = self._pool.reserve(best.model) if best is not None else None
            if best is None or reservation is None:
                break
            is_counted = order.counts_towards_relief(best, due, self._max_wait, n_started, now)
            starts.append(_Start(reservation, best.priority, is_counted))
            due = order.after_start(due, best)
        return starts

    def _begin_all_but_first(self, starts: list[_Start]) -> _Start | None:
        """The first of them, for the caller."""
        for start in starts[1:]:
            self._begin(start)
        return starts[0] if starts else None

    def _begin(self, start: _Start) -> None:
        self._tasks.start(self._run_until_idle(start, self._new_mirror(start, None)))

    def _new_mirror(self, start: _Start, show: Show | None) -> TaskMirror:
        mirror = TaskMirror(start.reservation.model, show)
        self._mirrors.add(mirror)
        return mirror

    def _hidden_mirror(self, model: str) -> TaskMirror | None:
        return next((mirror for mirror in self._mirrors if not mirror.is_shown and mirror.model == model), None)

    async def _run_until_idle(self, start: _Start, mirror: TaskMirror) -> None:
        """Runs a job in the place, releases it, and so on with whatever is next then."""
        following: _Start | None = start
        try:
            while following is not None and await self._run_one(following, mirror):
                following = self._begin_all_but_first(await self._reserve_due())
        except StorageUnavailable as error:
            _log_no_claims(error)
        finally:
            self._mirrors.remove(mirror)
            mirror.ended.set()

    async def _run_one(self, start: _Start, mirror: TaskMirror) -> bool:
        """True if it ran a job; another worker may have claimed it first."""
        with start.reservation as reservation:
            mirror.model = reservation.model
            claim = await self._claim(start)
            if claim is None:
                return False
            self._n_started += start.is_counted
            running = RunningAttempt(claim)
            if self.draining.is_set():
                # The drain began while the claim was on its way.
                await self._settler.settle(running, StopReason.DRAIN)
                return False
            self.running[claim.lease_token] = running
            try:
                await self._attempts.run(running, reservation, mirror)
            finally:
                del self.running[claim.lease_token]
        if (cooldown_s := self._pool.cooldown_s(claim.model)) > 0:
            self._wake_later(timedelta(seconds=cooldown_s))
        return True

    async def _claim(self, start: _Start) -> transitions.Claim | None:
        return await self._database.write_lightly(
            transitions.claim, start.reservation.model, start.priority, self._worker_id, datetime.now(UTC)
        )


def _log_no_claims(error: StorageUnavailable) -> None:
    log.warning("nothing can be claimed now", reason=str(error))
