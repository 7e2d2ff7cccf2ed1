"""Splits what a model writes into what people read, piece by piece: thinking apart from the reply, nothing lost.

Owns what is thinking: of a model that can think, the text between a `<think>` at the beginning and the next
`</think>`, or the end. Blanks around these two tags belong to them. Everything else is the reply, letter for letter.
The same comes out however a text is cut into pieces. Knows no tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from llamalith_app.engine.chat import CLOSE, OPEN

State = Literal["head", "opened", "thinking", "closed", "text"]
"""head: only blanks so far; opened: only blanks since `<think>`; thinking: inside; closed: only blanks since
`</think>`; text: in the reply."""


class Piece(NamedTuple):
    kind: Literal["delta", "thinking"]
    text: str


class Reply:
    """One reply as it is written, in time linear in its length. `str()` of it is what is stored.

    `thinks`: it may begin with thinking; `is_opened`: the prompt ends inside of it.
    """

    def __init__(self, *, thinks: bool = False, is_opened: bool = False) -> None:
        self._texts: dict[Literal["delta", "thinking"], list[str]] = {"delta": [], "thinking": []}
        self._state: State = "head" if thinks else "text"
        self._is_opened = is_opened
        self._blanks: list[str] = []
        """They may belong to a tag; they stand in front of `_held`."""
        self._held = ""
        """Text that may become a tag."""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain by now."""
        pieces: list[Piece] = []
        rest = self._held + text
        self._held = ""
        while rest:
            rest = self._step(rest, pieces)
        return pieces

    def end(self) -> list[Piece]:
        """The pieces that were held back; to be called once no more text comes."""
        pieces: list[Piece] = []
        if self._state == "head" and self._is_opened:
            self._blanks.clear()
        is_thinking = self._state == "thinking" or (self._state == "head" and self._is_opened)
        self._emit(pieces, "thinking" if is_thinking else "delta", self._held)
        self._held = ""
        return pieces

    def __str__(self) -> str:
        return "".join(self._texts["delta"])

    @property
    def thinking(self) -> str:
        """Empty: none so far."""
        return "".join(self._texts["thinking"])

    def _step(self, text: str, pieces: list[Piece]) -> str:
        """Goes to the next state by the beginning of the text, or holds it; returns the rest."""
        if self._state == "text":
            self._emit(pieces, "delta", text)
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
            self._emit(pieces, "thinking", written)
        if close:
            self._state = "closed"
            self._blanks.clear()
        else:
            self._blanks.append(inside[len(written) :])
        return rest

    def _emit(self, pieces: list[Piece], kind: Literal["delta", "thinking"], text: str) -> None:
        """Adds a piece, with the blanks before it."""
        text = "".join((*self._blanks, text))
        self._blanks.clear()
        if text:
            self._texts[kind].append(text)
            pieces.append(Piece(kind, text))
