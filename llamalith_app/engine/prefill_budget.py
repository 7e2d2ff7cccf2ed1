"""How many prompt tokens the next step may prefill.

Owns the model of step times that it learns from the steps before. The engine's loop asks `next` before a step and
calls `observe` after it. Pure: it has no clock and knows neither slots nor prompts.
"""

from __future__ import annotations

from typing import NamedTuple

BESIDE_S = 0.12
"""Seconds for a step that prefills while other sequences decode. A token may come 200 ms late: a step that takes half
as long again, or one step that is slow by itself, stays below that."""
ALONE_S = 0.25
"""Seconds for a step while no sequence decodes. A cancel waits for the end of a step."""
WHOLE_S = 0.17
"""Seconds for a step that ends a prompt while others decode: a step of its own for the rest would cost more."""
MIN_CHUNK = 8
"""This many tokens cost hardly more than one: llama.cpp reads the weights once for all of them."""
FIRST_CHUNK = 32
"""Tokens of the first step, before anything was measured."""
FORGET = 0.3
"""Weight of a measurement that is faster than the estimate. A slower one replaces the estimate at once."""


class Chunk(NamedTuple):
    """The prompt tokens that one step may prefill."""

    n_tokens: int
    n_more: int
    """Tokens beyond `n_tokens` that are allowed if they end a prompt."""


class PrefillBudget:
    """Holds the estimates for one loaded model. `n_chunk` is the configured limit in tokens."""

    def __init__(self, n_chunk: int) -> None:
        self._n_chunk = n_chunk
        self._decode_s: dict[int, float] = {}
        """Number of decoding sequences -> seconds of a step without prefill."""
        self.token_s: float | None = None
        """Seconds that one more prompt token takes; None before the first measurement."""

    def next(self, n_decoding: int) -> Chunk:
        """The prompt tokens for the next step, beside `n_decoding` sequences that decode. At most `n_chunk`."""
        if self.token_s is None:
            return Chunk(min(FIRST_CHUNK, self._n_chunk), 0)
        n_tokens, n_whole = (
            max(1, min(max(MIN_CHUNK, int((within_s - self._beside_s(n_decoding)) / self.token_s)), self._n_chunk))
            for within_s in ((BESIDE_S, WHOLE_S) if n_decoding else (ALONE_S, ALONE_S))
        )
        # Without a measurement of decoding, nobody knows what the other sequences' tokens add to the step.
        return Chunk(n_tokens, n_whole - n_tokens if self._decode_s else 0)

    def observe(self, n_read: int, n_decoding: int, seconds: float) -> None:
        """Learns from one step: it prefilled `n_read` tokens, decoded one token of each of `n_decoding` sequences, and
        took `seconds`."""
        if not n_read:
            self._decode_s[n_decoding] = _updated(self._decode_s.get(n_decoding), seconds)
        # Fewer sequences never take longer. An estimate that says so came from a stall, and no later step with that
        # number of sequences may come to correct it.
        self._decode_s = {n: min(known, seconds) if n < n_decoding else known for n, known in self._decode_s.items()}
        if n_read:
            token_s = max(seconds - self._beside_s(n_decoding), seconds / 4) / max(n_read, MIN_CHUNK)
            self.token_s = _updated(self.token_s, token_s)

    def _beside_s(self, n_decoding: int) -> float:
        """Seconds of a step with prefill that are not spent on prompt tokens."""
        return self._decoding_s(n_decoding) + self._fixed_s()

    def _decoding_s(self, n_decoding: int) -> float:
        """Seconds of a step with `n_decoding` sequences, or with the nearest number that was measured."""
        if not n_decoding or not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda n: abs(n - n_decoding))]

    def _fixed_s(self) -> float:
        """Seconds that the first prompt token costs more than the others; 0 if the measurements do not show it.

        llama.cpp reads the weights once for the decoding sequences and once more for the prompt.
        """
        if not self._decode_s:
            return 0.0
        few, many = min(self._decode_s), max(self._decode_s)
        if many < 2 * few:
            return 0.0
        slope_s = max(0.0, (self._decode_s[many] - self._decode_s[few]) / (many - few))
        return max(0.0, self._decode_s[few] - slope_s * few)


def _updated(known: float | None, measured: float) -> float:
    if known is None or measured > known:
        return measured
    return known + FORGET * (measured - known)
