"""Who is next, and when: pure functions over summaries of what is due and of what engines tell. No SQL, no clock."""

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
from llamalith_app.store.job_reads import Queue
from llamalith_app.store.jobs import Due, QueueDepth
from llamalith_app.store.tables import Priority

STARVATION_INTERVAL = 8
"""Of so many places one goes to late jobs of other classes than the most urgent."""

STATES = ("loaded", "loading", "failed", "absent")
"""Best first: what one worker of several says of a model."""
SUMS = ("n_slots", "n_used", "prompt_tokens_computed", "prompt_tokens_reused")
MEASURES = ("tokens_per_s", "prompt_tokens_per_s", "load_s", "job_s", "completion_tokens")


class ModelCapacity(NamedTuple):
    """How a model stands in the pool."""

    n_free: int
    """Places that would be given now, also by loading it."""
    since: datetime | None = None
    """When it was loaded, or began to be; None: it is not."""
    waits_for: frozenset[str] = frozenset()
    """Models that must go before it can be loaded, where one of them is at work."""
    is_new: bool = False
    """It is being loaded, or has not been there for as long as its load took."""


def next_start(
    due: Iterable[Due],
    rooms: Mapping[str, ModelCapacity],
    max_wait: Mapping[int, timedelta],
    n_started: int,
    now: datetime,
) -> Due | None:
    """Whose job a place is given to next; None: nothing that is due can start now. `max_wait` is by priority;
    `n_started` counts the places given so far, as `counts` says.

    What is due is ranked:
    (1) A job that has waited longer than the bound of its class is late, and late ones go before all others:
        (1.1) a new model with jobs from before it was loaded, so that no load is for one job alone;
        (1.2) the most urgent class, but for each RELIEF-th place one of the others by turns, so that a flood of one
              starves none;
        (1.3) in a class a loaded model with jobs from before it was loaded, so that one load serves all that had
              gathered, and two models that are always late do not take turns job by job;
        (1.4) then the model with the oldest job.
    (2) Then loaded models: the most urgent class first, the oldest job in it.
    (3) Then the others, likewise.
    The place goes to the first in this rank whose model has one, but
    (4) a late job whose model waits for others to end holds these back: they get no new place, and nothing else is
        loaded before it.
    """

    groups = list(due)
    relieved = _relieved(groups, max_wait, n_started, now)

    def rank(one: Due) -> tuple[int, bool, bool, int, bool, datetime]:
        room = rooms[one.model]
        if _is_late(one, max_wait, now):  # (1)
            # Not what a clock says that went back since.
            gathered = room.since is not None and one.oldest <= room.since <= now
            first = gathered and room.is_new
            return 1, not first, one.priority != relieved, one.priority, not gathered, one.oldest  # (1.1) to (1.4)
        return 2 if room.since else 3, False, False, one.priority, False, one.oldest  # (2), (3)

    held_back: frozenset[str] = frozenset()
    for one in sorted(groups, key=rank):
        room = rooms[one.model]
        if room.n_free > 0 and one.model not in held_back and not (held_back and room.since is None):
            return one
        if _is_late(one, max_wait, now) and room.waits_for and not held_back:  # (4)
            held_back = room.waits_for
    return None


def counts(started: Due, due: Iterable[Due], max_wait: Mapping[int, timedelta], n_started: int, now: datetime) -> bool:
    """Whether this start is one of the places that are counted: where it is another class's turn to be relieved, no
    other start takes that from it, though it may have to wait for room."""
    return _relieved(list(due), max_wait, n_started, now) in (None, started.priority)


def _is_late(one: Due, max_wait: Mapping[int, timedelta], now: datetime) -> bool:
    return now - one.oldest > max_wait[one.priority]


def _relieved(groups: Sequence[Due], max_wait: Mapping[int, timedelta], n_started: int, now: datetime) -> int | None:
    """The class whose late jobs go before those of more urgent ones at this place; None: none."""
    others = sorted({one.priority for one in groups if _is_late(one, max_wait, now)})[1:]
    turn, place = divmod(n_started, STARVATION_INTERVAL)
    return others[turn % len(others)] if others and place == STARVATION_INTERVAL - 1 else None


def without_one(due: Sequence[Due], started: Due) -> list[Due]:
    """The same after one job of a group has been given a place."""
    return [
        one._replace(n_jobs=one.n_jobs - 1) if one is started else one
        for one in due
        if one is not started or one.n_jobs > 1
    ]


def bounds(max_wait: MaxWait) -> dict[int, timedelta]:
    """By priority, as `next_start` takes them."""
    return {one: timedelta(seconds=getattr(max_wait, one.name.lower())) for one in Priority}


def retry_backoff(attempt: int) -> timedelta:
    """Between a failed attempt (1 is the first) and the next: 0.25 s, 1 s, 4 s … at most a minute; up to a fifth more
    or less, so that what failed together is not tried again together."""
    seconds = min(60.0, 0.25 * 4.0 ** min(attempt - 1, 10))
    return timedelta(seconds=seconds * random.uniform(0.8, 1.2))  # noqa: S311 - no secret


class ModelQueue(NamedTuple):
    """The queue of one model, as far as it can be foreseen."""

    free_s: tuple[float, ...]
    """For each slot, seconds until it takes the next job; ascending."""
    job_s: float | None
    """Of one job; None: nothing was measured yet."""

    def start_s(self, position: int, at_least_s: float = 0.0) -> float | None:
        """Until the job at this place of the queue starts; 1 is the next. `at_least_s`: for so long it waits for
        something else as well."""
        if self.job_s is None:
            return None
        wave, slot = divmod(position - 1, len(self.free_s))
        return max(self.free_s[slot] + wave * self.job_s, at_least_s)

    def end_s(self, position: int) -> float | None:
        return self.end_of(self.start_s(position))

    def end_of(self, start_s: float | None) -> float | None:
        """Of a job that starts in so many seconds."""
        return None if start_s is None or self.job_s is None else start_s + self.job_s

    def left_s(self, age_s: float) -> float | None:
        """Of a job that has run for so long."""
        return None if self.job_s is None else _left_of(self.job_s, age_s)


