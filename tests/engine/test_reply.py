"""What of a model's text becomes the reply, and what is thinking; whole, and piece by piece."""

from __future__ import annotations

import itertools
import re
import time
from typing import NamedTuple, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalith_app.engine.reasoning import FAMILIES, Family, find
from llamalith_app.engine.reply import MAX_HEADER, Piece, Reply
from llamalith_app.settings.formats import Reasoning

THINK = FAMILIES["think"]
CLIPPED = "The `<think>` tag opens the reasoning. It is closed by its counterpart. More text follows."


def pieces(reply: Reply, *parts: str) -> list[Piece]:
    return [piece for part in parts for piece in reply.feed(part)] + reply.end()


def read(parts: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in parts if piece.kind == kind)


def parted(text: str, *, is_opened: bool = False) -> tuple[str, str]:
    """Thinking and reply of a model that can think."""
    reply = Reply(THINK, is_opened=is_opened)
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
    parts = pieces(reply := Reply(THINK, is_opened=is_opened), *cut(text, cuts))
    assert (read(parts, "thinking"), read(parts, "delta")) == (thinking, kept)
    assert str(reply) == kept
    assert all(piece.text for piece in parts)


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(0, 60), st.booleans())
def test_an_attempt_that_is_fed_at_once_what_was_written_before_goes_on_as_the_first_would_have(
    text: str, cuts: list[int], n_written: int, is_opened: bool
) -> None:
    first = Reply(THINK, is_opened=is_opened)
    before = [piece for part in cut(text[:n_written], cuts) for piece in first.feed(part)]
    again = Reply(THINK, is_opened=is_opened)
    parts = again.feed(text[:n_written])
    assert [read(parts, kind) for kind in ("thinking", "delta")] == [
        read(before, kind) for kind in ("thinking", "delta")
    ]
    assert pieces(first, text[n_written:]) == pieces(again, text[n_written:])


def test_each_piece_is_returned_as_soon_as_it_is_certain() -> None:
    reply = Reply(THINK)
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
    is_linear(THINK, frozenset(), head, piece, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    [
        "<|channel|>analysis<|message|>a<|end|>",
        "<|channel|><|message|>",
        "<|channel|><|end|>",
        "<|end|>",
        " a<|channel|>",
    ],
)
@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize("size", [1, 10**9], ids=["by the character", "whole"])
def test_a_hostile_row_of_messages_takes_no_longer_than_it_is(piece: str, has_tokens: bool, size: int) -> None:
    family = FAMILIES["harmony"]
    is_linear(family, family.markers if has_tokens else frozenset(), "<|channel|>final<|message|>a", piece, size)


def is_linear(family: Family, tokens: frozenset[str], head: str, piece: str, size: int) -> None:
    def cost(n: int) -> float:
        text = head + piece * (n // len(piece))
        found = [one.start() for one in re.finditer("<[|]", text)] if tokens else []
        started = time.process_time()
        reply = Reply(family, tokens=tokens)
        reply.feed("", found)
        pieces(reply, *(text[at : at + size] for at in range(0, len(text), size)))
        return time.process_time() - started

    cost(1000)
    # Quadratic work would make it 100 or 400 times as much, linear work 10 or 20 times.
    n, times, most = (4_000, 10, 40) if size == 1 else (5_000, 20, 100)
    # On a busy machine one of them may take long.
    assert any(cost(times * n) < most * max(cost(n), 0.005) for _ in range(3))


# Every family


class Markers(NamedTuple):
    """What a model of the family writes around thinking and reply."""

    before: str
    between: str
    behind: str = ""


WRITTEN = {
    "harmony": Markers(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", "<|end|>"
    ),
    "gemma4": Markers("<|channel>thought\n", "<channel|>"),
    "command-r7b": Markers("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "cohere": Markers("<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>", "<|END_TEXT|>"),
    "magistral": Markers("[THINK]", "[/THINK]"),
    "seed": Markers("<seed:think>\n", "\n</seed:think>"),
    "minimax-m3": Markers("<mm:think>", "</mm:think>"),
    "granite": Markers("<think>", "</think>\n<response>", "</response>\n"),
    "apriel": Markers("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n", "\n[END FINAL RESPONSE]\n"),
    "exaone": Markers("<thought>\n", "\n</thought>\n\n"),
    "think": Markers("<think>\n", "\n</think>\n\n"),
    "thinking": Markers("<thinking>", "</thinking>"),
}
every_family = pytest.mark.parametrize("name", WRITTEN)
as_tokens_or_text = pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "texts"])
TEMPLATES = {
    "harmony": "{{ '<|start|>assistant<|channel|>analysis<|message|>' + thinking + '<|end|>' }}<|return|>",
    "gemma4": "{{ '<|channel>thought\n' + thinking + '\n<channel|>' }}",
    "command-r7b": "<|START_THINKING|>{{ plan }}<|END_THINKING|><|START_RESPONSE|>{{ content }}<|END_RESPONSE|>",
    "cohere": "<|START_THINKING|><|END_THINKING|><|START_TEXT|>{{ content }}<|END_TEXT|>",
    "magistral": "{{ '[THINK]' + thinking + '[/THINK]' }}",
    "seed": "{% set think_begin_token = '<seed:think>' %}{% set think_end_token = '</seed:think>' %}",
    "minimax-m3": "{% set think_end_token = '</mm:think>' %}<response>{{ result }}</response>",
    "granite": "Write your thoughts between <think></think> and write your response between <response></response>.",
    "apriel": "write your response after the marker [BEGIN FINAL RESPONSE]. {# <thinking> #}",
    "exaone": "[|assistant|]<thought>\n",
    "think": "{{ content.split('</think>')[-1] }}<response>{{ result }}</response>",
    "thinking": "Answer behind <thinking> </thinking>.",
}


