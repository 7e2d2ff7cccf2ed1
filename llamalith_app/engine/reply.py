"""Splits what a model writes into what people read, piece by piece: thinking apart from the reply, nothing lost.

Owns what is thinking: of a model of a known family, the text between the family's markers at the beginning, or to the
end. Where a marker is a token of the vocabulary, only that token is the marker, and its text is text. Blanks around a
marker belong to it. Everything else is the reply, letter for letter. The same comes out however a text is cut into
pieces. Knows no tokens, only where the text of one begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from llamalith_app.engine.reasoning import Family

Kind = Literal["delta", "thinking"]
State = Literal["head", "header", "opened", "thinking", "closed", "text", "tail"]
"""head: only blanks so far; header: in the header of a message; opened: only blanks since the thinking began; thinking:
inside; closed: only blanks since it ended, or since another header; text: in the reply; tail: only blanks since the
marker at the reply's end."""

MAX_HEADER = 400
"""Longest header of a message, in characters. What is longer is text. Some ten are usual."""
BETWEEN = "\n\n"
"""Stands between two messages of one kind, where a model writes several."""
NONE = Family("", "")


class Piece(NamedTuple):
    kind: Kind
    text: str


class Reply:
    """One reply as it is written, in time linear in its length. `str()` of it is what is stored.

    `family`: the reply may begin with thinking of this kind; None: it is all reply. `tokens`: the family's markers that
    are tokens of the vocabulary. `is_opened`: the prompt ends inside of the thinking.
    """

    def __init__(self, family: Family | None = None, *, tokens: Collection[str] = (), is_opened: bool = False) -> None:
        self._texts: dict[Kind, list[str]] = {"delta": [], "thinking": []}
        self._state: State = "head" if family else "text"
        self._family = family or NONE
        self._tokens = tokens
        self._is_opened = is_opened
        self._may_close = self._family.reply_closes in tokens
        """The reply may end with a marker."""
        self._next = _next_states(self._family, tokens)
        self._n_fed = 0
        self._start = 0
        """Where the text at hand begins in all that was fed."""
        self._markers: deque[int] = deque()
        """Where texts of tokens that are markers begin in all that was fed, as far as they are still ahead."""
        self._header = ""
        self._blanks: list[str] = []
        """They may belong to a marker; they stand in front of `_held`."""
        self._held = ""
        """Text that may become a marker."""

    def feed(self, text: str, markers: Iterable[int] = ()) -> list[Piece]:
        """The pieces that are certain by now. `markers`: where in the whole reply, in characters, the text of a token
        that is a marker begins; told with that text at the latest."""
        pieces: list[Piece] = []
        self._markers.extend(markers)
        self._start = self._n_fed - len(self._held)
        self._n_fed += len(text)
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            at = self._step(text, at, pieces)
        return pieces

    def end(self) -> list[Piece]:
        """The pieces that were held back; to be called once no more text comes."""
        pieces: list[Piece] = []
        if self._state == "head" and self._is_opened:
            self._blanks.clear()
            self._state = "thinking"
        is_over = self._state == "header" or (self._state == "tail" and not self._held)
        if not is_over:
            self._emit(pieces, "thinking" if self._state == "thinking" else "delta", self._held)
        self._held = ""
        self._blanks.clear()
        return pieces

    def __str__(self) -> str:
        return "".join(self._texts["delta"])

    @property
    def phase(self) -> Literal["thinking", "header", "between", "reply"]:
        """What comes next. `between`: a marker, or the reply."""
        if self._state in ("opened", "thinking") or (self._state == "head" and self._is_opened):
            return "thinking"
        if self._state == "header":
            return "header"
        return "between" if self._state in ("head", "closed") else "reply"

    @property
    def markers(self) -> set[str]:
        """All that `next_markers` may ever contain."""
        return {marker for steps in self._next.values() for marker, _ in steps}

    @property
    def next_markers(self) -> list[str]:
        """The markers that may come next, where only blanks were before."""
        return [marker for marker, _ in self._next.get(self._state, ())]

    @property
    def n_header(self) -> int:
        """Characters of the header that is being written."""
        return len(self._header)

    @property
    def held(self) -> str:
        """What was fed last and may become a marker."""
        return self._held

    @property
    def thinking(self) -> str:
        """Empty: none so far."""
        return "".join(self._texts["thinking"])

    def _step(self, text: str, at: int, pieces: list[Piece]) -> int:
        """Goes on from there to the next state, or holds what is left; returns where the rest begins."""
        if self._state == "thinking":
            return self._write("thinking", self._family.closes, "closed", text, at, pieces)
        if self._state == "text":
            return self._write("delta", self._family.reply_closes, "tail", text, at, pieces)
        if self._state == "header":
            return self._read_header(text, at, pieces)
        rest = _behind_blanks(text, at)
        if self._state in ("head", "tail"):
            self._blanks.append(text[at:rest])
        return self._begin(text, rest) if rest < len(text) else rest

    def _begin(self, text: str, at: int) -> int:
        """What stands behind blanks is a marker, or the beginning of a text."""
        is_unknown = False
        for marker, state in self._next.get(self._state, ()):
            begins = self._begins(marker, text, at)
            if begins:
                self._blanks.clear()
                self._state = state
                self._may_close = True
                return at + len(marker)
            is_unknown |= begins is None
        if is_unknown:
            self._held = text[at:]
            return len(text)
        if self._state == "head" and self._is_opened:
            self._blanks.clear()
            self._state = "opened"
        elif self._state == "opened":
            self._state = "thinking"
            self._blanks = [BETWEEN] if self._texts["thinking"] else []
        else:
            if self._state == "closed":
                self._blanks = [BETWEEN] if self._texts["delta"] else []
            self._state = "text"
        return at

    def _write(self, kind: Kind, marker: str, then: State, text: str, at: int, pieces: list[Piece]) -> int:
        """Text up to this marker."""
        if kind == "delta" and not (marker and self._may_close):
            self._emit(pieces, kind, text[at:])
            return len(text)
        end, is_whole = self._find(marker, text, at, len(text))
        inside = text[at:end]
        if written := inside.rstrip():
            self._emit(pieces, kind, written)
        self._blanks.append(inside[len(written) :])
        if not is_whole:
            self._held = text[end:]
            return len(text)
        self._state, self._may_close = then, True
        if then == "tail" and marker not in self._tokens:
            # If more text follows, it is none.
            self._blanks.append(marker)
        else:
            self._blanks.clear()
        return end + len(marker)

    def _read_header(self, text: str, at: int, pieces: list[Piece]) -> int:
        family = self._family
        # Far enough for any header. Without a limit, many short ones would take quadratic time.
        limit = min(len(text), at + 2 * MAX_HEADER)
        ends = [(*self._find(marker, text, at, limit), marker) for marker in (family.header_closes, family.closes)]
        end, is_whole, marker = min(ends, key=lambda one: one[0])
        self._header += text[at:end]
        if len(self._header) > MAX_HEADER:
            self._emit(pieces, "delta", self._header)
            self._header, self._state = "", "text"
            return end
        if not is_whole:
            self._held = text[end:]
            return len(text)
        is_thinking = self._header.rpartition(family.opens)[2].lstrip().startswith(family.thinks_in)
        self._header = ""
        self._state = "opened" if is_thinking and marker == family.header_closes else "closed"
        return end + len(marker)

    def _begins(self, marker: str, text: str, at: int) -> bool | None:
        """Whether the marker stands there; None: it may, once more text comes."""
        if marker in self._tokens and self._next_token(at) != at:
            return False
        if len(text) - at < len(marker):
            return None if marker.startswith(text[at:]) else False
        return text.startswith(marker, at)

    def _find(self, marker: str, text: str, at: int, limit: int) -> tuple[int, bool]:
        """Where the marker begins at or behind this place and in front of the limit, and whether it is whole. Without
        one: the limit."""
        if marker not in self._tokens:
            if (found := text.find(marker, at, limit)) >= 0:
                return found, True
            lengths = range(min(len(marker) - 1, limit - at), 0, -1)
            n_begun = next((length for length in lengths if text.endswith(marker[:length], at, limit)), 0)
            return limit - n_begun, False
        self._next_token(at)
        for offset in self._markers:
            found = offset - self._start
            if found >= limit:
                break
            if text.startswith(marker, found):
                return found, True
            if len(text) - found < len(marker) and marker.startswith(text[found:]):
                return found, False
        return limit, False

    def _next_token(self, at: int) -> int | None:
        """Where the first marker that is a token begins, at or behind this place."""
        while self._markers and self._markers[0] < self._start + at:
            self._markers.popleft()
        return self._markers[0] - self._start if self._markers else None

    def _emit(self, pieces: list[Piece], kind: Kind, text: str) -> None:
        """Adds a piece, with the blanks before it."""
        text = "".join((*self._blanks, text))
        self._blanks.clear()
        if text:
            self._texts[kind].append(text)
            pieces.append(Piece(kind, text))


def _next_states(family: Family, tokens: Collection[str]) -> dict[State, list[tuple[str, State]]]:
    """The markers that may stand where only blanks were before, and the state behind each."""
    messages: list[tuple[str, State]] = []
    if family.header_closes:
        messages = [(family.opens, "header"), (family.next_opens, "header")]
    opens: list[tuple[str, State]] = messages or [(family.opens, "opened")]
    reply: list[tuple[str, State]] = [(family.reply_opens, "closed")]
    # A model that is told not to think may close what nobody opened. As a text, that is its reply.
    bare: list[tuple[str, State]] = [(family.closes, "closed")] if family.closes in tokens else []
    states: dict[State, list[tuple[str, State]]] = {
        "head": [*opens, *reply, *bare],
        "closed": [*messages, *reply],
        "tail": messages,
    }
    return {state: [(marker, then) for marker, then in steps if marker] for state, steps in states.items()}


def _behind_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
