"""Holds one sequence to a grammar: llguidance follows its tokens and says which may come next.

Owns the limits of time; the limits of work are `grammar.LIMITS`. The runner makes a constraint in a thread that
prepares sequences, and the main thread uses it afterwards. Knows tokens, and no llama.cpp.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.grammars.grammar import LIMITS, readable_error

T = TypeVar("T")


class Timings(msgspec.Struct, frozen=True):
    """All in seconds."""

    compile_s: float = 2.0
    """Limit for compiling a grammar, during which no other sequence is prepared. Schemas are validated within a shorter
    limit, but perhaps on a faster machine."""
    step_cpu_s: float = 0.25
    """Limit for the processor time of one call about one token: many hundred times what is usual."""


TIMINGS = Timings()


class GrammarFailed(Exception):
    """The grammar takes too much time or work. The message is a sentence for people."""


class Vocabulary(NamedTuple):
    """The tokens of a model for grammars; made once for each model."""

    tokenizer: LLTokenizer
    ends: frozenset[int]
    """Tokens that end a reply. They are allowed where the grammar may end."""
    n_tokens: int


class Constraint:
    """Raises Refusal for a grammar that cannot be used. The methods raise GrammarFailed; do not use the constraint
    after that."""

    def __init__(self, vocabulary: Vocabulary, grammar: str, timings: Timings = TIMINGS) -> None:
        self._vocabulary = vocabulary
        self._timings = timings
        compiled: list[Any] = []

        def compile_it() -> None:
            compiled.append(LLMatcher(vocabulary.tokenizer, grammar, limits=LIMITS, log_level=0))

        # Nothing can interrupt llguidance here, so a thread is left behind. It does not hold the interpreter's lock.
        thread = threading.Thread(target=compile_it, daemon=True)
        thread.start()
        thread.join(timings.compile_s)
        if not compiled:
            raise Refusal("grammar", f"The grammar takes more than {timings.compile_s:g} s to compile.")
        self._matcher = compiled[0]
        if self._matcher.is_error():
            raise Refusal("grammar", f"The grammar cannot be used: {readable_error(self._matcher.get_error())}.")

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        if token in self._vocabulary.ends:
            return bool(self._within_limit(self._matcher.is_accepting))
        return bool(self._within_limit(lambda: self._matcher.validate_tokens([token])))

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each token, whether it may come next. No token may if the grammar has no continuation."""
        bits = self._within_limit(self._matcher.compute_bitmask)
        if self._matcher.is_error():
            if "NoExtension" not in self._matcher.get_error():
                raise GrammarFailed(f"The grammar takes too much work: {readable_error(self._matcher.get_error())}.")
            # llguidance's mask would allow the reply to end here.
            return np.zeros(self._vocabulary.n_tokens, dtype=bool)
        mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
        return mask[: self._vocabulary.n_tokens].astype(bool)

    def accept(self, token: int) -> None:
        """Notes that an allowed token was drawn."""
        if token in self._vocabulary.ends:
            return
        if not self._within_limit(lambda: self._matcher.consume_token(token)):
            raise GrammarFailed(f"The grammar takes too much work: {readable_error(self._matcher.get_error())}.")

    def _within_limit(self, step: Callable[[], T]) -> T:
        before = time.thread_time()
        result = step()
        if time.thread_time() - before > self._timings.step_cpu_s:
            raise GrammarFailed(f"The grammar takes more than {self._timings.step_cpu_s:g} s a token.")
        return result
