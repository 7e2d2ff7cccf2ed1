"""From tokens' bytes to text that can be shown: whole characters, and no part of a stop string. Bytes that can begin no
character are shown as U+FFFD.

Knows bytes and strings, no tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class ReplyText:
    """The text of one reply, piece by piece, in time linear in its length."""

    def __init__(self, stop: Iterable[str]) -> None:
        self._stop = [string for string in stop if string]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """A stop string was reached; what it began with and what came after it is gone."""

    def feed(self, piece: bytes) -> str:
        """The text that is certain by now."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(piece)
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = self._could_begin_a_stop(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def end(self) -> str:
        """What was held back, once no more comes. The beginning of a character whose rest was never written is not
        part of it."""
        text, self._held = self._held, ""
        return text

    def _could_begin_a_stop(self, text: str) -> int:
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(text)), longest, -1):
                if text.endswith(string[:length]):
                    longest = length
                    break
        return longest
