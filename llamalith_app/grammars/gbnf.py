"""Translates GBNF, llama.cpp's notation of grammars, to Lark for llguidance.

Owns the parser of GBNF and its limits. `grammar.py` calls `to_lark`. Pure; knows neither files nor tokens.

Each character becomes a terminal of its own. llguidance's lexer takes the longest match, so longer terminals would
change what a grammar means.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

MAX_REPEATS = 2000
"""llama.cpp's own limit."""
MAX_DEPTH = 100
"""Limit for nested brackets."""
LAST_CHARACTER = 0x10FFFF
NOTHING = rf"/[^\u{{0}}-\u{{{LAST_CHARACTER:x}}}]/"
ANYTHING = "/(?s:.)/"
ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
NAME = re.compile(r"[A-Za-z0-9_-]+")
HEADER = re.compile(rf"({NAME.pattern})[ \t]*::=")
REPEATS = re.compile(r"\{[ \t]*(\d{1,9})[ \t]*(,?)[ \t]*(\d{1,9})?[ \t]*\}")
BLANKS = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
BLANKS_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")


class GbnfError(ValueError):
    """The text is no valid GBNF. The message says what is wrong, and in which line."""


class _Item(NamedTuple):
    """A piece of a Lark rule."""

    text: str
    rule: str = ""
    """The name of the rule, if the item is a reference to a rule and nothing else."""


_Alternatives = list[list[_Item]]


