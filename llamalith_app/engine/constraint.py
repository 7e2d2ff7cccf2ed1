"""What one sequence is held to: llguidance follows its tokens and says which may come next.

Owns the bounds of time; those of work are `grammar.LIMITS`. Knows tokens and no llama.cpp. Used by the engine
child's main thread alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.grammars.grammar import LIMITS, sentence

T = TypeVar("T")

COMPILE_S = 2.0
"""Others wait meanwhile. Schemas were judged before and take less; this is for a slower machine than that one."""
STEP_S = 0.25
"""Processor time that one token of one sequence may take here; many hundred times what it usually does."""


class TooSlow(Exception):
    """A sentence for people."""


class Vocabulary(NamedTuple):
    """The tokens of a model as grammars see them; made once a model."""

    tokenizer: LLTokenizer
    ends: frozenset[int]
    """Tokens that end a reply: allowed where the grammar may end."""
    n_tokens: int


class Constraint:
    """Raises Refusal for a grammar that cannot be used. The methods raise TooSlow, after which it is of no use."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        self._vocabulary = vocabulary
        compiled: list[Any] = []

        def compile_it() -> None:
            compiled.append(LLMatcher(vocabulary.tokenizer, grammar, limits=LIMITS, log_level=0))

        # Nothing interrupts llguidance at this; it does not hold the interpreter meanwhile.
        thread = threading.Thread(target=compile_it, daemon=True)
        thread.start()
        thread.join(COMPILE_S)
        if not compiled:
            raise Refusal("grammar", f"The grammar takes more than {COMPILE_S:g} s to compile.")
        self._matcher = compiled[0]
        if self._matcher.is_error():
            raise Refusal("grammar", f"The grammar cannot be used: {sentence(self._matcher.get_error())}.")

    def allows(self, token: int) -> bool:
        if token in self._vocabulary.ends:
            return bool(self._bounded(self._matcher.is_accepting))
        return bool(self._bounded(lambda: self._matcher.validate_tokens([token])))

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each token whether it may come next; none may where the grammar leads nowhere."""
        bits = self._bounded(self._matcher.compute_bitmask)
        if self._matcher.is_error():
            if "NoExtension" not in self._matcher.get_error():
                raise TooSlow(f"The grammar takes too much work: {sentence(self._matcher.get_error())}.")
            # Its mask would let the reply end here.
            return np.zeros(self._vocabulary.n_tokens, dtype=bool)
        mask = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")
        return mask[: self._vocabulary.n_tokens].astype(bool)

    def accept(self, token: int) -> None:
        """The token, an allowed one, was drawn."""
        if token in self._vocabulary.ends:
            return
        if not self._bounded(lambda: self._matcher.consume_token(token)):
            raise TooSlow(f"The grammar takes too much work: {sentence(self._matcher.get_error())}.")

    def _bounded(self, step: Callable[[], T]) -> T:
        before = time.thread_time()
        result = step()
        if time.thread_time() - before > STEP_S:
            raise TooSlow(f"The grammar takes more than {STEP_S:g} s a token.")
        return result
