"""Decides which job starts next, and forecasts when each will start and end.

Pure functions over summaries of the due jobs and of the engines' statuses. `next_start` is called by the worker, the
forecasts by the web. Uses no SQL and no clock: every function takes `now`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.models import EngineStatus
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store.jobs.reads import Queue
from llamalith_app.store.jobs.waiting import Due, QueueDepth
from llamalith_app.store.tables import Priority

STARVATION_INTERVAL = 8
"""Every 8th start goes to an overdue job of a lower class, if there is one."""

STATES = ("loaded", "loading", "failed", "absent")
"""Best first. Of the states that several workers report for a model, the best one is shown."""
SUMS = ("n_slots", "n_used", "prompt_tokens_computed", "prompt_tokens_reused")
"""Fields of `EngineStatus` that are added up over workers."""
MEASURES = ("tokens_per_s", "prompt_tokens_per_s", "load_s", "job_s", "completion_tokens")
"""Fields of `EngineStatus` that are taken from any worker that has measured them."""


class ModelCapacity(NamedTuple):
    """What the pool can do for a model now."""

    n_free: int
    """Jobs that could start now, including those that would load the model."""
    since: datetime | None = None
    """When its load began; None if it is neither loaded nor loading."""
    waits_for: frozenset[str] = frozenset()
    """Models that must be unloaded before this one fits, if one of them is running jobs."""
    is_new: bool = False
    """Whether it is loading, or has been loaded for less time than the load took."""


def next_start(
    due: Iterable[Due],
    capacities: Mapping[str, ModelCapacity],
    max_wait: Mapping[int, timedelta],
    n_started: int,
    now: datetime,
) -> Due | None:
    """The group of due jobs whose oldest job starts next; None if no due job can start now.

    `due` groups the due jobs by model and class (priority). `capacities` is by model, `max_wait` by class. `n_started`
    is the number of earlier starts for which `counts_towards_relief` was true.

    The groups are ranked:
    (1) First the late ones: a job is late when it has waited longer than `max_wait` of its class. Among late groups:
        (1.1) a newly loaded model with jobs from before its load, so that no load serves one job alone;
        (1.2) the most urgent class; but every STARVATION_INTERVAL-th start goes to one of the other classes in turn,
              so that a flood of one class starves none;
        (1.3) within a class, a loaded model with jobs from before its load: one load then serves all jobs that had
              gathered, and two models that are always late do not alternate job by job;
        (1.4) the group with the oldest job.
    (2) Then groups of loaded models: the most urgent class first, then the oldest job.
    (3) Then groups of models that are not loaded, likewise.
    The first group in this order whose model has a free place is chosen, except that
    (4) a late job whose model waits for others to be unloaded holds those back: they start nothing new, and nothing
        else is loaded before it.
    """

    groups = list(due)
    relief_class = _relief_class(groups, max_wait, n_started, now)

    def rank(group: Due) -> tuple[int, bool, bool, int, bool, datetime]:
        capacity = capacities[group.model]
        if _is_late(group, max_wait, now):  # (1)
            # `since` may lie in the future if the clock was set back.
            has_gathered = capacity.since is not None and group.oldest <= capacity.since <= now
            is_first = has_gathered and capacity.is_new
            # (1.1) to (1.4)
            return 1, not is_first, group.priority != relief_class, group.priority, not has_gathered, group.oldest
        return 2 if capacity.since else 3, False, False, group.priority, False, group.oldest  # (2), (3)

    held_back: frozenset[str] = frozenset()
    for group in sorted(groups, key=rank):
        capacity = capacities[group.model]
        if capacity.n_free > 0 and group.model not in held_back and not (held_back and capacity.since is None):
            return group
        if _is_late(group, max_wait, now) and capacity.waits_for and not held_back:  # (4)
            held_back = capacity.waits_for
    return None


def counts_towards_relief(
    started: Due, due: Iterable[Due], max_wait: Mapping[int, timedelta], n_started: int, now: datetime
) -> bool:
    """Whether this start is counted in `n_started`.

    Not while it is a lower class's turn and a job of another class started instead, because the lower class had no
    place: its turn then stays until one of its jobs starts.
    """
    return _relief_class(list(due), max_wait, n_started, now) in (None, started.priority)


def _is_late(group: Due, max_wait: Mapping[int, timedelta], now: datetime) -> bool:
    return now - group.oldest > max_wait[group.priority]


def _relief_class(
    groups: Sequence[Due], max_wait: Mapping[int, timedelta], n_started: int, now: datetime
) -> int | None:
    """The class whose late jobs come first at this start, before more urgent ones; None if it is no class's turn."""
    others = sorted({group.priority for group in groups if _is_late(group, max_wait, now)})[1:]
    turn, place = divmod(n_started, STARVATION_INTERVAL)
    return others[turn % len(others)] if others and place == STARVATION_INTERVAL - 1 else None


