"""From what a model writes to what people read, piece by piece: thinking apart from the reply, blanks around each
stripped.

Owns what is thinking: each `<think>…</think>`, one that never closes to its end, and a head that only closes one,
since a template may open it itself. However a text is cut into pieces, the same comes out. Knows no tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"
TAGS = {"head": (OPEN, CLOSE), "text": (OPEN,), "thinking": (CLOSE,)}
"""What ends each state."""


class Piece(NamedTuple):
    kind: Literal["delta", "thinking", "restart"]
    """`restart`: what came before it was thinking after all, and comes again as such."""
    text: str = ""


class _Stripped:
    """Text without NULs and without blanks around it; blanks wait for what follows them."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._blanks: list[str] = []

    def feed(self, text: str) -> str:
        text = text.replace("\0", "")
        if not self._parts:
            text = text.lstrip()
        written = text.rstrip()
        blanks = text[len(written) :]
        if not written:
            self._blanks.append(blanks)
            return ""
        told = "".join((*self._blanks, written))
        self._blanks = [blanks]
        self._parts.append(told)
        return told

    def __str__(self) -> str:
        return "".join(self._parts)


class Reply:
    """One reply as it is written, in time linear in its length. `str()` of it is what is stored."""

    def __init__(self) -> None:
        self._text = _Stripped()
        self._thinking = _Stripped()
        self._in: Literal["head", "text", "thinking"] = "head"
        """The head: neither tag was seen yet."""
        self._held = ""
        """What may become a tag."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain by now."""
        pieces: list[Piece] = []
        text, at = self._held + text, 0
        while (found := self._next_tag(text, at)) is not None:
            start, tag = found
            self._add(pieces, text[at:start])
            at = start + len(tag)
            if tag == CLOSE and self._in == "head":
                self._turn_to_thinking(pieces)
            self._in = "thinking" if tag == OPEN else "text"
        end = len(text) - self._could_begin_a_tag(text[at:])
        self._add(pieces, text[at:end])
        self._held = text[end:]
        return pieces

    def end(self) -> list[Piece]:
        """What was held back, once no more comes."""
        pieces: list[Piece] = []
        self._add(pieces, self._held)
        self._held = ""
        return pieces

    def __str__(self) -> str:
        return str(self._text)

    def _next_tag(self, text: str, at: int) -> tuple[int, str] | None:
        found = [(start, tag) for tag in TAGS[self._in] if (start := text.find(tag, at)) >= 0]
        return min(found, default=None)

    def _could_begin_a_tag(self, text: str) -> int:
        """How many of the last characters."""
        # A tag has its only `<` in front.
        rest = text[text.rfind("<") :] if "<" in text[-len(CLOSE) :] else ""
        return len(rest) if any(tag.startswith(rest) for tag in TAGS[self._in]) else 0

    def _add(self, pieces: list[Piece], text: str) -> None:
        kind: Literal["delta", "thinking"] = "thinking" if self._in == "thinking" else "delta"
        told = (self._thinking if kind == "thinking" else self._text).feed(text)
        if told:
            pieces.append(Piece(kind, told))

    def _turn_to_thinking(self, pieces: list[Piece]) -> None:
        head, self._text = str(self._text), _Stripped()
        if head:
            self._thinking.feed(head)
            pieces[:] = [Piece("restart"), Piece("thinking", head)]
