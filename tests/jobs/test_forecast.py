"""Forecasts of when jobs start and end, from measured times. Time is an argument."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.models import EngineStatus
from llamalith_app.jobs.forecast import Board, Forecasts
from llamalith_app.jobs.order import ModelQueue, max_wait_by_priority, merge_statuses, model_queues, remaining_s
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store.database import Database
from llamalith_app.store.jobs.waiting import DueJobs, QueueDepth

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
MAX_WAIT = max_wait_by_priority(MaxWait(normal=120))


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def engine(model: str = "a", **given: Any) -> EngineStatus:
    fields = {"state": "loaded", "n_slots": 2, "job_s": 10.0, "load_s": 3.0, **given}
    return EngineStatus(model=model, **fields)


def forecast(*engines: EngineStatus, **load: Any) -> dict[str, ModelQueue]:
    fields = {"queued": {}, "running": [], "due": [], **load}
    return model_queues({status.model: status for status in engines}, QueueDepth(**fields), MAX_WAIT, NOW)


def test_jobs_start_as_slots_become_free() -> None:
    queue = forecast(engine(), running=[("a", ago(4))])["a"]
    assert [queue.start_s(n) for n in (1, 2, 3, 4)] == [0, 6, 10, 16]
    assert queue.end_s(4) == 26


def test_a_job_that_takes_longer_than_the_average_is_not_expected_to_end_at_once() -> None:
    assert forecast(engine(n_slots=1), running=[("a", ago(50))])["a"].start_s(1) == 1


@pytest.mark.parametrize(("job_s", "expected"), [(10.0, 6), (0.1, 1), (4000.0, 60), (None, 60)])
async def test_who_is_refused_is_told_to_come_again_within_a_minute(
    database: Database, job_s: float | None, expected: int
) -> None:
    forecasts = Forecasts(database, ("a",), MAX_WAIT)
    queues = forecast(engine(n_slots=1, job_s=job_s), running=[("a", ago(4))], queued={"a": 1})
    forecasts.newest = Board({}, {"a": 1}, queues)
    forecasts._fresh_until = math.inf
    assert await forecasts.retry_after_s() == expected


def test_before_a_job_was_measured_there_is_no_forecast() -> None:
    queue = forecast(engine(job_s=None), running=[("a", ago(4))])["a"]
    assert (queue.start_s(1), queue.end_s(1)) == (None, None)


def test_jobs_of_a_model_that_fits_wait_for_its_load_only() -> None:
    found = forecast(engine("a"), engine("b", state="absent"), queued={"a": 100})
    assert found["b"].start_s(1) == 3


@pytest.mark.parametrize(("n_queued", "waited_s", "expected"), [(4, 10, 3 + 20), (1000, 10, 3 + 110), (1000, 500, 3)])
def test_a_model_that_does_not_fit_waits_for_the_other_s_queue_but_not_beyond_its_max_wait(
    n_queued: int, waited_s: float, expected: float
) -> None:
    found = forecast(
        engine("a"),
        engine("b", state="absent", fits=False),
        queued={"a": n_queued, "b": 1},
        due=[DueJobs("b", 1, 1, ago(waited_s))],
    )
    assert found["b"].start_s(1) == expected


def test_the_statuses_of_several_workers_are_merged() -> None:
    found = merge_statuses(
        [
            engine(state="failed", reason="broken", job_s=None, n_slots=1, fits=False),
            engine(state="loading", progress=0.5, job_s=None, n_slots=2, n_used=1),
            engine(state="absent", n_slots=4),
        ]
    )["a"]
    assert (found.state, found.progress, found.n_slots, found.n_used, found.job_s) == ("loading", 0.5, 7, 1, 10.0)


def test_a_running_job_is_expected_to_write_as_much_as_recent_ones() -> None:
    engine_status = engine(completion_tokens=100.0, tokens_per_s=10.0, prompt_tokens_per_s=50.0)
    reading = Progress(phase="prefill", prompt_tokens=600, prompt_tokens_done=100)
    writing = Progress(phase="decode", completion_tokens=60, tokens_per_s=5.0)
    assert remaining_s(reading, engine_status) == 10 + 10
    assert remaining_s(writing, engine_status) == 8
    assert remaining_s(Progress(phase="decode", completion_tokens=500), engine_status) == 1
    assert remaining_s(writing, engine()) is None
    assert remaining_s(writing, None) is None


def test_an_average_follows_what_was_measured_lately() -> None:
    speeds = Speeds()
    assert speeds.averages("a") == {}
    speeds.learn("a", "job_s", 10)
    assert speeds.averages("a") == {"job_s": 10}
    for _ in range(50):
        speeds.learn("a", "job_s", 20)
    assert 19.9 < speeds.averages("a")["job_s"] <= 20
