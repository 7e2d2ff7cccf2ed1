"""From what a model writes to what people read, piece by piece: thinking apart from the reply, and nothing lost.

Owns what is thinking: of a model that can think, what stands between a `<think>` at the beginning and the next
`</think>`, or the end. Blanks around these two tags belong to them. All else is the reply, letter for letter. However
a text is cut into pieces, the same comes out. Knows no tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from llamalith_app.engine.chat import CLOSE, OPEN

State = Literal["head", "opened", "thinking", "closed", "text"]
"""Nothing but blanks came; nothing but blanks behind the first tag; inside; nothing but blanks behind the second tag;
in the reply."""


class Piece(NamedTuple):
    kind: Literal["delta", "thinking"]
    text: str


class Reply:
    """One reply as it is written, in time linear in its length. `str()` of it is what is stored.

    `thinks`: it may begin with thinking; `is_opened`: the prompt ends inside of it.
    """

    def __init__(self, *, thinks: bool = False, is_opened: bool = False) -> None:
        self._text: list[str] = []
        self._state: State = "head" if thinks else "text"
        self._is_opened = is_opened
        self._blanks: list[str] = []
        """What may belong to a tag, in front of what is held."""
        self._held = ""
        """What may become a tag."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain by now."""
        pieces: list[Piece] = []
        rest = self._held + text
        self._held = ""
        while rest:
            rest = self._step(rest, pieces)
        return pieces

    def end(self) -> list[Piece]:
        """What was held back, once no more comes."""
        pieces: list[Piece] = []
        if self._state == "head" and self._is_opened:
            self._blanks.clear()
        is_thinking = self._state == "thinking" or (self._state == "head" and self._is_opened)
        self._tell(pieces, "thinking" if is_thinking else "delta", self._held)
        self._held = ""
        return pieces

    def __str__(self) -> str:
        return "".join(self._text)

    def _step(self, text: str, pieces: list[Piece]) -> str:
        """Takes what it can to the next state, or holds it; returns what is left."""
        if self._state == "text":
            self._tell(pieces, "delta", text)
            return ""
        if self._state == "thinking":
            return self._think(text, pieces)
        rest = text.lstrip()
        if self._state == "head":
            self._blanks.append(text[: len(text) - len(rest)])
            return self._begin(rest)
        if rest:
            self._state = "thinking" if self._state == "opened" else "text"
        return rest

    def _begin(self, text: str) -> str:
        if text.startswith(OPEN):
            self._state = "opened"
            self._blanks.clear()
            return text[len(OPEN) :]
        if OPEN.startswith(text):
            self._held = text
            return ""
        if self._is_opened:
            self._state = "opened"
            self._blanks.clear()
            return text
        self._state = "text"
        return text

    def _think(self, text: str, pieces: list[Piece]) -> str:
        inside, close, rest = text.partition(CLOSE)
        if not close:
            # A tag has its only `<` in front.
            at = inside.rfind("<", -len(CLOSE))
            if at >= 0 and CLOSE.startswith(inside[at:]):
                inside, self._held = inside[:at], inside[at:]
        written = inside.rstrip()
        if written:
            self._tell(pieces, "thinking", written)
        if close:
            self._state = "closed"
            self._blanks.clear()
        else:
            self._blanks.append(inside[len(written) :])
        return rest

    def _tell(self, pieces: list[Piece], kind: Literal["delta", "thinking"], text: str) -> None:
        """With the blanks before it."""
        text = "".join((*self._blanks, text))
        self._blanks.clear()
        if kind == "delta":
            self._text.append(text)
        if text:
            pieces.append(Piece(kind, text))
