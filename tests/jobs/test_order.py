"""Which model comes next, and how long a failed job rests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llamalith_app.jobs.order import MAX_WAIT_FOR_SWAP, next_model, pause_before
from llamalith_app.store.jobs import Due

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def due(model: str, waited_s: float) -> Due:
    return Due(model, 1, NOW - timedelta(seconds=waited_s))


def test_nothing_due_is_no_model() -> None:
    assert next_model([], "a", NOW) is None


def test_the_loaded_model_goes_on_while_it_has_jobs() -> None:
    assert next_model([due("a", 30), due("b", 1)], "b", NOW) == "b"


def test_the_oldest_job_decides_when_nothing_fitting_is_loaded() -> None:
    assert next_model([due("a", 1), due("b", 30)], None, NOW) == "b"
    assert next_model([due("a", 1), due("b", 30)], "c", NOW) == "b"


def test_no_model_waits_longer_than_its_bound_for_the_loaded_one() -> None:
    long = MAX_WAIT_FOR_SWAP.total_seconds() + 1
    assert next_model([due("a", long), due("b", 1)], "b", NOW) == "a"
    assert next_model([due("a", long), due("b", long + 1)], "a", NOW) == "b"


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.25), (2, 1), (3, 4), (4, 16), (9, 60), (10_000, 60)])
def test_pauses_grow_to_a_minute(attempt: int, seconds: float) -> None:
    assert pause_before(attempt).total_seconds() == seconds