def to_lark(text: str) -> str:
    """Returns the same grammar in Lark. Raises GbnfError."""
    return _Parser(text).to_lark()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._lark_names: dict[str, str] = {}
        """Name of a rule -> its name in Lark, in the order of first mention."""
        self._rules: dict[str, str] = {}
        """Name in Lark -> body of the rule."""
        self._n_groups = 0

    def to_lark(self) -> str:
        self._skip(BLANKS_AND_LINES)
        while self._at < len(self._text):
            self._parse_rule()
        if "root" not in self._lark_names or self._lark_names["root"] not in self._rules:
            raise GbnfError("there is no rule named root")
        for name, lark_name in self._lark_names.items():
            if lark_name not in self._rules:
                raise GbnfError(f"there is no rule named {name}")
        lines = [f"{name}: {body}" for name, body in self._rules.items()]
        return "\n".join(["%llguidance {}", f"start: {self._lark_names['root']}", *lines, ""])

    def _parse_rule(self) -> None:
        header = HEADER.match(self._text, self._at)
        if header is None:
            self._fail("expected NAME ::=")
        name = self._lark_name(header[1])
        self._at = header.end()
        self._skip(BLANKS_AND_LINES)
        # Replaces an earlier rule of the same name, as llama.cpp does.
        self._rules[name] = _rule_body(name, self._parse_alternatives(BLANKS))
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail(f"did not expect {self._text[self._at]!r}")
        self._skip(BLANKS_AND_LINES)

    def _parse_alternatives(self, blanks: re.Pattern[str]) -> _Alternatives:
        found = [self._parse_sequence(blanks)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(BLANKS_AND_LINES)
            found.append(self._parse_sequence(blanks))
        return found

    def _parse_sequence(self, blanks: re.Pattern[str]) -> list[_Item]:
        items: list[_Item] = []
        while (element := self._parse_element()) is not None:
            start = len(items)
            items += element
            # A repetition applies to the whole group or the whole literal before it.
            self._skip(blanks)
            while repeats := self._parse_repeats():
                repeated = _to_text([items[start:]])
                # llguidance does not accept 0 as an upper limit.
                items[start:] = [_Item('""' if repeats in ("{0}", "{0,0}") else f"({repeated}){repeats}")]
                self._skip(blanks)
        return items

    def _parse_element(self) -> list[_Item] | None:
        """The next element; None: the sequence ends."""
        character = self._text[self._at : self._at + 1]
        if character == '"':
            return [_Item(_character_class([(code, code)])) for code in self._parse_literal()]
        if character == "[":
            return [_Item(self._parse_class())]
        if character == "(":
            return [self._parse_group()]
        if character == ".":
            self._at += 1
            return [_Item(ANYTHING)]
        if name := NAME.match(self._text, self._at):
            self._at = name.end()
            lark_name = self._lark_name(name[0])
            return [_Item(lark_name, rule=lark_name)]
        return None

    def _parse_literal(self) -> list[int]:
        self._at += 1
        codes = []
        while not self._text.startswith('"', self._at):
            codes.append(self._parse_character())
        self._at += 1
        return codes

    def _parse_class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        ranges = []
        while not self._text.startswith("]", self._at):
            first = last = self._parse_character()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                last = self._parse_character()
                if last < first:
                    self._fail("a range of characters that ends before it begins")
            ranges.append((first, last))
        self._at += 1
        return _character_class(ranges, negated=negated)

    def _parse_group(self) -> _Item:
        """A rule of its own for each group, because Lark limits the nesting of brackets."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} brackets in one another")
        self._at += 1
        self._skip(BLANKS_AND_LINES)
        alternatives = self._parse_alternatives(BLANKS_AND_LINES)
        if not self._text.startswith(")", self._at):
            self._fail("expected )")
        self._at += 1
        self._depth -= 1
        self._n_groups += 1
        name = f"g{self._n_groups}"
        self._rules[name] = _rule_body(name, alternatives)
        return _Item(name)

    def _parse_repeats(self) -> str:
        if self._text[self._at : self._at + 1] in ("*", "+", "?"):
            self._at += 1
            return self._text[self._at - 1]
        if not self._text.startswith("{", self._at):
            return ""
        found = REPEATS.match(self._text, self._at)
        if found is None:
            self._fail("expected {N}, {N,} or {N,M}")
        least, comma, most = found.groups()
        if int(least) > MAX_REPEATS or int(most or 0) > MAX_REPEATS:
            self._fail(f"more than {MAX_REPEATS} repetitions")
        if most and not comma:
            self._fail("expected {N}, {N,} or {N,M}")
        if most and int(most) < int(least):
            self._fail("repetitions that end before they begin")
        self._at = found.end()
        return f"{{{int(least)}{comma}{int(most) if most else ''}}}"

    def _parse_character(self) -> int:
        """The code of the next character, escaped or not."""
        character = self._text[self._at : self._at + 1]
        if not character:
            self._fail("the text ends within quotes or brackets")
        self._at += 1
        if character != "\\":
            return ord(character)
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in ESCAPES:
            return ord(ESCAPES[kind])
        n_digits = HEX_DIGITS.get(kind, 0)
        digits = self._text[self._at : self._at + n_digits]
        if not n_digits or re.fullmatch(rf"[0-9a-fA-F]{{{n_digits}}}", digits) is None:
            self._fail(f"there is no escape \\{kind}{digits}")
        self._at += n_digits
        if (code := int(digits, 16)) > LAST_CHARACTER or 0xD800 <= code <= 0xDFFF:
            self._fail(f"\\{kind}{digits} is no character")
        return code

    def _lark_name(self, name: str) -> str:
        return self._lark_names.setdefault(name, f"r{len(self._lark_names)}")

    def _skip(self, blanks: re.Pattern[str]) -> None:
        found = blanks.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _fail(self, what: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise GbnfError(f"line {line}: {what}")


def _rule_body(name: str, alternatives: _Alternatives) -> str:
    """Writes `a: x a | y` as `(x)* (y)`. A repetition costs the parser nothing for a long list; a recursion costs
    something for each element."""
    again = [items[:-1] for items in alternatives if len(items) > 1 and items[-1].rule == name]
    last = [items for items in alternatives if not (items and items[-1].rule == name)]
    if again and last and len(again) + len(last) == len(alternatives):
        return f"({_to_text(again)})* ({_to_text(last)})"
    return _to_text(alternatives)


def _to_text(alternatives: _Alternatives) -> str:
    return " | ".join(" ".join(item.text for item in items) or '""' for items in alternatives)


def _character_class(ranges: list[tuple[int, int]], *, negated: bool = False) -> str:
    if not ranges:
        return ANYTHING if negated else NOTHING
    inner = "".join(rf"\u{{{first:x}}}" + (rf"-\u{{{last:x}}}" if last != first else "") for first, last in ranges)
    return f"/[{'^' if negated else ''}{inner}]/"
