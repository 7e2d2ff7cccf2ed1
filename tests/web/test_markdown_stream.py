"""The blocks of a text that grows are the HTML of the whole text, however it was cut, at a cost like its length."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it.token import Token

from llamalith_app.web import markdown
from llamalith_app.web.markdown_stream import INTERVAL_S, Block, BlockStream, More

# fmt: off
FRAGMENTS = [
    "# Title", "## Two", "Setext\n===", "Setext\n---", "- a", "- b\n  more", "* star", "+ plus", "1. one", "2. two",
    "7) seven", "  - nested", "    deeper", "- ", "-", "1.", "> quote", "> - in quote", ">", "lazy", "```", "```py",
    "~~~", "````", "  ```", "x = 1", "| a | b |", "|---|:-:|", "| 1 | 2 |", "a|b", "-|-", "|", "***", "- - -",
    "    code", "\tcode", "$$", "\\[", "\\]", "$$ x $$", "$x$ and $$y$$", "x $$", "**bold", "`tick", "[a](https://b)",
    "![i](https://c)", "[a]: https://b", "[a]", "<b>", "&amp;", "text", "text  ", "שלום", "\u202eturned", "\ufffd\0",
    "\r", "", "", "", " ", "   ", "\u00a0", "\u2028", "\x0c", "=", "---", "🐉",
]
# fmt: on
TEXTS = st.lists(
    st.tuples(
        st.sampled_from(FRAGMENTS),
        st.sampled_from(["\n", "\n", "\n", "\n\n", "\n\n\n", " ", "", "\r\n", "\n  ", "\n    ", "\n> "]),
    ),
    max_size=14,
).map(lambda parts: "".join(text + end for text, end in parts))


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    at = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[begin:end] for begin, end in itertools.pairwise(at)]


DELTA_CHARS = 10


class Page:
    """What a page makes of the blocks, as static/blocks.js does."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.mores: dict[int, str] = {}

    def apply(self, changes: Iterable[Block | More]) -> None:
        for change in changes:
            if isinstance(change, More):
                assert change.number == len(self.blocks) - 1
                assert not self.blocks[-1].finished
                self.mores[change.number] = self.mores.get(change.number, "") + change.text
                continue
            assert change.number <= len(self.blocks)
            assert not any(block.finished for block in self.blocks[change.number :]), "a finished block came again"
            del self.blocks[change.number :]
            self.mores = {number: text for number, text in self.mores.items() if number < change.number}
            self.blocks.append(change)

    def html(self) -> str:
        roots: list[str] = []
        for block in self.blocks:
            if not block.within:
                roots.append(block.html)
                continue
            end = {"list": r"</[uo]l>$", "rows": r"</tbody></table></div>$"}[block.within]
            begin = re.search(end, roots[-1])
            assert begin is not None, roots[-1]
            roots[-1] = roots[-1][: begin.start()] + block.html + roots[-1][begin.start() :]
        return "".join(roots)


def streamed(parts: Iterable[str], clock: Iterable[float]) -> tuple[Page, BlockStream]:
    page, stream = Page(), BlockStream()
    for part, now in zip(parts, clock, strict=False):
        stream.add(part)
        page.apply(stream.update(now))
    page.apply(stream.finish())
    return page, stream


@settings(max_examples=4 * settings().max_examples)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=60))
@example("- a\n$$\nx\n- b\n$$", range(20))
@example("a\n\\[\nb\n- c\n\nd", range(20))
@example("a\n$$\nb\n- c\n$$\nd", range(20))
@example("|a|b|\n|-|-|\n|1|2|\n\n|3|4|", range(30))
@example("|a|b|\n|-|-|\n\n\n|3|4|", range(30))
@example("- a\n\n  b\n- c\n\n\n1. d\n2. e\n* f", range(40))
@example("```py\nx\n``\n```\ny", range(30))
@example("# a\n### b\n\n> # c\n\n- ## d\n- # e", range(40))
def test_finished_blocks_are_the_whole_text_s_html_however_it_was_cut(text: str, cuts: Iterable[int]) -> None:
    page, _ = streamed(pieces(text, cuts), itertools.count())
    assert page.html() == markdown.render(text)
    assert all(block.finished for block in page.blocks)
    at_once, _ = streamed([text], itertools.count())
    assert page.blocks == at_once.blocks


def texts(n_chars: int) -> dict[str, str]:
    """By kind: texts of about so many characters, most of them one block alone."""

    def repeated(text: str) -> str:
        return text * (n_chars // len(text))

    return {
        "prose": repeated("A paragraph of **some** length with `code` and a [link](https://a.example).\n\n" * 2),
        "one list": repeated("- An item of a list, with *some* words\n"),
        "one item": "- The only item\n" + repeated("  - An item within it\n"),
        "one table": "| a | b |\n|---|---|\n" + repeated("| a cell | another **cell** |\n"),
        "a wide table": "|"
        + "a column of a long name|" * 40
        + "\n|"
        + "-|" * 40
        + "\n"
        + repeated("| a cell | another |\n"),
        "one code block": "```python\n" + repeated("def f(x): return x + 1\n") + "```\n",
        "an open code block": "```\n" + repeated("def f(x): return x + 1\n"),
        "one quote": repeated("> A line of a long quote\n"),
        "one paragraph": repeated("A paragraph that does not end. "),
        "indented code": repeated("    x = 1\n"),
        "empty lines": repeated("\n \n"),
        "a formula": "$$\n" + repeated("x + y\n"),
    }


def cost(text: str) -> tuple[int, int]:
    """How many characters were parsed, and how many were sent, for a stream of deltas that come one by one."""
    n_parsed, n_sent = 0, 0
    parse = markdown.parse

    def counting(part: str) -> list[Token]:
        nonlocal n_parsed
        n_parsed += len(part)
        return parse(part)

    page, stream = Page(), BlockStream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markdown, "parse", counting)
        for number in range(0, len(text), DELTA_CHARS):
            stream.add(text[number : number + DELTA_CHARS])
            changes = stream.update(number * INTERVAL_S)
            page.apply(changes)
            n_sent += sum(len(change.text if isinstance(change, More) else change.html) for change in changes)
        page.apply(stream.finish())
    assert page.html() == markdown.render(text)
    return n_parsed, n_sent


@pytest.mark.slow
@pytest.mark.parametrize("kind", texts(1000))
def test_a_stream_costs_a_constant_times_its_length_even_if_it_is_one_block(kind: str) -> None:
    (parsed, sent), (parsed_twice, sent_twice) = (cost(texts(n)[kind]) for n in (15_000, 30_000))
    assert parsed < 40 * 15_000
    assert sent < 60 * 15_000
    assert parsed_twice < 2.2 * parsed
    assert sent_twice <= 2.2 * sent