def after_start(due: Sequence[Due], started: Due) -> list[Due]:
    """The due jobs that are left after one job of the group `started` has started."""
    return [
        group._replace(n_jobs=group.n_jobs - 1) if group is started else group
        for group in due
        if group is not started or group.n_jobs > 1
    ]


def max_wait_by_priority(max_wait: MaxWait) -> dict[int, timedelta]:
    """The setting `max_wait_s` as the functions here take it."""
    return {priority: timedelta(seconds=getattr(max_wait, priority.name.lower())) for priority in Priority}


def retry_backoff(attempt: int) -> timedelta:
    """The pause after failed attempt number `attempt` (from 1): 0.25 s, 1 s, 4 s … at most a minute, ± 20 %.

    The random part keeps jobs that failed together from being retried together.
    """
    seconds = min(60.0, 0.25 * 4.0 ** min(attempt - 1, 10))
    return timedelta(seconds=seconds * random.uniform(0.8, 1.2))  # noqa: S311 - no secret


class ModelQueue(NamedTuple):
    """A forecast of one model's queue. All times are seconds from now."""

    free_s: tuple[float, ...]
    """When each slot takes its next job; ascending."""
    job_s: float | None
    """How long one job takes; None if none was measured yet."""

    def start_s(self, position: int, at_least_s: float = 0.0) -> float | None:
        """When the job at this position starts; position 1 is the next. None if unknown.

        `at_least_s`: the job cannot start earlier, because it also waits for something else.
        """
        if self.job_s is None:
            return None
        wave, slot = divmod(position - 1, len(self.free_s))
        return max(self.free_s[slot] + wave * self.job_s, at_least_s)

    def end_s(self, position: int) -> float | None:
        """When the job at this position ends; None if unknown."""
        return self.end_after(self.start_s(position))

    def end_after(self, start_s: float | None) -> float | None:
        """When a job ends that starts at `start_s`; None if unknown."""
        return None if start_s is None or self.job_s is None else start_s + self.job_s

    def remaining_s(self, age_s: float) -> float | None:
        """When a job ends that has run for `age_s` seconds; None if unknown."""
        return None if self.job_s is None else _remaining_job_s(self.job_s, age_s)


def merge_statuses(statuses: Iterable[EngineStatus]) -> dict[str, EngineStatus]:
    """One status for each model from the statuses of all workers.

    It has the best state, the sum of the slots, and speeds from any worker that has measured them.
    """
    merged: dict[str, EngineStatus] = {}
    for status in statuses:
        best = merged.get(status.model)
        if best is None:
            merged[status.model] = status
            continue
        first, other = sorted((best, status), key=lambda engine: STATES.index(engine.state))
        measured = {name: value for name in MEASURES if (value := getattr(first, name) or getattr(other, name))}
        sums = {name: getattr(first, name) + getattr(other, name) for name in SUMS}
        merged[status.model] = msgspec.structs.replace(first, fits=first.fits or other.fits, **sums, **measured)
    return merged


