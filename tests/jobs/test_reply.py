"""What of a model's text becomes the reply, and what is thinking; whole, and piece by piece."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.jobs.worker.reply import Piece, Reply

CLIPPED = "The `<think>` tag opens the reasoning. It is closed by its counterpart. More text follows."


def pieces(reply: Reply, *parts: str) -> list[Piece]:
    return [piece for part in parts for piece in reply.feed(part)] + reply.end()


def read(parts: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in parts if piece.kind == kind)


def parted(text: str, *, is_opened: bool = False) -> tuple[str, str]:
    """Thinking and reply of a model that can think."""
    reply = Reply(thinks=True, is_opened=is_opened)
    parts = pieces(reply, text)
    assert read(parts, "delta") == str(reply)
    return read(parts, "thinking"), str(reply)


@pytest.mark.parametrize(
    ("text", "thinking", "kept"),
    [
        ("  Hello.\n", "", "  Hello.\n"),
        ("<think>hm</think>Hello.", "hm", "Hello."),
        ("\n<think>\na\nb\n</think>\n\nHello.\n", "a\nb", "Hello.\n"),
        ("<think>\n\n</think>\n\nHello.", "", "Hello."),
        ("<think></think>", "", ""),
        ("<think>never closed ", "never closed ", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<think>a</think><think>b</think>c", "a", "<think>b</think>c"),
        ("One <think>x</think>two", "", "One <think>x</think>two"),
        ("never opened</think>Hello.", "", "never opened</think>Hello."),
        ("a < b and <thinking> stays", "", "a < b and <thinking> stays"),
        ("<thinking> stays", "", "<thinking> stays"),
        (" <th", "", " <th"),
        ("<think>ends in </th", "ends in </th", ""),
        ("a\0b", "", "a\0b"),
        (CLIPPED, "", CLIPPED),
    ],
)
def test_thinking_is_what_stands_between_the_tags_at_the_beginning(text: str, thinking: str, kept: str) -> None:
    assert parted(text) == (thinking, kept)


@pytest.mark.parametrize(
    ("text", "thinking", "kept"),
    [
        ("\nhm\n</think>\n\nHello.", "hm", "Hello."),
        ("<think>\nhm</think>Hello.", "hm", "Hello."),
        ("</think>Hello.", "", "Hello."),
        ("never closed", "never closed", ""),
        ("  <th", "<th", ""),
        (" ", "", ""),
        ("a <think> b </think>c", "a <think> b", "c"),
    ],
)
def test_where_the_prompt_opened_the_thinking_the_reply_begins_inside(text: str, thinking: str, kept: str) -> None:
    assert parted(text, is_opened=True) == (thinking, kept)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["<think>", "</think>", "<th", "ink>", "<", "/", "a", "ü🐉", " ", "\n", "\0", "\u2003"]),
        st.text(),
    )
).map("".join)
CUTS = st.lists(st.integers(0, 40))


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cuts), max(len(text), *cuts, 0)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@settings(deadline=None)
@given(TEXTS, CUTS)
def test_of_a_model_that_cannot_think_the_reply_is_what_it_wrote(text: str, cuts: list[int]) -> None:
    reply = Reply()
    parts = pieces(reply, *cut(text, cuts))
    assert read(parts, "delta") == str(reply) == text
    assert read(parts, "thinking") == ""


@pytest.mark.parametrize(
    "text",
    [
        "To strip it use re.sub(r'<think>.*?</think>', '', s). That is all.",
        CLIPPED,
        "Models end their reasoning with `</think>`. Then the answer comes.",
        "<think>abc",
        "\0 \n",
    ],
)
def test_a_reply_about_thinking_is_no_thinking(text: str) -> None:
    reply = Reply()
    assert pieces(reply, text) == [Piece("delta", text)]


def rule(text: str, *, is_opened: bool) -> tuple[str, str, str, str]:
    """Tag, thinking, tag, reply: the rule, written as what it says."""
    head = r"\s*(?:<think>)?\s*" if is_opened else r"\s*<think>\s*"
    if (found := re.fullmatch(rf"({head})(.*?)(\s*</think>\s*)(.*)", text, re.DOTALL)) is None:
        found = re.fullmatch(rf"({head})(.*)()()", text, re.DOTALL)
    if found is None:
        return "", "", "", text
    first, thinking, second, reply = found.groups()
    return first, thinking, second, reply


@settings(deadline=None)
@given(TEXTS, CUTS, st.booleans())
def test_of_one_that_can_thinking_reply_and_tags_together_are_what_it_wrote_however_it_is_cut(
    text: str, cuts: list[int], is_opened: bool
) -> None:
    first, thinking, second, kept = rule(text, is_opened=is_opened)
    assert first + thinking + second + kept == text
    parts = pieces(reply := Reply(thinks=True, is_opened=is_opened), *cut(text, cuts))
    assert (read(parts, "thinking"), read(parts, "delta")) == (thinking, kept)
    assert str(reply) == kept
    assert all(piece.text for piece in parts)


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(0, 60), st.booleans())
def test_an_attempt_that_is_fed_at_once_what_was_written_before_goes_on_as_the_first_would_have(
    text: str, cuts: list[int], n_written: int, is_opened: bool
) -> None:
    first = Reply(thinks=True, is_opened=is_opened)
    before = [piece for part in cut(text[:n_written], cuts) for piece in first.feed(part)]
    again = Reply(thinks=True, is_opened=is_opened)
    parts = again.feed(text[:n_written])
    assert [read(parts, kind) for kind in ("thinking", "delta")] == [
        read(before, kind) for kind in ("thinking", "delta")
    ]
    assert pieces(first, text[n_written:]) == pieces(again, text[n_written:])


def test_each_piece_is_returned_as_soon_as_it_is_certain() -> None:
    reply = Reply(thinks=True)
    assert reply.feed("\n<thi") == [], "it may be the tag"
    assert reply.feed("nk>\nhm") == [Piece("thinking", "hm")]
    assert reply.feed(" ") == [], "it may belong to a tag"
    assert reply.feed("<") == [], "it may be a tag"
    assert reply.feed("3 ") == [Piece("thinking", " <3")]
    assert reply.feed("</think>\n") == []
    assert reply.feed("Hi ") == [Piece("delta", "Hi ")]
    assert reply.feed("<think>") == [Piece("delta", "<think>")]
    assert reply.end() == []
    assert str(reply) == "Hi <think>"


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<", "<think", " ", "\0", "a ", " <"])
@pytest.mark.parametrize("head", ["", "<think>", "<think>a</think>"])
@pytest.mark.parametrize("size", [1, 10**9], ids=["by the character", "whole"])
def test_a_hostile_text_takes_no_longer_than_it_is(piece: str, head: str, size: int) -> None:
    def cost(n: int) -> float:
        text = head + piece * (n // len(piece))
        started = time.process_time()
        pieces(Reply(thinks=True), *(text[at : at + size] for at in range(0, len(text), size)))
        return time.process_time() - started

    cost(1000)
    # Quadratic work would make it 100 or 400 times as much, linear work 10 or 20 times.
    n, times, most = (4_000, 10, 40) if size == 1 else (5_000, 20, 100)
    # On a busy machine one of them may take long.
    assert any(cost(times * n) < most * max(cost(n), 0.005) for _ in range(3))
