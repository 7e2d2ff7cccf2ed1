"""Renders a text block by block while it is written. Pure: deltas go in, blocks of HTML come out.

A block is a paragraph, a list's item, a table's row, a code block and the like, counted from 0. Which text is which
block follows from the text alone, never from how it came: a number means the same in every stream of a text. A finished
block never changes. All of them together are `markdown.render` of the text, if that has at most `markdown.MAX_CHARS`.

The open block is rendered again as it grows, where it is short or has grown enough. Otherwise, and in code, the page
gets its new text as it is. So a stream costs a constant times its length, however long one block is. Knows no job, no
stream of events and no page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it.token import Token

from llamalith_app.web import markdown
from llamalith_app.web.markdown import Outline

INTERVAL_S = 0.1
"""The open block is rendered at most this often."""
SHORT_CHARS = 1_500
"""An open block of at most this length is rendered again whenever it has grown."""
HTML_PER_CHAR = 16
"""Of a longer one: how much HTML may be made again for each character that comes. A table can be much larger than its
text."""
MAX_HEADER_CHARS = 1_000
"""A table with a longer header is one block: the header is read again with each row."""
FENCE_END = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*")
MAYBE_FENCE_END = re.compile(r" {0,3}[`~]*[ \t]*")


class Block(NamedTuple):
    """A block as it is now. It replaces the one of its number and all behind that."""

    number: int
    within: str
    """Where it belongs: `list` and `rows` are the newest list and the body of the newest table. Empty: behind the
    others."""
    html: str
    finished: bool


class More(NamedTuple):
    """Text at the end of the newest block, which is open. Not escaped."""

    number: int
    text: str


class Unit(NamedTuple):
    """A block as it stands in the text that is not finished."""

    kind: str
    """Of its first token; `header` and `row` of a table."""
    within: str
    tokens: list[Token]
    first: int
    last: int
    """The line behind its last."""


class BlockStream:
    """The blocks of one text."""

    def __init__(self) -> None:
        self.n_finished = 0
        """How many blocks there are that never change."""
        self.n_unfinished = 0
        """How many characters are not in one of them."""
        self._text: list[str] = []
        """What is not in one of them."""
        self._new: list[str] = []
        """The end of that, which the page has not got."""
        self._half_break = False
        """A carriage return came last, which may be half of a line break."""
        self._n_open = 0
        """The open blocks that the page has; no more than two or three."""
        self._rendered_at: float | None = None
        self._credit = 0
        """How many characters of HTML may be made."""
        self._n_html = 0
        """How many were made last time."""
        self._level = 1
        """Of the last heading."""
        self._in_list = False
        """The text begins with an item of the newest list."""
        self._header = ""
        """The text may begin with a row of the newest table, and this is its header."""
        self._fence = ""
        """The marks of the code block that the text begins with, and that is open."""
        self._line = ""
        """The last line of that code, not complete."""
        self._n_shown = 0
        """How much of it the page has."""

    @property
    def has_new(self) -> bool:
        """`update` has something left to render."""
        return bool(self._new)

    def add(self, text: str) -> None:
        """More of the text."""
        if self._half_break:
            text = "\r" + text
        self._half_break = text.endswith("\r")
        self._add(text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n"))

    def _add(self, text: str) -> None:
        if text:
            self._credit += HTML_PER_CHAR * len(text)
            self.n_unfinished += len(text)
            self._text.append(text)
            self._new.append(text)

    def update(self, now: float) -> list[Block | More]:
        """What the page has not got: finished blocks, then the open ones. Nothing, if the last was less than INTERVAL_S
        ago. `now`: seconds of a clock that only advances."""
        if not self._new or (self._rendered_at is not None and now - self._rendered_at < INTERVAL_S):
            return []
        self._rendered_at = now
        return list(self._update())

    def finish(self) -> list[Block]:
        """The last blocks: the text has ended."""
        if self._half_break:
            self._half_break = False
            self._add("\n")
        text = "".join(self._text)
        self._text, self._new, self._fence = [], [], ""
        if len(text) > markdown.MAX_CHARS:
            return [self._block(markdown.plain(text))]
        return [self._finished(unit) for unit in self._units(text)]

    def _update(self) -> Iterator[Block | More]:
        if self._fence:
            yield from self._update_code()
            if self._fence or not self._text:
                return
        text = "".join(self._text)
        self._text = [text]
        is_long = len(text) > SHORT_CHARS
        if self._n_open and is_long and (self._n_html > self._credit or len(text) > markdown.MAX_CHARS):
            yield More(self.n_finished + self._n_open - 1, self._take_new())
            return
        self._new = []
        lines = text.split("\n")
        # Its last line may not stay empty.
        units = self._units(text if lines[-1].strip(" \t") else text[: len(text) - len(lines[-1])])
        n_final = _n_final(units, lines)
        for unit in units[:n_final]:
            yield self._finished(unit)
        if n_final:
            self._cut(units, n_final, lines)
        elif n_empty := units[0].first if units else len(lines) - 1:
            # They end a table.
            self._header = ""
            self._keep("\n".join(lines[n_empty:]))
        rest = units[n_final:]
        self._n_open = len(rest)
        if rest and _is_open_code(rest[0], lines):
            yield from self._begin_code(rest[0].tokens[0])
            return
        outline = Outline(self._level)
        html = [_html(unit, outline) for unit in rest]
        self._n_html = sum(map(len, html))
        self._credit -= self._n_html if is_long else 0
        for number, (unit, its_html) in enumerate(zip(rest, html, strict=True), self.n_finished):
            yield Block(number, unit.within, its_html, finished=False)

    def _take_new(self) -> str:
        new = "".join(self._new)
        self._new = []
        return new

    def _keep(self, text: str) -> None:
        self.n_unfinished = len(text)
        self._text = [text] if text else []

    def _cut(self, units: list[Unit], n_final: int, lines: list[str]) -> None:
        """Leaves the text of what is not final, and what has to be known to read it."""
        newest = units[n_final - 1]
        begin = units[n_final].first if n_final < len(units) else newest.last
        headers = [unit for unit in units[:n_final] if unit.kind == "header"]
        if newest.kind not in ("header", "row") or begin > newest.last:
            self._header = ""
        elif headers:
            self._header = "".join(f"{line}\n" for line in lines[headers[-1].first : headers[-1].last])
        self._in_list = n_final < len(units) and units[n_final].within == "list"
        self._keep("\n".join(lines[begin:]))

    def _finished(self, unit: Unit) -> Block:
        outline = Outline(self._level)
        html = _html(unit, outline)
        self._level = outline.level
        return self._block(html, unit.within)

    def _block(self, html: str, within: str = "") -> Block:
        self.n_finished += 1
        self._n_open = 0
        return Block(self.n_finished - 1, within, html, finished=True)

    def _begin_code(self, fence: Token) -> Iterator[Block | More]:
        """An open code block is not rendered again until it closes, so that it costs no more than its text."""
        self._fence = fence.markup
        yield Block(self.n_finished, "", markdown.CLEANER.clean(markdown.code("", fence.info)), finished=False)
        self._line, self._n_shown = "", 0
        self._new = ["".join(self._text).partition("\n")[2]]
        yield from self._update_code()

    def _update_code(self) -> Iterator[Block | More]:
        new = self._line + self._take_new()
        *complete, self._line = new.split("\n")
        for number, line in enumerate(complete):
            if _closes(line, self._fence):
                rest = "\n".join([*complete[number + 1 :], self._line])
                text = "".join(self._text)
                code = text[: len(text) - len(rest)]
                self._fence = ""
                yield from map(self._finished, self._units(code))
                self._keep(rest)
                self._new = list(self._text)
                return
        shown = new[: len(new) - len(self._line)] if MAYBE_FENCE_END.fullmatch(self._line) else new
        if len(shown) > self._n_shown:
            yield More(self.n_finished, shown[self._n_shown :])
        self._n_shown = len(shown) - (len(new) - len(self._line))

    def _units(self, text: str) -> list[Unit]:
        n_before = self._header.count("\n")
        units: list[Unit] = []
        tokens = markdown.parse(self._header + text)
        begin = 0
        for end, token in enumerate(tokens, 1):
            if token.level == 0 and token.nesting <= 0:
                units += self._units_of(tokens[begin:end], is_first=begin == 0)
                begin = end
        return [unit._replace(first=unit.first - n_before, last=unit.last - n_before) for unit in units]

    def _units_of(self, tokens: list[Token], *, is_first: bool) -> Iterator[Unit]:
        """Those of a whole list, table or other block."""
        opening = tokens[0]
        first, last = _lines(opening)
        if opening.tag in ("ul", "ol"):
            items = _parts(tokens, "list_item_open", level=1)
            ends = [*(_lines(item[0])[0] for item in items[1:]), last]
            for number, (item, end) in enumerate(zip(items, ends, strict=True)):
                if number == 0 and not (is_first and self._in_list):
                    yield Unit(opening.type, "", [opening, *item, tokens[-1]], first, end)
                else:
                    yield Unit(opening.type, "list", item, _lines(item[0])[0], end)
        elif opening.type == "table_open" and _header_chars(tokens) <= MAX_HEADER_CHARS:
            at = next(i for i, token in enumerate(tokens) if token.type == "thead_close")
            if not (is_first and self._header):
                yield Unit("header", "", [*tokens[: at + 1], tokens[-1]], first, first + 2)
            for row in _parts(tokens[at:], "tr_open", level=2):
                yield Unit("row", "rows", row, *_lines(row[0]))
        else:
            yield Unit(opening.type, "", tokens, first, last)


def _html(unit: Unit, outline: Outline) -> str:
    return outline.rows_html(unit.tokens) if unit.within == "rows" else outline.html(unit.tokens)


def _lines(token: Token) -> tuple[int, int]:
    assert token.map is not None  # noqa: S101 - every token that opens a block has one
    return token.map[0], token.map[1]


def _parts(tokens: list[Token], opening: str, *, level: int) -> list[list[Token]]:
    """The tokens of each item or row."""
    begins = [i for i, token in enumerate(tokens) if token.type == opening and token.level == level]
    closing = opening.replace("open", "close")
    ends = [i + 1 for i, token in enumerate(tokens) if token.type == closing and token.level == level]
    return [tokens[begin:end] for begin, end in zip(begins, ends, strict=True)]


def _header_chars(tokens: list[Token]) -> int:
    row = next(i for i, token in enumerate(tokens) if token.type == "tr_close")
    return sum(len(token.content) + len("|-|") for token in tokens[:row])


def _closes(line: str, marks: str) -> bool:
    found = FENCE_END.fullmatch(line)
    return found is not None and found[1].startswith(marks)


def _is_open_code(unit: Unit, lines: list[str]) -> bool:
    return unit.kind == "fence" and unit.first < len(lines) - 1 and not _is_closed_code(unit, lines)


def _is_closed_code(unit: Unit, lines: list[str]) -> bool:
    return unit.last - unit.first > 1 and _closes(lines[unit.last - 1], unit.tokens[0].markup)


def _n_final(units: list[Unit], lines: list[str]) -> int:
    """How many of the units, from the first on, no later text can change. Only what a complete line says counts."""
    for number, unit in enumerate(units):
        following = units[number + 1] if number + 1 < len(units) else None
        if not (_is_ended(unit, lines) or (following is not None and _ends(unit, following, lines))):
            return number
    return len(units)


def _ends(unit: Unit, following: Unit, lines: list[str]) -> bool:
    """Whether the next one ends this one for good."""
    if following.first >= len(lines) - 1:
        return False
    # What more than its first line makes a formula or a table may turn out to belong to the paragraph.
    is_doubtful = following.kind in ("math_block", "header", "table_open") and not _is_ended(following, lines)
    return not (is_doubtful and unit.kind == "paragraph_open" and unit.last == following.first)


def _is_ended(unit: Unit, lines: list[str]) -> bool:
    """Whether it has ended, whatever follows."""
    if unit.last >= len(lines):
        return False
    match unit.kind:
        case "heading_open" | "hr" | "header" | "row":
            return True
        case "fence":
            return _is_closed_code(unit, lines)
        case "math_block":
            return not unit.tokens[0].meta["open"]
        case "paragraph_open" | "blockquote_open" | "table_open":
            return unit.last < len(lines) - 1 and not lines[unit.last].strip(" \t")
        case _:
            return False