def model_queues(
    engines: Mapping[str, EngineStatus], load: QueueDepth, max_wait: Mapping[int, timedelta], now: datetime
) -> dict[str, ModelQueue]:
    """The forecast queue of each model.

    Jobs of a model that is not loaded wait for its load. If other models must be unloaded first, they also wait until
    the queues of those are empty or their own oldest job is late, whichever comes sooner.
    """
    queues = {}
    for model, engine in engines.items():
        job_s = engine.job_s
        ages = [(now - started).total_seconds() for running, started in load.running if running == model]
        busy = sorted(_remaining_job_s(job_s, age) for age in ages) if job_s is not None else []
        free = [0.0] * max(0, engine.n_slots - len(busy))
        queues[model] = ModelQueue(tuple((free + busy)[: max(1, engine.n_slots)]), job_s)
    present = {model for model, engine in engines.items() if engine.state in ("loaded", "loading")}
    for model in engines.keys() - present:
        engine = engines[model]
        wait_s = engine.load_s or 0.0
        if not engine.fits:
            late_s = min(
                (
                    (group.oldest + max_wait[group.priority] - now).total_seconds()
                    for group in load.due
                    if group.model == model
                ),
                default=0.0,
            )
            queue_s = max((_drained_s(queues[other], load.queued.get(other, 0)) for other in present), default=0.0)
            running_s = max((queues[other].free_s[-1] for other in present), default=0.0)
            wait_s += min(queue_s, max(0.0, late_s) + running_s)
        queues[model] = ModelQueue(tuple(wait_s + free for free in queues[model].free_s), engine.job_s)
    return queues


class Forecast(NamedTuple):
    """When a queued job will start and end, in seconds from now; None if unknown."""

    waits_for: int | None
    """The id of the job before it in its conversation; None if there is none."""
    start_s: float | None
    end_s: float | None


def forecasts(
    models: Mapping[int, str], queue: Queue, model_queues: Mapping[str, ModelQueue], now: datetime
) -> dict[int, Forecast]:
    """The forecast of each queued job in `models` (job id to model), by job id; there may be further ones.

    A job does not start before the one that it waits for in its conversation has ended.
    """
    found = {job_id: _forecast(queue, model_queues, job_id, model, None, 0.0) for job_id, model in models.items()}
    for _, lane in itertools.groupby(queue.before, key=lambda job: job.conversation):
        waits_for: int | None = None
        free_s: float | None = 0.0
        for job in lane:
            if job.started_at is None:
                found[job.id] = _forecast(queue, model_queues, job.id, job.model, waits_for, free_s)
                free_s = found[job.id].end_s
            else:
                model_queue = model_queues.get(job.model)
                age_s = (now - job.started_at).total_seconds()
                free_s = None if model_queue is None else model_queue.remaining_s(age_s)
            waits_for = job.id
    return found


def _forecast(
    queue: Queue,
    model_queues: Mapping[str, ModelQueue],
    job_id: int,
    model: str,
    waits_for: int | None,
    free_s: float | None,
) -> Forecast:
    """`free_s`: seconds until the job that this one waits for has ended; None if unknown."""
    position, model_queue = queue.positions.get(job_id), model_queues.get(model)
    if position is None or model_queue is None or free_s is None:
        return Forecast(waits_for, None, None)
    start_s = model_queue.start_s(position, free_s)
    return Forecast(waits_for, start_s, model_queue.end_after(start_s))


def _remaining_job_s(job_s: float, age_s: float) -> float:
    # A job that takes longer than the average is assumed to need some time still.
    return max(job_s - age_s, job_s / 10)


def _drained_s(model_queue: ModelQueue, n_queued: int) -> float:
    """Seconds until the last of `n_queued` jobs has ended."""
    return (model_queue.end_s(n_queued) or 0.0) if n_queued else model_queue.free_s[-1]


def remaining_s(progress: Progress, engine: EngineStatus | None) -> float | None:
    """Seconds until a running job ends, if its reply is as long as recent ones; None if unknown."""
    if engine is None or engine.completion_tokens is None or engine.tokens_per_s is None:
        return None
    speed = progress.tokens_per_s if progress.phase == "decode" and progress.tokens_per_s else engine.tokens_per_s
    # A reply that is longer than the average is assumed to go on for a while.
    n_tokens = max(engine.completion_tokens - (progress.completion_tokens or 0), engine.completion_tokens / 10)
    seconds = n_tokens / speed
    if progress.phase != "decode" and engine.prompt_tokens_per_s:
        n_prompt = (progress.prompt_tokens or 0) - (progress.prompt_tokens_done or 0)
        seconds += n_prompt / engine.prompt_tokens_per_s
    if progress.phase == "loading" and engine.state != "loaded":
        seconds += (engine.load_s or 0.0) * (1 - (engine.progress or 0.0))
    return seconds
