"""GBNF, llama.cpp's notation of grammars, written anew as Lark for llguidance. Pure.

Each character stays a terminal of its own: llguidance's lexer takes the longest match, and longer terminals would
so change what a grammar means.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

MAX_REPEATS = 2000
"""As llama.cpp has it."""
MAX_DEPTH = 100
"""Of brackets in one another."""
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
    """Says what is wrong, and in which line."""


class _Item(NamedTuple):
    text: str
    """Lark."""
    rule: str = ""
    """The name of the rule that it is, where it is nothing else."""


_Alternatives = list[list[_Item]]


def to_lark(text: str) -> str:
    """The same grammar for llguidance. Raises GbnfError."""
    return _Parser(text).lark()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._numbers: dict[str, str] = {}
        """From a rule's name to its name in Lark, in the order of first mention."""
        self._rules: dict[str, str] = {}
        """From that to its body."""
        self._n_groups = 0

    def lark(self) -> str:
        self._skip(BLANKS_AND_LINES)
        while self._at < len(self._text):
            self._rule()
        if "root" not in self._numbers or self._numbers["root"] not in self._rules:
            raise GbnfError("there is no rule named root")
        for name, number in self._numbers.items():
            if number not in self._rules:
                raise GbnfError(f"there is no rule named {name}")
        lines = [f"{name}: {body}" for name, body in self._rules.items()]
        return "\n".join(["%llguidance {}", f"start: {self._numbers['root']}", *lines, ""])

    def _rule(self) -> None:
        header = HEADER.match(self._text, self._at)
        if header is None:
            self._fail("expected NAME ::=")
        name = self._number(header[1])
        self._at = header.end()
        self._skip(BLANKS_AND_LINES)
        # In the place of one before of the same name, as llama.cpp has it.
        self._rules[name] = _body(name, self._alternatives(BLANKS))
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail(f"did not expect {self._text[self._at]!r}")
        self._skip(BLANKS_AND_LINES)

    def _alternatives(self, blanks: re.Pattern[str]) -> _Alternatives:
        found = [self._sequence(blanks)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(BLANKS_AND_LINES)
            found.append(self._sequence(blanks))
        return found

    def _sequence(self, blanks: re.Pattern[str]) -> list[_Item]:
        items: list[_Item] = []
        while (one := self._one()) is not None:
            start = len(items)
            items += one
            # A repetition belongs to all of a bracket and to all of a text.
            self._skip(blanks)
            while repeats := self._repeats():
                repeated = _written([items[start:]])
                # llguidance has no end of 0.
                items[start:] = [_Item('""' if repeats in ("{0}", "{0,0}") else f"({repeated}){repeats}")]
                self._skip(blanks)
        return items

    def _one(self) -> list[_Item] | None:
        """What stands here between blanks; None: the sequence ends."""
        character = self._text[self._at : self._at + 1]
        if character == '"':
            return [_Item(_character_class([(code, code)])) for code in self._literal()]
        if character == "[":
            return [_Item(self._class())]
        if character == "(":
            return [self._group()]
        if character == ".":
            self._at += 1
            return [_Item(ANYTHING)]
        if name := NAME.match(self._text, self._at):
            self._at = name.end()
            number = self._number(name[0])
            return [_Item(number, rule=number)]
        return None

    def _literal(self) -> list[int]:
        self._at += 1
        codes = []
        while not self._text.startswith('"', self._at):
            codes.append(self._code())
        self._at += 1
        return codes

    def _class(self) -> str:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        ranges = []
        while not self._text.startswith("]", self._at):
            first = last = self._code()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                last = self._code()
                if last < first:
                    self._fail("a range of characters that ends before it begins")
            ranges.append((first, last))
        self._at += 1
        return _character_class(ranges, negated=negated)

    def _group(self) -> _Item:
        """As a rule of its own: Lark bounds how deep brackets stand in one another."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} brackets in one another")
        self._at += 1
        self._skip(BLANKS_AND_LINES)
        alternatives = self._alternatives(BLANKS_AND_LINES)
        if not self._text.startswith(")", self._at):
            self._fail("expected )")
        self._at += 1
        self._depth -= 1
        self._n_groups += 1
        name = f"g{self._n_groups}"
        self._rules[name] = _body(name, alternatives)
        return _Item(name)

    def _repeats(self) -> str:
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

    def _code(self) -> int:
        """Reads one character, escaped or not."""
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

    def _number(self, name: str) -> str:
        return self._numbers.setdefault(name, f"r{len(self._numbers)}")

    def _skip(self, blanks: re.Pattern[str]) -> None:
        found = blanks.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _fail(self, what: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise GbnfError(f"line {line}: {what}")


def _body(name: str, alternatives: _Alternatives) -> str:
    """`a: x a | y` as `(x)* (y)`: by repetition a long list costs the parser nothing, by recursion each place."""
    again = [items[:-1] for items in alternatives if len(items) > 1 and items[-1].rule == name]
    last = [items for items in alternatives if not (items and items[-1].rule == name)]
    if again and last and len(again) + len(last) == len(alternatives):
        return f"({_written(again)})* ({_written(last)})"
    return _written(alternatives)


def _written(alternatives: _Alternatives) -> str:
    return " | ".join(" ".join(item.text for item in items) or '""' for items in alternatives)


def _character_class(ranges: list[tuple[int, int]], *, negated: bool = False) -> str:
    if not ranges:
        return ANYTHING if negated else NOTHING
    inner = "".join(rf"\u{{{first:x}}}" + (rf"-\u{{{last:x}}}" if last != first else "") for first, last in ranges)
    return f"/[{'^' if negated else ''}{inner}]/"
