"""From a sequence's tokens to its text: whole characters, and never a part of a stop string.

One `Detokenizer` belongs to one sequence. Linear in the text's length. Knows bytes and strings, no tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class Detokenizer:
    def __init__(self, stop: Iterable[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_Matcher(one) for one in dict.fromkeys(stop) if one]
        self._held = ""
        """Decoded and not given out: may still become a stop string."""
        self.stopped = False
        """A stop string was found; all that comes after it is dropped."""

    def push(self, piece: bytes) -> str:
        """The text that is certain now."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest, when no more will come; the bytes of a character that stayed incomplete become U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        start = len(self._held)
        self._held += text
        n_partial = 0
        for at, character in enumerate(text, start + 1):
            n_partial = 0
            for stop in self._stops:
                n_partial = max(n_partial, stop.push(character))
                if stop.found:
                    self.stopped = True
            if self.stopped:
                n_found = max(len(stop.text) for stop in self._stops if stop.found)
                before, self._held = self._held[: at - n_found], ""
                return before
        if not text:
            return ""
        n_certain = len(self._held) - n_partial
        certain, self._held = self._held[:n_certain], self._held[n_certain:]
        return certain


class _Matcher:
    """Knuth-Morris-Pratt: how many characters at the end of the text so far begin the stop string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._n = 0
        self._fallback = [0] * len(text)
        n = 0
        for at in range(1, len(text)):
            while n and text[at] != text[n]:
                n = self._fallback[n - 1]
            n += text[at] == text[n]
            self._fallback[at] = n

    @property
    def found(self) -> bool:
        return self._n == len(self.text)

    def push(self, character: str) -> int:
        while self._n and self.text[self._n] != character:
            self._n = self._fallback[self._n - 1]
        self._n += self.text[self._n] == character
        return self._n
