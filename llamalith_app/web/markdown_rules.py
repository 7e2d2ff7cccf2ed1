"""What our Markdown has beyond CommonMark: formulas, and bare addresses as links. Rules for markdown-it's parser.

Formulas stand as `$…$` and `\\(…\\)` within a line, and as `$$…$$` and `\\[…\\]` on their own. None contains an empty
line. Each rule's time is linear in the text, all its calls together. Knows no HTML.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

ADDRESS = re.compile(r"://[^\s<>\"`\[\]\\]+")
SCHEME = re.compile(r"(?<![\w.+-])https?\Z", re.IGNORECASE)
DISPLAYED = {"$$": "$$", "\\[": "\\]"}
"""What opens and closes a formula on its own."""
CLOSERS = {
    "$": re.compile(r"(?<!\\)\$"),
    "$$": re.compile(r"(?<!\\)\$\$"),
    "\\(": re.compile(r"\\\)"),
    "\\[": re.compile(r"\\\]"),
}


PRICE = re.compile(r"\s\$|.\$[0-9]", re.DOTALL)
"""What the end of a formula between single signs does not look like, as in Pandoc: `$5 and $10`, `$5-$10`."""


BLANKS = " \t"


class Failed(NamedTuple):
    """A search for the end of a formula that found none; it fails from each line that it passed."""

    closer: str
    first: int
    last: int
    indent: int
    end: int


def add_rules(parser: MarkdownIt) -> None:
    """Teaches the parser formulas (tokens `math_block` and `math_inline`) and addresses (`link_open` …)."""
    parser.block.ruler.before("fence", "math_block", _math_block, {"alt": ["paragraph"]})
    parser.inline.ruler.before("escape", "math_inline", _math_inline)
    parser.inline.ruler.before("escape", "address", _address)


def _math_block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    start = state.bMarks[start_line] + state.tShift[start_line]
    closer = DISPLAYED.get(state.src[start : start + 2])
    is_lazy = state.sCount[start_line] < state.blkIndent
    if closer is None or is_lazy or state.is_code_block(start_line):
        return False
    lines = [state.src[start + 2 : state.eMarks[start_line]]]
    if closer in lines[0]:
        last_line = start_line if lines[0].rstrip(BLANKS).endswith(closer) else None
    else:
        last_line = _last_line(state, closer, start_line, end_line)
    if last_line is None:
        return False
    if silent:
        return True
    behind = min(last_line + 1, end_line)
    lines += [state.src[state.bMarks[line] : state.eMarks[line]] for line in range(start_line + 1, behind)]
    content = "\n".join(lines).strip(BLANKS + "\n")
    token = state.push("math_block", "div", 0)
    token.markup = closer
    # An open one stands at the end of the text, and may turn out to be none.
    is_open = last_line >= end_line or not content.endswith(closer)
    token.meta = {"open": is_open}
    token.content = (
        state.src[start : start + 2] + "\n".join(lines)
        if is_open
        else content.removesuffix(closer).strip(BLANKS + "\n")
    )
    token.map = [start_line, behind]
    state.line = behind
    return True


def _last_line(state: StateBlock, closer: str, start_line: int, end_line: int) -> int | None:
    """The line that closes the formula; `end_line` where the text ends before, with no line that could be in it."""
    failed: list[Failed] = state.env.setdefault("failed", [])
    if any(
        one.closer == closer
        and one.first <= start_line <= one.last
        and (one.indent, one.end) == (state.blkIndent, end_line)
        for one in failed[-4:]
    ):
        return None
    line = start_line + 1
    while line < end_line:
        text = state.src[state.bMarks[line] : state.eMarks[line]].rstrip(BLANKS)
        if state.isEmpty(line) or state.sCount[line] < state.blkIndent:
            break
        if closer in text:
            if text.endswith(closer):
                return line
            break
        line += 1
    if line >= end_line and state.level == 0:
        return end_line
    failed.append(Failed(closer, start_line, line - 1, state.blkIndent, end_line))
    return None


def _math_inline(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    opener = source[start : start + 2]
    if opener not in CLOSERS:
        if not opener.startswith("$"):
            return False
        opener = "$"
    begin = start + len(opener)
    if opener == "$" and source[begin : begin + 1].isspace():
        return False
    ends = _ends(state)[opener]
    at = bisect_left(ends, begin + 1)
    if at == len(ends):
        return False
    if opener == "$" and ("\n" in source[begin : ends[at]] or PRICE.match(source, ends[at] - 1)):
        return False
    if not silent:
        token = state.push("math_inline", "span", 0)
        token.markup = opener
        token.content = source[begin : ends[at]].strip()
    state.pos = ends[at] + len(opener)
    return True


def _ends(state: StateInline) -> dict[str, list[int]]:
    """Where a formula of each kind could end in this text."""
    of_texts: dict[str, dict[str, list[int]]] = state.env.setdefault("ends", {})
    if state.src not in of_texts:
        of_texts[state.src] = {
            opener: [found.start() for found in closer.finditer(state.src)] for opener, closer in CLOSERS.items()
        }
    return of_texts[state.src]


def _address(state: StateInline, silent: bool) -> bool:
    """Without what ends a sentence, and without a parenthesis that it does not open."""
    colon = state.pos
    if state.linkLevel or not state.src.startswith("://", colon):
        return False
    scheme = SCHEME.search(state.src, max(colon - 6, 0), colon)
    found = ADDRESS.match(state.src, colon)
    if scheme is None or found is None or not (silent or state.pending.endswith(scheme[0])):
        return False
    rest = found[0].rstrip("?!.,:;*_~'\"")
    while rest.endswith(")") and rest.count("(") < rest.count(")"):
        rest = rest[:-1].rstrip("?!.,:;*_~'\"")
    href = state.md.normalizeLink(scheme[0] + rest)
    if len(rest) <= len("://") or not state.md.validateLink(href):
        return False
    if not silent:
        state.pending = state.pending.removesuffix(scheme[0])
        state.push("link_open", "a", 1).attrs = {"href": href}
        state.push("text", "", 0).content = scheme[0] + rest
        state.push("link_close", "a", -1)
    state.pos = colon + len(rest)
    return True
