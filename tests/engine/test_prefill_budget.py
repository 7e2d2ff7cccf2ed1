"""How many prompt tokens a step gets, on engines of any speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.engine.prefill_budget import ALONE_S, BESIDE_S, FIRST_CHUNK, MIN_CHUNK, PrefillBudget

LATE_S = 0.2
"""How many seconds a prompt may delay the next token of another sequence."""


def settled(
    token_s: float, decode_s: float, n_decoding: int, n_chunk: int = 2048, *, to_the_end: bool = False
) -> tuple[PrefillBudget, list[float]]:
    """A budget that observed prefill alone first and then beside others, and the seconds of those later steps."""
    budget = PrefillBudget(n_chunk)
    took = []
    for n_beside in (0, 0, 0, *[n_decoding] * 20):
        n_read = sum(budget.next(n_beside)) if to_the_end else budget.next(n_beside).n_tokens
        seconds = n_read * token_s + (decode_s if n_beside else 0.0)
        budget.observe(n_read, n_beside, seconds)
        if n_beside:
            budget.observe(0, n_beside, decode_s)
            took.append(seconds)
    return budget, took


@given(st.floats(1e-5, 0.01), st.floats(0.001, 0.06), st.integers(1, 16))
def test_a_token_is_never_later_than_it_may_be(token_s: float, decode_s: float, n_decoding: int) -> None:
    _, took = settled(token_s, decode_s, n_decoding, to_the_end=True)
    assert max(took) <= LATE_S


@given(st.floats(1e-4, 0.002), st.integers(1, 16))
def test_a_chunk_is_as_large_as_its_time_allows(token_s: float, n_decoding: int) -> None:
    budget, took = settled(token_s, 0.02, n_decoding)
    assert took[-1] >= 0.8 * BESIDE_S
    assert budget.next(0).n_tokens * token_s >= 0.8 * ALONE_S


@given(st.floats(0.001, 0.004), st.floats(0.001, 0.004), st.floats(0.01, 0.03))
def test_the_fixed_cost_of_a_step_is_separated_from_the_cost_of_a_token(
    token_s: float, decode_s: float, fixed_s: float
) -> None:
    budget = PrefillBudget(2048)
    for _ in range(40):
        for n_decoding in (1, 8):
            budget.observe(0, n_decoding, fixed_s + n_decoding * decode_s)
            n_read = sum(budget.next(n_decoding))
            seconds = 2 * fixed_s + n_decoding * decode_s + n_read * token_s
            budget.observe(n_read, n_decoding, seconds)
    assert budget.token_s == pytest.approx(token_s, rel=0.1)
    assert seconds <= LATE_S


def test_the_first_chunk_is_small() -> None:
    assert PrefillBudget(2048).next(8) == (FIRST_CHUNK, 0)
    assert PrefillBudget(5).next(8) == (5, 0)


def test_a_chunk_is_never_larger_than_the_configured_one() -> None:
    assert settled(1e-5, 0.001, 4, n_chunk=100)[0].next(0) == (100, 0)


def test_a_slow_engine_still_reads_as_many_as_cost_next_to_nothing() -> None:
    assert settled(1.0, 1.0, 4)[0].next(4).n_tokens == MIN_CHUNK


@pytest.mark.parametrize("n_stalled", [1, 2, 3])
def test_one_step_that_stalled_does_not_count_for_ever(n_stalled: int) -> None:
    def observe(n_read: int, n_decoding: int) -> None:
        budget.observe(n_read, n_decoding, 0.02 + 0.005 * n_decoding + 0.002 * n_read)

    chunks = []
    for stall_s in (0.0, 30.0):
        budget = PrefillBudget(512)
        observe(32, 0)
        for n_decoding in (1, 2, 3) * 20:
            observe(0, n_decoding)
        if stall_s:
            budget.observe(0, n_stalled, stall_s)
        # From here on there are always three at work, and a prompt is read beside two of them.
        for _ in range(100):
            observe(budget.next(2).n_tokens, 2)
            observe(0, 3)
        chunks.append((budget.next(2).n_tokens, budget.next(0).n_tokens))
    assert chunks[1] == pytest.approx(chunks[0], rel=0.25)


def test_a_slow_step_counts_at_once_and_is_forgotten_slowly() -> None:
    budget = PrefillBudget(2048)
    budget.observe(100, 0, 0.1)
    quick = budget.next(0).n_tokens
    budget.observe(100, 0, 0.4)
    slow = budget.next(0).n_tokens
    assert slow == pytest.approx(quick / 4, abs=1)
    budget.observe(100, 0, 0.1)
    assert slow < budget.next(0).n_tokens < quick
