"""Which job starts next, and how long a failed job waits for its retry. Time is an argument."""

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
    after_start,
    counts_towards_relief,
    max_wait_by_priority,
    next_start,
    retry_backoff,
)
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store.jobs.waiting import DueJobs
from llamalith_app.store.tables import Priority

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
INTERACTIVE, NORMAL, BATCH = Priority
MAX_WAIT = max_wait_by_priority(MaxWait(interactive=30, normal=120, batch=900))
ABSENT = ModelCapacity(1)
FULL = ModelCapacity(0, NOW)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def due(model: str, waited_s: float, priority: int = NORMAL) -> DueJobs:
    return DueJobs(model, priority, 1, ago(waited_s))


def loaded(since_s: float = 10_000, n_free: int = 1) -> ModelCapacity:
    return ModelCapacity(n_free, ago(since_s))


def chosen(*groups: DueJobs, capacities: dict[str, ModelCapacity], n_started: int = 0) -> tuple[str, int] | None:
    found = next_start(groups, capacities, MAX_WAIT, n_started, NOW)
    return None if found is None else (found.model, found.priority)


def test_without_due_jobs_nothing_starts() -> None:
    assert chosen(capacities={}) is None


def test_a_loaded_model_goes_on_while_it_has_jobs_even_of_a_lower_class() -> None:
    assert chosen(due("a", 100), due("b", 1), capacities={"a": ABSENT, "b": loaded()}) == ("b", NORMAL)
    assert chosen(due("a", 29, INTERACTIVE), due("b", 1, BATCH), capacities={"a": ABSENT, "b": loaded()}) == (
        "b",
        BATCH,
    )


def test_among_loaded_models_class_goes_before_age() -> None:
    capacities = {"a": loaded(), "b": loaded()}
    assert chosen(due("a", 100, NORMAL), due("b", 1, INTERACTIVE), capacities=capacities) == ("b", INTERACTIVE)
    assert chosen(due("a", 100, BATCH), due("a", 1, NORMAL), capacities=capacities) == ("a", NORMAL)
    assert chosen(due("a", 1), due("b", 2), capacities=capacities) == ("b", NORMAL)


def test_among_models_that_are_not_loaded_class_and_age_decide() -> None:
    assert chosen(due("a", 1), due("b", 30), capacities={"a": ABSENT, "b": ABSENT}) == ("b", NORMAL)
    assert chosen(due("a", 1), due("b", 100, BATCH), capacities={"a": ABSENT, "b": ABSENT}) == ("a", NORMAL)


@pytest.mark.parametrize(("priority", "bound_s"), [(INTERACTIVE, 30), (NORMAL, 120), (BATCH, 900)])
def test_a_late_job_goes_before_the_loaded_model(priority: int, bound_s: float) -> None:
    capacities = {"a": ABSENT, "b": loaded()}
    assert chosen(due("a", bound_s - 1, priority), due("b", 1, INTERACTIVE), capacities=capacities) == (
        "b",
        INTERACTIVE,
    )
    assert chosen(due("a", bound_s + 1, priority), due("b", 1, INTERACTIVE), capacities=capacities) == ("a", priority)


def test_among_late_jobs_the_most_urgent_class_goes_first_but_every_8th_start_is_another_class_s() -> None:
    groups = due("a", 5000, BATCH), due("a", 31, INTERACTIVE), due("a", 121)
    firsts = [chosen(*groups, n_started=n, capacities={"a": loaded()}) for n in range(2 * STARVATION_INTERVAL)]
    assert Counter(firsts) == {("a", INTERACTIVE): 2 * STARVATION_INTERVAL - 2, ("a", NORMAL): 1, ("a", BATCH): 1}


def test_a_newly_loaded_model_serves_the_jobs_that_waited_for_it_before_a_more_urgent_class_replaces_it() -> None:
    groups = due("a", 500, INTERACTIVE), due("b", 400, BATCH)._replace(oldest=ago(1000))
    new = ModelCapacity(1, ago(30), is_new=True)
    for model, b in (("b", new), ("a", new._replace(is_new=False)), ("a", new._replace(since=ago(1001)))):
        found = chosen(*groups, capacities={"a": ABSENT, "b": b})
        assert found is not None
        assert found[0] == model


@pytest.mark.parametrize("c_s", [0.5, 1.0, 7.0, 13.7])
def test_starts_of_a_third_model_do_not_use_up_the_turn_of_a_lower_class(c_s: float) -> None:
    """a: two slots, always late; b: one late job of a lower class that needs a unloaded; c: short jobs, fits beside."""
    now, n_started, a_ends, c_end = 0.0, 0, [30.0, 60.0], 0.0
    while now < 3600:
        a_ends = [end for end in a_ends if end > now]
        at = NOW + timedelta(seconds=now)
        while True:
            capacities = {
                "a": ModelCapacity(2 - len(a_ends), ago(7200)),
                "b": ModelCapacity(0, None, frozenset("a")) if a_ends else ABSENT,
                "c": ModelCapacity(int(c_end <= now), ago(7200)),
            }
            groups = [due("b", 3600, BATCH), DueJobs("a", INTERACTIVE, 64, at - timedelta(seconds=300))]
            groups.append(DueJobs("c", INTERACTIVE, 1, at))
            best = next_start(groups, capacities, MAX_WAIT, n_started, at)
            if best is None:
                break
            if best.model == "b":
                return
            n_started += counts_towards_relief(best, groups, MAX_WAIT, n_started, at)
            if best.model == "a":
                a_ends.append(now + 60)
            else:
                c_end = now + c_s
        now = min(*a_ends, c_end) if a_ends and c_end > now else c_end if c_end > now else min(a_ends, default=now + 1)
    raise AssertionError("b was not started within an hour")


