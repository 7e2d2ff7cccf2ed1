"""Follows the thinking of one sequence token by token: a grammar holds the reply behind it, and a budget ends it.

Owns what is drawn outside of the grammar: the thinking, the markers around it, and the closing that is forced once the
budget is spent. The sampler asks before each draw and tells what was drawn. Knows no llama.cpp.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from llamalith_app.engine.constraint import Constraint
from llamalith_app.engine.reasoning import Family
from llamalith_app.engine.reply import Reply
from llamalith_app.engine.runner_protocol import SlotModel
from llamalith_app.engine.text import ReplyText

ENOUGH_HEADER = 100
"""Characters after which the header of a message is closed by force. A token may be long: far from `MAX_HEADER`."""


class Thinking:
    """`tokenize`: the tokens of a text with markers in it. `is_opened`: the prompt ends inside of the thinking.
    `budget`: tokens that the thinking may take before it is closed by force; None: any number."""

    def __init__(
        self,
        family: Family,
        model: SlotModel,
        tokenize: Callable[[str], Sequence[int]],
        *,
        marker_tokens: Collection[str],
        is_opened: bool,
        budget: int | None,
    ) -> None:
        self._model = model
        self._n_left = budget
        self._reply = Reply(family, tokens=marker_tokens, is_opened=is_opened)
        self._text = ReplyText(())
        self._forced: deque[int] = deque()
        self._is_over = False
        """The grammar has drawn: what follows is the reply, whatever it looks like."""
        self._closing = tokenize(family.closing)
        self._beginnings = {marker: tokenize(marker) for marker in self._reply.markers}
        self._closing_header = tokenize(family.header_closes)
        self._closes = family.closes
        is_text = family.closes not in marker_tokens
        self._rests = [tokenize(family.closes[n:]) for n in range(len(family.closes))] if is_text else []
        """The tokens of what may be left of a closing marker that is a text. Prepared, because a draw is no time to
        tokenize."""

    @property
    def forced(self) -> int | None:
        """The token that comes next; None: it is drawn."""
        # Half of a character would be lost.
        if not self._forced and not self._is_over and self._text.is_whole:
            if self._reply.phase == "thinking" and self._n_left is not None and self._n_left <= 0:
                self._forced.extend(self._closing)
            elif self._reply.phase == "header" and self._reply.n_header >= ENOUGH_HEADER:
                self._forced.extend(self._closing_header)
        return self._forced[0] if self._forced else None

    def close(self) -> None:
        """The thinking has taken enough: it is closed at once, or as soon as it begins."""
        self._n_left = 0

    @property
    def has_escaped(self) -> bool:
        """Whether a reply has begun that no grammar holds."""
        return not self._is_over and self._reply.phase == "reply"

    @property
    def is_free(self) -> bool:
        """Whether no grammar holds the next token."""
        return not self._is_over and self._reply.phase in ("thinking", "header")

    @property
    def openings(self) -> dict[int, Sequence[int]]:
        """The tokens that may come next beside those of the grammar, each with the rest of the marker that it
        begins."""
        if self._is_over or self._reply.phase != "between":
            return {}
        tokens = (self._beginnings[marker] for marker in reversed(self._reply.next_markers))
        return {first: rest for first, *rest in tokens}

    def is_outside(self, token: int, constraint: Constraint) -> bool:
        """Whether the token, drawn next, is none of the grammar's."""
        if self._forced or self.is_free:
            return True
        return token in self.openings and not constraint.allows(token)

    def instead_of(self, token: int) -> int:
        """The token that comes in place of one that was drawn freely. A reply that a grammar is to hold neither ends
        within the thinking, nor begins with the token that closes it."""
        if self._model.is_end(token):
            self._forced.extend(self._closing)
        elif self._rests and self._reply.phase == "thinking":
            held = self._reply.held
            text = held + self._model.piece(token).decode(errors="replace")
            at = text.find(self._closes)
            if at >= 0 and text[at + len(self._closes) :].strip():
                self._forced.extend(self._rests[len(held) if at == 0 else 0])
        return self._forced[0] if self._forced else token

    def accept(self, token: int) -> None:
        """Notes a token that is none of the grammar's."""
        if self._forced:
            self._forced.popleft()
        elif token in (openings := self.openings):
            self._forced.extend(openings[token])
        if self._n_left is not None and self._reply.phase == "thinking":
            self._n_left -= 1
        text = self._text.feed(self._model.piece(token), is_marker=self._model.is_marker(token))
        self._reply.feed(text, self._text.take_markers())

    def end(self) -> None:
        """Notes that the grammar drew a token."""
        self._is_over = True
