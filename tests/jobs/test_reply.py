"""What of a model's text becomes the reply, and what is thinking; whole, and piece by piece."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalith_app.jobs.reply import Piece, Reply


def pieces(*parts: str) -> list[Piece]:
    reply = Reply()
    return [piece for part in parts for piece in reply.feed(part)] + reply.end()


def clean(text: str) -> str:
    reply = Reply()
    reply.feed(text)
    reply.end()
    return str(reply)


def read(told: list[Piece], kind: str) -> str:
    """What a reader has in the end, who throws away what it has at each restart."""
    last_restart = max((at for at, piece in enumerate(told) if piece.kind == "restart"), default=-1)
    return "".join(piece.text for piece in told[last_restart + 1 :] if piece.kind == kind)


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
        ("<think>a</think>b</think>c", "b</think>c"),
        ("ends in <th", "ends in <th"),
        ("a\0b", "ab"),
    ],
)
def test_thinking_is_cut_out_and_blanks_around_it(text: str, kept: str) -> None:
    assert clean(text) == kept


texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "ink>", "<", "/", "a", "ü🐉", " ", "\n", "\0", "\u2003"])
).map("".join)


@given(texts)
def test_no_thinking_that_was_opened_and_closed_survives(text: str) -> None:
    assert not re.search("<think>.*?</think>", clean(text.replace("\0", "")), re.DOTALL)


def cleaned_at_once(text: str) -> str:
    """The rule, written as what it says."""
    head, close, rest = text.partition("</think>")
    if close and "<think>" not in head:
        text = rest
    return re.sub("<think>.*?(</think>|$)", "", text, flags=re.DOTALL).replace("\0", "").strip()


@given(texts)
def test_a_reply_is_what_the_rule_says(text: str) -> None:
    assert clean(text) == cleaned_at_once(text)


@given(texts, st.lists(st.integers(0, 40)))
def test_however_a_text_is_cut_the_same_comes_out(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    told = pieces(*(text[start:end] for start, end in itertools.pairwise(edges)))
    assert read(told, "delta") == clean(text)
    assert read(told, "thinking") == read(pieces(text), "thinking")
    assert all(piece.text for piece in told if piece.kind != "restart")


def test_each_piece_is_told_as_soon_as_it_is_certain() -> None:
    reply = Reply()
    assert reply.feed("\n Hi") == [Piece("delta", "Hi")]
    assert reply.feed(" ") == [], "it may be the last"
    assert reply.feed("<") == [], "it may be a tag"
    assert reply.feed("3 ") == [Piece("delta", " <3")]
    assert reply.feed("<thi") == []
    assert reply.feed("nk>hm") == [Piece("thinking", "hm")]
    assert reply.end() == []
    assert str(reply) == "Hi <3"


def test_a_head_that_turns_out_to_be_thinking_is_told_again_as_such() -> None:
    assert pieces("so, ", "hm", " </th", "ink>", "Hi") == [
        Piece("delta", "so,"),
        Piece("delta", " hm"),
        Piece("restart"),
        Piece("thinking", "so, hm"),
        Piece("delta", "Hi"),
    ]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<", "<think", " ", "\0"])
@pytest.mark.parametrize("cut", [1, 10**9], ids=["by the character", "whole"])
def test_a_hostile_text_takes_no_longer_than_it_is(piece: str, cut: int) -> None:
    def cost(n: int) -> float:
        return min(cost_once(n) for _ in range(3))

    def cost_once(n: int) -> float:
        text = piece * (n // len(piece))
        started = time.process_time()
        pieces(*(text[at : at + cut] for at in range(0, len(text), cut)))
        return time.process_time() - started

    cost(1000)
    # Quadratic work would make it 400 times as much, linear work 20 times.
    assert cost(100_000) < 100 * max(cost(5_000), 0.005)
