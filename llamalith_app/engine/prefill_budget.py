"""How many prompt tokens a step may read, learnt from how long the steps before took. Pure: the time is told to it."""

from __future__ import annotations

from typing import NamedTuple

BESIDE_S = 0.12
"""What a step that reads may take while others decode: half a step late, and one slow step, still stay below the
200 ms that a token may be delayed."""
ALONE_S = 0.25
"""The same while nobody decodes: as long as a cancel may wait."""
WHOLE_S = 0.17
"""The same for a step that ends a prompt: what is left of it would cost more in a step of its own."""
MIN_CHUNK = 8
"""So few tokens cost hardly more than one, as the weights are read once for all of them."""
FIRST_CHUNK = 32
FORGET = 0.3
"""Weight of a new measurement that is better than what was known; a worse one counts at once."""


class Chunk(NamedTuple):
    """Prompt tokens that a step may read."""

    n_tokens: int
    n_more: int
    """Beyond that, where they end a prompt."""


class PrefillBudget:
    def __init__(self, n_chunk: int) -> None:
        self._n_chunk = n_chunk
        self._decode_s: dict[int, float] = {}
        """Number of decoding sequences -> how long a step without reading took."""
        self.token_s: float | None = None
        """Seconds that reading one more prompt token takes; None: nothing was measured yet."""

    def chunk(self, n_decoding: int) -> Chunk:
        """For the next step, beside so many decoding sequences; never more than was configured."""
        if self.token_s is None:
            return Chunk(min(FIRST_CHUNK, self._n_chunk), 0)
        n_tokens, n_whole = (
            max(1, min(max(MIN_CHUNK, int((within_s - self._beside_s(n_decoding)) / self.token_s)), self._n_chunk))
            for within_s in ((BESIDE_S, WHOLE_S) if n_decoding else (ALONE_S, ALONE_S))
        )
        # How long the others' tokens take in it may be unknown.
        return Chunk(n_tokens, n_whole - n_tokens if self._decode_s else 0)

    def took(self, n_read: int, n_decoding: int, seconds: float) -> None:
        """A step read so many prompt tokens and decoded one token of so many sequences."""
        if not n_read:
            self._decode_s[n_decoding] = _learnt(self._decode_s.get(n_decoding), seconds)
        # Fewer never take longer: what says so was a stall, and such a step may not come again to take it back.
        self._decode_s = {n: min(known, seconds) if n < n_decoding else known for n, known in self._decode_s.items()}
        if n_read:
            token_s = max(seconds - self._beside_s(n_decoding), seconds / 4) / max(n_read, MIN_CHUNK)
            self.token_s = _learnt(self.token_s, token_s)

    def _beside_s(self, n_decoding: int) -> float:
        """Of a step that reads, what is not spent on prompt tokens."""
        return self._decoding_s(n_decoding) + self._fixed_s()

    def _decoding_s(self, n_decoding: int) -> float:
        """Of a step with so many decoding sequences, or with the nearest number that was seen."""
        if not n_decoding or not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda n: abs(n - n_decoding))]

    def _fixed_s(self) -> float:
        """What the first token costs more than the others, for which the weights are read already: llama.cpp reads
        them once for the decoding sequences and once for the prompt. 0: that cannot be told."""
        if not self._decode_s:
            return 0.0
        few, many = min(self._decode_s), max(self._decode_s)
        if many < 2 * few:
            return 0.0
        slope_s = max(0.0, (self._decode_s[many] - self._decode_s[few]) / (many - few))
        return max(0.0, self._decode_s[few] - slope_s * few)


def _learnt(known: float | None, measured: float) -> float:
    if known is None or measured > known:
        return measured
    return known + FORGET * (measured - known)
