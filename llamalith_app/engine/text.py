"""Turns the bytes of tokens into text that can be shown: whole characters, and no part of a stop string.

Owns what is held back of a reply. The scheduler feeds it. Knows bytes and strings, no tokens. Invalid bytes become
U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class ReplyText:
    """The text of one reply, piece by piece, in time linear in the length of the reply."""

    def __init__(self, stop: Iterable[str]) -> None:
        self._stop = [string for string in stop if string]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._n_shown = 0
        self._markers: list[int] = []
        self.stopped = False
        """A stop string was reached. The stop string and everything behind it is dropped."""

    def feed(self, piece: bytes, *, is_marker: bool = False) -> str:
        """Takes the bytes of one token. Returns the text that can be shown by now. `is_marker`: where the token's text
        begins is told by `take_markers`."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(piece)
        if is_marker:
            self._markers.append(self._n_shown + len(text) - len(piece.decode()))
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._shown(text[: min(found)])
        kept = self._could_begin_a_stop(text)
        self._held = text[len(text) - kept :]
        return self._shown(text[: len(text) - kept])

    @property
    def is_whole(self) -> bool:
        """Whether no part of a character waits for its rest."""
        return not self._decoder.getstate()[0]

    def take_markers(self) -> list[int]:
        """Where in the whole reply, in characters, the markers since the last call begin. Their text may still be held
        back."""
        markers, self._markers = self._markers, []
        return markers

    def end(self) -> str:
        """Returns the text that was held back; call it once no more bytes come. An incomplete character at the end is
        dropped."""
        text, self._held = self._held, ""
        return self._shown(text)

    def _shown(self, text: str) -> str:
        self._n_shown += len(text)
        return text

    def _could_begin_a_stop(self, text: str) -> int:
        """The length of the text's end that may be the beginning of a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