def test_a_clock_that_was_set_back_does_not_put_a_model_first() -> None:
    groups = due("a", 500), due("b", 400)
    assert chosen(*groups, capacities={"a": ABSENT, "b": loaded(since_s=-3600)}) == ("a", NORMAL)


def test_a_model_serves_all_late_jobs_from_before_its_load_and_then_the_oldest_job_goes_first() -> None:
    groups = due("a", 500), due("b", 400)
    assert chosen(*groups, capacities={"a": ABSENT, "b": loaded(since_s=300)}) == ("b", NORMAL)
    assert chosen(*groups, capacities={"a": ABSENT, "b": loaded(since_s=450)}) == ("a", NORMAL)


def test_a_late_job_whose_model_must_wait_holds_back_only_the_models_in_its_way() -> None:
    groups = due("late", 200), due("busy", 1), due("other", 1), due("absent", 1)
    waits = ModelCapacity(0, None, frozenset({"busy"}))
    capacities = {"late": waits, "busy": loaded(), "other": loaded(), "absent": ABSENT}
    assert chosen(*groups, capacities=capacities) == ("other", NORMAL)
    assert chosen(*groups, capacities=capacities | {"other": FULL}) is None
    early = due("late", 1), *groups[1:]
    assert chosen(*early, capacities=capacities | {"other": FULL}) == ("busy", NORMAL)


def test_a_model_without_a_free_slot_holds_nobody_back() -> None:
    assert chosen(due("a", 500), due("b", 1), capacities={"a": FULL, "b": ABSENT}) == ("b", NORMAL)
    assert chosen(due("a", 500), capacities={"a": FULL}) is None


def test_a_start_takes_one_job_from_its_own_group_only() -> None:
    one, two = due("a", 1), due("b", 1)._replace(n_jobs=2)
    assert after_start([one, two], one) == [two]
    assert after_start([one, two], two) == [one, two._replace(n_jobs=1)]


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.25), (2, 1), (3, 4), (4, 16), (9, 60), (10_000, 60)])
def test_backoff_grows_to_a_minute_and_is_randomized(attempt: int, seconds: float) -> None:
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
    """Seconds until each job started."""
    n_loads: int


def simulate(jobs: list[Queued], *, job_s: float, load_s: float, models: tuple[str, ...] = ("a", "b")) -> Run:
    """One slot, one model loaded at a time. Time is simulated."""
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
        groups = [DueJobs(m, p, 1, NOW + timedelta(seconds=job.at)) for (m, p), job in firsts.items()]
        there = ModelCapacity(1, NOW + timedelta(seconds=since), is_new=now < since + 2 * load_s)
        capacities = {m: there if m == model else ABSENT for m in models}
        best = next_start(groups, capacities, MAX_WAIT, n_started, NOW + timedelta(seconds=now))
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


def test_starts_that_relieve_a_class_do_not_load_a_model_for_each_job() -> None:
    urgent = [Queued(n * 11.0, "a", INTERACTIVE, n) for n in range(1000)]
    others = [Queued(n * 0.01, "b", NORMAL, n) for n in range(50)]
    assert simulate(urgent + others, job_s=10, load_s=60).n_loads <= 20


def some_jobs(*priorities: int) -> st.SearchStrategy[list[Queued]]:
    job = st.tuples(st.integers(0, 3000), st.sampled_from("abc"), st.sampled_from(priorities))
    return st.lists(job, max_size=60).map(
        lambda found: [Queued(float(at), model, priority, n) for n, (at, model, priority) in enumerate(found, start=1)]
    )


@settings(max_examples=settings().max_examples // 2)
@given(jobs=some_jobs(NORMAL, BATCH), job_s=st.floats(0.1, 60))
def test_no_job_starves_behind_a_flood_of_a_more_urgent_class(jobs: list[Queued], job_s: float) -> None:
    # Four times the capacity.
    flood = [Queued(n * job_s / 4, "a", INTERACTIVE) for n in range(600)]
    run = simulate(flood + jobs, job_s=job_s, load_s=1, models=("a", "b", "c"))
    # Each is late after its `max_wait`; from then on every STARVATION_INTERVAL-th start is for one of them.
    within_s = 900 + (len(jobs) + 2) * (STARVATION_INTERVAL + 1) * (job_s + 1)
    assert all(run.waits[job] <= within_s for job in jobs)


@settings(max_examples=settings().max_examples // 2)
@given(job_s=st.floats(1, 60), load_s=st.floats(0, 60), n_b=st.integers(1, 50))
def test_of_two_models_that_are_always_late_neither_starves(job_s: float, load_s: float, n_b: int) -> None:
    flood = [Queued(n * job_s / 2, "a", NORMAL, n) for n in range(600)]
    others = [Queued(n * job_s, "b", NORMAL, n) for n in range(n_b)]
    run = simulate(flood + others, job_s=job_s, load_s=load_s)
    for job in others:
        # It waits for older jobs, and for those that had gathered when the other model was loaded.
        assert run.waits[job] <= 120 + 3 * (job.at + 120 + n_b * job_s + load_s) + 4 * load_s
    assert run.n_loads <= 4 + n_b


@settings(max_examples=settings().max_examples // 2)
@given(jobs=some_jobs(*Priority))
def test_below_capacity_every_job_starts_within_the_max_wait_of_its_class(jobs: list[Queued]) -> None:
    run = simulate(jobs, job_s=0.05, load_s=0.2, models=("a", "b", "c"))
    for job, waited in run.waits.items():
        assert waited <= MAX_WAIT[job.priority].total_seconds() + len(jobs) * 0.25
