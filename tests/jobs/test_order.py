"""Who comes next, and how long a failed job rests. Time is an argument."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.jobs.order import (
    STARVATION_INTERVAL,
    ModelCapacity,
    bounds,
    counts,
    next_start,
    retry_backoff,
    without_one,
)
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store.jobs import Due
from llamalith_app.store.tables import Priority

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
INTERACTIVE, NORMAL, BATCH = Priority
MAX_WAIT = bounds(MaxWait(interactive=30, normal=120, batch=900))
ABSENT = ModelCapacity(1)
FULL = ModelCapacity(0, NOW)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def due(model: str, waited_s: float, priority: int = NORMAL) -> Due:
    return Due(model, priority, 1, ago(waited_s))


def loaded(since_s: float = 10_000, n_free: int = 1) -> ModelCapacity:
    return ModelCapacity(n_free, ago(since_s))


def chosen(*groups: Due, rooms: dict[str, ModelCapacity], n_started: int = 0) -> tuple[str, int] | None:
    found = next_start(groups, rooms, MAX_WAIT, n_started, NOW)
    return None if found is None else (found.model, found.priority)


def test_nothing_due_is_nothing_to_start() -> None:
    assert chosen(rooms={}) is None


def test_a_loaded_model_goes_on_while_it_has_jobs_even_of_a_class_behind() -> None:
    assert chosen(due("a", 100), due("b", 1), rooms={"a": ABSENT, "b": loaded()}) == ("b", NORMAL)
    assert chosen(due("a", 29, INTERACTIVE), due("b", 1, BATCH), rooms={"a": ABSENT, "b": loaded()}) == ("b", BATCH)


def test_in_loaded_models_the_class_goes_before_age() -> None:
    rooms = {"a": loaded(), "b": loaded()}
    assert chosen(due("a", 100, NORMAL), due("b", 1, INTERACTIVE), rooms=rooms) == ("b", INTERACTIVE)
    assert chosen(due("a", 100, BATCH), due("a", 1, NORMAL), rooms=rooms) == ("a", NORMAL)
    assert chosen(due("a", 1), due("b", 2), rooms=rooms) == ("b", NORMAL)


def test_of_models_that_are_not_loaded_class_and_age_decide() -> None:
    assert chosen(due("a", 1), due("b", 30), rooms={"a": ABSENT, "b": ABSENT}) == ("b", NORMAL)
    assert chosen(due("a", 1), due("b", 100, BATCH), rooms={"a": ABSENT, "b": ABSENT}) == ("a", NORMAL)


@pytest.mark.parametrize(("priority", "bound_s"), [(INTERACTIVE, 30), (NORMAL, 120), (BATCH, 900)])
def test_a_job_beyond_the_bound_of_its_class_goes_before_the_loaded_model(priority: int, bound_s: float) -> None:
    rooms = {"a": ABSENT, "b": loaded()}
    assert chosen(due("a", bound_s - 1, priority), due("b", 1, INTERACTIVE), rooms=rooms) == ("b", INTERACTIVE)
    assert chosen(due("a", bound_s + 1, priority), due("b", 1, INTERACTIVE), rooms=rooms) == ("a", priority)


def test_of_late_jobs_the_most_urgent_class_goes_first_but_not_for_ever() -> None:
    groups = due("a", 5000, BATCH), due("a", 31, INTERACTIVE), due("a", 121)
    firsts = [chosen(*groups, n_started=n, rooms={"a": loaded()}) for n in range(2 * STARVATION_INTERVAL)]
    assert Counter(firsts) == {("a", INTERACTIVE): 2 * STARVATION_INTERVAL - 2, ("a", NORMAL): 1, ("a", BATCH): 1}


def test_a_new_model_serves_late_jobs_that_had_gathered_before_a_more_urgent_class_takes_its_place() -> None:
    groups = due("a", 500, INTERACTIVE), due("b", 400, BATCH)._replace(oldest=ago(1000))
    new = ModelCapacity(1, ago(30), is_new=True)
    for model, b in (("b", new), ("a", new._replace(is_new=False)), ("a", new._replace(since=ago(1001)))):
        found = chosen(*groups, rooms={"a": ABSENT, "b": b})
        assert found is not None
        assert found[0] == model


@pytest.mark.parametrize("c_s", [0.5, 1.0, 7.0, 13.7])
def test_a_model_that_stands_in_nobody_s_way_takes_no_turn_from_a_class_that_is_to_be_relieved(c_s: float) -> None:
    """a: two slots, always late; b: one late job of a class behind, for which a must go; c: beside both, short jobs."""
    now, n_started, a_ends, c_end = 0.0, 0, [30.0, 60.0], 0.0
    while now < 3600:
        a_ends = [end for end in a_ends if end > now]
        at = NOW + timedelta(seconds=now)
        while True:
            rooms = {
                "a": ModelCapacity(2 - len(a_ends), ago(7200)),
                "b": ModelCapacity(0, None, frozenset("a")) if a_ends else ABSENT,
                "c": ModelCapacity(int(c_end <= now), ago(7200)),
            }
            groups = [due("b", 3600, BATCH), Due("a", INTERACTIVE, 64, at - timedelta(seconds=300))]
            groups.append(Due("c", INTERACTIVE, 1, at))
            best = next_start(groups, rooms, MAX_WAIT, n_started, at)
            if best is None:
                break
            if best.model == "b":
                return
            n_started += counts(best, groups, MAX_WAIT, n_started, at)
            if best.model == "a":
                a_ends.append(now + 60)
            else:
                c_end = now + c_s
        now = min(*a_ends, c_end) if a_ends and c_end > now else c_end if c_end > now else min(a_ends, default=now + 1)
    raise AssertionError("b was not started within an hour")


def test_a_clock_that_went_back_makes_no_job_one_that_had_gathered() -> None:
    groups = due("a", 500), due("b", 400)
    assert chosen(*groups, rooms={"a": ABSENT, "b": loaded(since_s=-3600)}) == ("a", NORMAL)


def test_a_model_serves_all_late_jobs_that_had_gathered_before_it_was_loaded_and_then_the_oldest_goes_first() -> None:
    groups = due("a", 500), due("b", 400)
    assert chosen(*groups, rooms={"a": ABSENT, "b": loaded(since_s=300)}) == ("b", NORMAL)
    assert chosen(*groups, rooms={"a": ABSENT, "b": loaded(since_s=450)}) == ("a", NORMAL)


def test_a_late_job_whose_model_must_wait_holds_back_only_those_that_are_in_its_way() -> None:
    groups = due("late", 200), due("busy", 1), due("other", 1), due("absent", 1)
    waits = ModelCapacity(0, None, frozenset({"busy"}))
    rooms = {"late": waits, "busy": loaded(), "other": loaded(), "absent": ABSENT}
    assert chosen(*groups, rooms=rooms) == ("other", NORMAL)
    assert chosen(*groups, rooms=rooms | {"other": FULL}) is None
    early = due("late", 1), *groups[1:]
    assert chosen(*early, rooms=rooms | {"other": FULL}) == ("busy", NORMAL)


def test_a_full_model_holds_nobody_back() -> None:
    assert chosen(due("a", 500), due("b", 1), rooms={"a": FULL, "b": ABSENT}) == ("b", NORMAL)
    assert chosen(due("a", 500), rooms={"a": FULL}) is None


def test_one_job_less_is_told_of_its_own_group_only() -> None:
    one, two = due("a", 1), due("b", 1)._replace(n_jobs=2)
    assert without_one([one, two], one) == [two]
    assert without_one([one, two], two) == [one, two._replace(n_jobs=1)]


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.25), (2, 1), (3, 4), (4, 16), (9, 60), (10_000, 60)])
def test_pauses_grow_to_a_minute_and_spread(attempt: int, seconds: float) -> None:
    pauses = {retry_backoff(attempt).total_seconds() for _ in range(100)}
    assert all(0.8 * seconds <= pause <= 1.2 * seconds for pause in pauses)
    assert len(pauses) > 50


class Queued(NamedTuple):
    at: float
    model: str
    priority: int
    number: int = 0


class Run(NamedTuple):
    waits: dict[Queued, float]
    """Seconds until its start."""
    n_loads: int


def simulate(jobs: list[Queued], *, job_s: float, load_s: float, models: tuple[str, ...] = ("a", "b")) -> Run:
    """One place, one model loaded at a time; seconds are counted, none passes."""
    waiting = sorted(jobs)
    now, model, since, n_loads, n_started = 0.0, "", 0.0, 0, 0
    waits: dict[Queued, float] = {}
    while waiting:
        here = [job for job in waiting if job.at <= now]
        if not here:
            now = waiting[0].at
            continue
        firsts: dict[tuple[str, int], Queued] = {}
        for job in here:
            firsts.setdefault((job.model, job.priority), job)
        groups = [Due(m, p, 1, NOW + timedelta(seconds=job.at)) for (m, p), job in firsts.items()]
        there = ModelCapacity(1, NOW + timedelta(seconds=since), is_new=now < since + 2 * load_s)
        rooms = {m: there if m == model else ABSENT for m in models}
        best = next_start(groups, rooms, MAX_WAIT, n_started, NOW + timedelta(seconds=now))
        assert best is not None
        job = firsts[best.model, best.priority]
        if job.model != model:
            model, since, n_loads = job.model, now, n_loads + 1
            now += load_s
        waits[job] = now - job.at
        waiting.remove(job)
        n_started += 1
        now += job_s
    return Run(waits, n_loads)


@pytest.mark.parametrize(
    ("every_s", "job_s"), [(0.0, 0.2), (0.0, 3.0), (0.0, 30.0), (0.1, 0.2), (0.1, 30.0), (1.0, 3.0), (1.0, 30.0)]
)
def test_a_hundred_jobs_alternating_between_two_models_that_do_not_fit_together_need_few_loads(
    every_s: float, job_s: float
) -> None:
    run = simulate([Queued(n * every_s, "ab"[n % 2], NORMAL, n) for n in range(100)], job_s=job_s, load_s=5)
    assert len(run.waits) == 100
    assert run.n_loads <= 6


def test_places_that_relieve_a_class_load_no_model_for_each_job() -> None:
    urgent = [Queued(n * 11.0, "a", INTERACTIVE, n) for n in range(1000)]
    others = [Queued(n * 0.01, "b", NORMAL, n) for n in range(50)]
    assert simulate(urgent + others, job_s=10, load_s=60).n_loads <= 20


def some_jobs(*priorities: int) -> st.SearchStrategy[list[Queued]]:
    job = st.tuples(st.integers(0, 3000), st.sampled_from("abc"), st.sampled_from(priorities))
    return st.lists(job, max_size=60).map(
        lambda found: [Queued(float(at), model, priority, n) for n, (at, model, priority) in enumerate(found, start=1)]
    )


@settings(max_examples=50)
@given(jobs=some_jobs(NORMAL, BATCH), job_s=st.floats(0.1, 60))
def test_no_job_starves_behind_a_flood_of_a_class_before_its_own(jobs: list[Queued], job_s: float) -> None:
    # Four times of what can be done.
    flood = [Queued(n * job_s / 4, "a", INTERACTIVE) for n in range(600)]
    run = simulate(flood + jobs, job_s=job_s, load_s=1, models=("a", "b", "c"))
    # Each is late at its bound; from then on each RELIEF-th place is for one of them.
    within_s = 900 + (len(jobs) + 2) * (STARVATION_INTERVAL + 1) * (job_s + 1)
    assert all(run.waits[job] <= within_s for job in jobs)


@settings(max_examples=50)
@given(job_s=st.floats(1, 60), load_s=st.floats(0, 60), n_b=st.integers(1, 50))
def test_of_two_models_that_are_always_late_none_starves(job_s: float, load_s: float, n_b: int) -> None:
    flood = [Queued(n * job_s / 2, "a", NORMAL, n) for n in range(600)]
    others = [Queued(n * job_s, "b", NORMAL, n) for n in range(n_b)]
    run = simulate(flood + others, job_s=job_s, load_s=load_s)
    for job in others:
        # It waits for those that came before it, and for what had gathered when the other model was loaded.
        assert run.waits[job] <= 120 + 3 * (job.at + 120 + n_b * job_s + load_s) + 4 * load_s
    assert run.n_loads <= 4 + n_b


@settings(max_examples=50)
@given(jobs=some_jobs(*Priority))
def test_while_there_is_time_enough_every_job_starts_within_its_bound(jobs: list[Queued]) -> None:
    run = simulate(jobs, job_s=0.05, load_s=0.2, models=("a", "b", "c"))
    for job, waited in run.waits.items():
        assert waited <= MAX_WAIT[job.priority].total_seconds() + len(jobs) * 0.25
