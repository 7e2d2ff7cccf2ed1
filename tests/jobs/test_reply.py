"""What of a model's text becomes the reply."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.jobs.reply import clean


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  Hello.\n", "Hello."),
        ("<think>hm</think>Hello.", "Hello."),
        ("<think>a\nb</think>\n\nHello.", "Hello."),
        ("One <think>x</think>two<think>y</think> three", "One two three"),
        ("Hello. <think>never closed", "Hello."),
        ("opened by the template</think>Hello.", "Hello."),
        ("<think></think>", ""),
        ("a < b and <thinking> stays", "a < b and <thinking> stays"),
        ("a\0b", "ab"),
    ],
)
def test_thinking_is_cut_out_and_blanks_around_it(text: str, kept: str) -> None:
    assert clean(text) == kept


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n"])).map("".join))
def test_no_thinking_that_was_opened_and_closed_survives(text: str) -> None:
    assert not re.search("<think>.*?</think>", clean(text), re.DOTALL)


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<", "<think"])
def test_a_hostile_text_takes_no_longer_than_it_is(piece: str) -> None:
    def cost(n: int) -> float:
        text = piece * n
        started = time.process_time()
        clean(text)
        return time.process_time() - started

    cost(1000)
    # Quadratic work would make this a hundredfold of a thousandfold: seconds, not this.
    assert cost(100_000) < 0.5
