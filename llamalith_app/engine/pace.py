"""How many prompt tokens a step may read, learnt from how long the steps before took. Pure: the time is told to it."""

from __future__ import annotations

BESIDE_S = 0.12
"""What a step that reads may take while others decode: half a step late, and one slow step, still stay below the
200 ms that a token may be delayed."""
ALONE_S = 0.25
"""The same while nobody decodes: as long as a cancel may wait."""
MIN_CHUNK = 8
"""So few tokens cost hardly more than one, as the weights are read once for all of them."""
FIRST_CHUNK = 32
FORGET = 0.3
"""Weight of a new measurement that is better than what was known; a worse one counts at once."""


class Pace:
    def __init__(self, n_chunk: int) -> None:
        self._n_chunk = n_chunk
        self._decode_s: dict[int, float] = {}
        """Number of decoding sequences -> how long a step without reading took."""
        self.token_s: float | None = None
        """Seconds that reading one more prompt token takes; None: nothing was measured yet."""

    def chunk(self, n_decoding: int) -> int:
        """Prompt tokens that the next step may read beside so many decoding sequences."""
        if self.token_s is None:
            return min(FIRST_CHUNK, self._n_chunk)
        left_s = BESIDE_S - self._decoding(n_decoding) if n_decoding else ALONE_S
        return max(1, min(max(MIN_CHUNK, int(left_s / self.token_s)), self._n_chunk))

    def took(self, n_read: int, n_decoding: int, seconds: float) -> None:
        """A step read so many prompt tokens and decoded one token of so many sequences."""
        if not n_read:
            self._decode_s[n_decoding] = _learnt(self._decode_s.get(n_decoding), seconds)
        else:
            # A short chunk's time is mostly the step's own: it says little of one more token.
            token_s = max(seconds - self._decoding(n_decoding), seconds / 4) / max(n_read, MIN_CHUNK)
            self.token_s = _learnt(self.token_s, token_s)

    def _decoding(self, n_decoding: int) -> float:
        """Of a step with so many decoding sequences, or with the nearest number that was seen."""
        if not n_decoding or not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda n: abs(n - n_decoding))]


def _learnt(known: float | None, measured: float) -> float:
    if known is None or measured > known:
        return measured
    return known + FORGET * (measured - known)
