"""Invisible characters in names and excerpts are shown as marks."""

from __future__ import annotations

import pytest

from llamalith_app.web.visible import Kind, visible, visible_html

AS_IT_IS = ["invoice.exe", "naïve é", "שלום 12", "日本語", "\U0001fae8", "e\u0301", "a b", "\u0602"]
MARKED = {
    "\u202e": "⟨U+202E⟩",
    "\u2066": "⟨U+2066⟩",
    "\u200f": "⟨U+200F⟩",
    "\u200d": "⟨U+200D⟩",
    "\u00ad": "⟨U+00AD⟩",
    "\ufeff": "⟨U+FEFF⟩",
    "\x1b": "⟨U+001B⟩",
    "\n": "⟨U+000A⟩",
    "\u2028": "⟨U+2028⟩",
    "\ud800": "⟨U+D800⟩",
    "\ue000": "⟨U+E000⟩",
    "\u00a0": "⟨U+00A0⟩",
    "\u3000": "⟨U+3000⟩",
    "\u3164": "⟨U+3164⟩",
    "\u2800": "⟨U+2800⟩",
    "\ufe0f": "⟨U+FE0F⟩",
    "\U000e0041": "⟨U+E0041⟩",
    "\U000e0fff": "⟨U+E0FFF⟩",
}


@pytest.mark.parametrize("name", AS_IT_IS)
def test_a_name_of_letters_is_shown_as_it_is(name: str) -> None:
    assert visible(name) == visible(name, Kind.EXCERPT) == name
    assert visible_html(name) == f"<bdi>{name}</bdi>"


@pytest.mark.parametrize(("char", "mark"), MARKED.items(), ids=MARKED.values())
def test_an_invisible_character_in_a_name_becomes_a_mark(char: str, mark: str) -> None:
    assert visible(f"a{char}b") == f"a{mark}b"
    assert visible_html(f"a{char}b") == f'<bdi>a<bdi class="mark" dir="ltr">{mark}</bdi>b</bdi>'


def test_spaces_that_html_collapses_become_marks_in_a_name() -> None:
    assert visible(" a  b ") == "⟨U+0020⟩a ⟨U+0020⟩b⟨U+0020⟩"


SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"


@pytest.mark.parametrize(
    "text", ["👩\u200d👩\u200d👧 ❤\ufe0f", SCOTLAND, "\u0645\u06cc\u200c\u062e", " two\n\tlines\u00a0 ", "x\u3000y"]
)
def test_an_excerpt_keeps_emoji_joined_scripts_and_white_space(text: str) -> None:
    assert visible_html(text, Kind.EXCERPT) == visible(text, Kind.EXCERPT) == text


@pytest.mark.parametrize("char", ["\u202e", "\u2067", "\u200b", "\x1b", "\u2029", "\U000e0067", "\u3164"])
def test_an_excerpt_marks_all_other_invisible_characters(char: str) -> None:
    assert visible(f"a{char}b", Kind.EXCERPT) == f"a{visible(char)}b"


def test_html_stays_escaped_beside_marks() -> None:
    assert visible_html("<b>\u202e&") == '<bdi>&lt;b&gt;<bdi class="mark" dir="ltr">⟨U+202E⟩</bdi>&amp;</bdi>'