def merged(told: Iterable[EngineStatus]) -> dict[str, EngineStatus]:
    """What several workers tell, by model: the best state of all, the slots of all, the speeds of who has some."""
    found: dict[str, EngineStatus] = {}
    for one in told:
        best = found.get(one.model)
        if best is None:
            found[one.model] = one
            continue
        first, other = sorted((best, one), key=lambda engine: STATES.index(engine.state))
        measured = {name: value for name in MEASURES if (value := getattr(first, name) or getattr(other, name))}
        sums = {name: getattr(first, name) + getattr(other, name) for name in SUMS}
        found[one.model] = msgspec.structs.replace(first, fits=first.fits or other.fits, **sums, **measured)
    return found


def model_queues(
    engines: Mapping[str, EngineStatus], load: QueueDepth, max_wait: Mapping[int, timedelta], now: datetime
) -> dict[str, ModelQueue]:
    """The queues by model. A model that is not there waits for its load; and where others have to go first, until
    their queues end or its own oldest job is late, whichever comes sooner."""
    found = {}
    for model, engine in engines.items():
        job_s = engine.job_s
        ages = [(now - started).total_seconds() for of, started in load.running if of == model]
        left = sorted(_left_of(job_s, age) for age in ages) if job_s is not None else []
        free = [0.0] * max(0, engine.n_slots - len(left))
        found[model] = ModelQueue(tuple((free + left)[: max(1, engine.n_slots)]), job_s)
    here = {model for model, engine in engines.items() if engine.state in ("loaded", "loading")}
    for model in engines.keys() - here:
        engine = engines[model]
        wait_s = engine.load_s or 0.0
        if not engine.fits:
            late_s = min(
                ((one.oldest + max_wait[one.priority] - now).total_seconds() for one in load.due if one.model == model),
                default=0.0,
            )
            queue_s = max((_drained_s(found[other], load.queued.get(other, 0)) for other in here), default=0.0)
            running_s = max((found[other].free_s[-1] for other in here), default=0.0)
            wait_s += min(queue_s, max(0.0, late_s) + running_s)
        found[model] = ModelQueue(tuple(wait_s + free for free in found[model].free_s), engine.job_s)
    return found


class Forecast(NamedTuple):
    """Of a queued job; seconds from now, None where they are not known."""

    waits_for: int | None
    """The job before it in its conversation."""
    start_s: float | None
    end_s: float | None


def forecasts(
    of_jobs: Mapping[int, str], queue: Queue, model_queues: Mapping[str, ModelQueue], now: datetime
) -> dict[int, Forecast]:
    """By job id, of these queued jobs at least; `of_jobs`: their models. None starts before the one that it waits for
    has ended."""
    found = {job_id: _forecast(queue, model_queues, job_id, model, None, 0.0) for job_id, model in of_jobs.items()}
    for _, conversation in itertools.groupby(queue.before, key=lambda one: one.conversation):
        waits_for: int | None = None
        free_s: float | None = 0.0
        for one in conversation:
            if one.started_at is None:
                found[one.id] = _forecast(queue, model_queues, one.id, one.model, waits_for, free_s)
                free_s = found[one.id].end_s
            else:
                lane = model_queues.get(one.model)
                free_s = None if lane is None else lane.left_s((now - one.started_at).total_seconds())
            waits_for = one.id
    return found


def _forecast(
    queue: Queue,
    model_queues: Mapping[str, ModelQueue],
    job_id: int,
    model: str,
    waits_for: int | None,
    free_s: float | None,
) -> Forecast:
    """`free_s`: until the one that it waits for has ended."""
    position, lane = queue.positions.get(job_id), model_queues.get(model)
    if position is None or lane is None or free_s is None:
        return Forecast(waits_for, None, None)
    start_s = lane.start_s(position, free_s)
    return Forecast(waits_for, start_s, lane.end_of(start_s))


def _left_of(job_s: float, age_s: float) -> float:
    # One that takes longer than most has some time to go still.
    return max(job_s - age_s, job_s / 10)


def _drained_s(lane: ModelQueue, n_queued: int) -> float:
    return (lane.end_s(n_queued) or 0.0) if n_queued else lane.free_s[-1]


def left_s(progress: Progress, engine: EngineStatus | None) -> float | None:
    """Until a running job ends; None: not known. Its reply is taken to be as long as others lately."""
    if engine is None or engine.completion_tokens is None or engine.tokens_per_s is None:
        return None
    speed = progress.tokens_per_s if progress.phase == "decode" and progress.tokens_per_s else engine.tokens_per_s
    # One that is longer than most has some way to go still.
    n_tokens = max(engine.completion_tokens - (progress.completion_tokens or 0), engine.completion_tokens / 10)
    seconds = n_tokens / speed
    if progress.phase != "decode" and engine.prompt_tokens_per_s:
        n_prompt = (progress.prompt_tokens or 0) - (progress.prompt_tokens_done or 0)
        seconds += n_prompt / engine.prompt_tokens_per_s
    if progress.phase == "loading" and engine.state != "loaded":
        seconds += (engine.load_s or 0.0) * (1 - (engine.progress or 0.0))
    return seconds