class Text:
    """A text and where its markers are tokens."""

    def __init__(self, name: str, *, has_tokens: bool) -> None:
        self.text = ""
        self.offsets: list[int] = []
        self._family = FAMILIES[name]
        self.tokens = self._family.markers if has_tokens else frozenset[str]()

    def markers(self, text: str) -> Text:
        """With every marker in it as a token."""
        if self.tokens:
            found = re.finditer("|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))), text)
            self.offsets += [len(self.text) + one.start() for one in found]
        return self.plain(text)

    def plain(self, text: str) -> Text:
        self.text += text
        return self

    def parted(self, cuts: list[int] | None = None, *, is_opened: bool = False) -> tuple[str, str]:
        """Thinking and reply, however the text is cut; a marker is told with the first letter of its text."""
        reply = Reply(self._family, tokens=self.tokens, is_opened=is_opened)
        parts, start = [], 0
        for part in cut(self.text, cuts or []):
            told = [offset for offset in self.offsets if start <= offset < start + len(part)]
            parts += reply.feed(part, told)
            start += len(part)
        parts += reply.end()
        assert read(parts, "thinking") == reply.thinking
        assert read(parts, "delta") == str(reply)
        assert all(piece.text for piece in parts)
        return reply.thinking, str(reply)


def test_every_family_has_a_name_that_the_setting_knows_and_an_example_here() -> None:
    assert set(get_args(Reasoning)) == {"auto", "none", *FAMILIES}
    assert set(FAMILIES) == set(WRITTEN) == set(TEMPLATES)


@every_family
def test_a_family_is_found_by_the_template_first_and_by_the_vocabulary_next(name: str) -> None:
    others = {marker for other in FAMILIES if other != name for marker in FAMILIES[other].markers}
    assert find(TEMPLATES[name], others) == name
    if name not in ("granite", "apriel"):
        assert find("<|im_start|>{{ content }}", FAMILIES[name].markers) == name
    assert find("<|im_start|>{{ content }}", {"<|im_start|>", "<|end|>", "<|start|>"}) == ""


@every_family
@as_tokens_or_text
@given(data=st.data())
def test_thinking_and_reply_come_apart_without_their_markers_however_the_text_is_cut(
    name: str, has_tokens: bool, data: st.DataObject
) -> None:
    noise = st.lists(st.sampled_from(["<", "[", "|", "<|", "</", "ü🐉", " ", "\n", "a"]), max_size=8).map("".join)
    thinking, kept = (f"x{data.draw(noise)}y" for _ in range(2))
    cuts = data.draw(CUTS)
    text = Text(name, has_tokens=has_tokens)
    before, between, behind = WRITTEN[name]
    text.markers(before).plain(thinking).markers(between).plain(kept).markers(behind)
    assert text.parted(cuts) == (thinking, kept)
    alone = Text(name, has_tokens=has_tokens).plain(thinking).markers(between).plain(kept).markers(behind)
    assert alone.parted(cuts, is_opened=True) == (thinking, kept)


@every_family
@given(cuts=CUTS)
def test_a_marker_that_is_quoted_ends_nothing_where_only_a_token_is_one(name: str, cuts: list[int]) -> None:
    family = FAMILIES[name]
    before, between, behind = WRITTEN[name]
    quoted = f"it writes {family.closes}, then {between}{before}{behind} and goes on"
    text = Text(name, has_tokens=True)
    text.markers(before).plain(quoted).markers(between).plain(quoted).markers(behind)
    assert text.parted(cuts) == (quoted, quoted)
    untouched = Text(name, has_tokens=True).plain(f"{before}{quoted}{between}{quoted}{behind}")
    assert untouched.parted(cuts) == ("", untouched.text)


@every_family
def test_where_a_marker_is_no_token_the_first_closing_text_ends_the_thinking(name: str) -> None:
    before, between, behind = WRITTEN[name]
    text = Text(name, has_tokens=False).plain(f"{before}hm{between}Hello {FAMILIES[name].reply_opens}.{behind}")
    assert text.parted() == ("hm", f"Hello {FAMILIES[name].reply_opens}.")


@every_family
@as_tokens_or_text
def test_a_reply_that_is_cut_within_its_thinking_is_empty_and_the_thinking_is_kept(name: str, has_tokens: bool) -> None:
    before, between, _ = WRITTEN[name]
    for n in range(1, 9):
        assert Text(name, has_tokens=has_tokens).markers(before).plain("let me think"[:n]).parted()[1] == ""
    cut_off = Text(name, has_tokens=has_tokens).markers(before).plain("let me think")
    assert cut_off.parted() == cut_off.parted([1, 3]) == ("let me think", "")
    assert Text(name, has_tokens=has_tokens).plain("let me").parted(is_opened=True) == ("let me", "")
    assert cut_off.markers(between).parted() == ("let me think", "")


@every_family
@as_tokens_or_text
def test_a_reply_without_thinking_is_letter_for_letter_what_was_written(name: str, has_tokens: bool) -> None:
    for text in ("  Hello.\n", "One < two [or] <| three", " ", f"See {WRITTEN[name].before} and more", "[", "<|"):
        assert Text(name, has_tokens=has_tokens).plain(text).parted() == ("", text)


@every_family
def test_thinking_comes_piece_by_piece(name: str) -> None:
    before, between, _ = WRITTEN[name]
    reply = Reply(FAMILIES[name])
    assert reply.feed(before) == []
    assert reply.feed("hm") == [Piece("thinking", "hm")]
    assert reply.feed(between) == []
    assert reply.feed("Hi") == [Piece("delta", "Hi")]


@as_tokens_or_text
def test_of_several_messages_each_is_what_its_header_says(has_tokens: bool) -> None:
    def message(header: str, content: str) -> str:
        return f"<|channel|>{header}<|message|>{content}<|end|><|start|>assistant"

    def parted(written: str) -> tuple[str, str]:
        return Text("harmony", has_tokens=has_tokens).markers(written).parted()

    thoughts = message("analysis", "one") + message("analysis", "two")
    assert parted(thoughts + message("final <|constrain|>json", "{}")) == ("one\n\ntwo", "{}")
    preamble = message("commentary", "I look.") + message("analysis", "so") + message("final", " Found.")
    assert parted(preamble) == ("so", "I look.\n\nFound.")
    assert parted("<|channel|>commentary to=assistant" + thoughts) == ("one\n\ntwo", "")
    assert parted("<|start|>assistant" + thoughts) == ("one\n\ntwo", "")
    assert parted("<|channel|>analys") == ("", "")
    assert parted("<|channel|>" + "x" * MAX_HEADER + "y<|message|>z")[1].startswith("xxx"), "that is no header"


def test_a_channel_that_is_empty_or_has_no_end_of_its_header_hides_nothing() -> None:
    for written, kept in (
        ("<|channel>thought\n<channel|>Hi", ("", "Hi")),
        ("<|channel>thought<channel|>Hi", ("", "Hi")),
        ("<|channel><|channel>thought\nhm<channel|>Hi", ("hm", "Hi")),
    ):
        assert Text("gemma4", has_tokens=True).markers(written).parted() == kept


def test_who_is_told_not_to_think_may_close_what_nobody_opened() -> None:
    assert Text("minimax-m3", has_tokens=True).markers("</mm:think>").plain("Hi").parted() == ("", "Hi")
    assert Text("minimax-m3", has_tokens=False).plain("</mm:think>Hi").parted() == ("", "</mm:think>Hi")


def test_the_end_of_a_reply_is_one_only_where_nothing_follows() -> None:
    for written, kept in (
        ("<response>Write </response> last.</response>\n", "Write </response> last."),
        ("<think>hm</think>Hi</response>", "Hi"),
        ("Hi</response>", "Hi</response>"),
        ("<response>a </resp", "a </resp"),
    ):
        assert Text("granite", has_tokens=False).plain(written).parted()[1] == kept
