"""Bytes in any pieces; the text that comes out of them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.engine.text import ReplyText


def read(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    text = ReplyText(stop)
    parts = [text.feed(piece) for piece in pieces]
    return [*parts, text.end()], text.stopped


@settings(deadline=None)
@given(st.text(), st.integers(1, 4))
def test_text_cut_anywhere_comes_out_whole(text: str, size: int) -> None:
    data = text.encode()
    parts, _ = read([data[at : at + size] for at in range(0, len(data), size)], [])
    assert "".join(parts) == text


def test_half_a_character_is_held_back_until_its_rest_comes() -> None:
    first, rest = "é".encode()[:1], "é".encode()[1:]
    assert read([b"a" + first, rest + b"b"], [])[0] == ["a", "éb", ""]


def test_bytes_that_are_no_character_become_the_replacement_character() -> None:
    assert read([b"a\xff", b"b", "é".encode()[:1], b"c"], [])[0] == ["a\ufffd", "b", "", "\ufffdc", ""]


@settings(deadline=None)
@given(st.text(), st.characters(min_codepoint=128, exclude_categories=["Cs"]), st.data())
def test_a_character_that_is_cut_off_at_the_end_is_left_out(text: str, last: str, data: st.DataObject) -> None:
    n_bytes = data.draw(st.integers(1, len(last.encode()) - 1))
    parts, _ = read([text.encode(), last.encode()[:n_bytes]], ["a stop string"])
    assert "".join(parts) == text


@settings(deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_no_part_of_a_stop_string_leaks(text: str, stop: list[str], size: int) -> None:
    parts, stopped = read([text[at : at + size].encode() for at in range(0, len(text), size)], stop)
    shown = "".join(parts)
    assert stopped == any(one in text for one in stop)
    assert text.startswith(shown)
    assert not any(string in shown for string in stop)
    if not stopped:
        assert shown == text


def test_what_only_began_like_a_stop_string_comes_out_as_soon_as_that_is_known() -> None:
    assert read([b"one <", b"end", b"less> two"], ["<end>"])[0] == ["one ", "", "<endless> two", ""]


def test_an_empty_stop_string_stops_nothing() -> None:
    assert read([b"abc"], [""]) == (["abc", ""], False)


@pytest.mark.parametrize("stop", ["a" * 1000 + "b", "ab" * 500 + "c"])
def test_a_long_stop_string_that_nearly_comes_all_the_time_is_no_burden(stop: str) -> None:
    text = ReplyText([stop])
    began = time.process_time()
    for _ in range(20_000):
        text.feed(b"ab")
    assert time.process_time() - began < 10


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["</t>", "</", "t>", "é", "é".encode()[:1], "a", "a</", "🐉"]), max_size=12),
    st.sampled_from([[], ["a</x"], ["t>a"], ["/t>é"]]),
)
def test_where_a_token_that_is_a_marker_begins_is_told_with_its_text_or_before(
    pieces: list[str | bytes], stop: list[str]
) -> None:
    text, shown, told = ReplyText(stop), "", list[int]()
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        shown += text.feed(data, is_marker=piece == "</t>")
        told += text.take_markers()
    shown += text.end()
    n_markers = pieces.count("</t>")
    assert told == sorted(set(told))
    whole = [offset for offset in told if offset + len("</t>") <= len(shown)]
    assert all(shown.startswith("</t>", offset) for offset in whole)
    assert len(told) == n_markers or text.stopped
    assert len(whole) == n_markers or text.stopped
