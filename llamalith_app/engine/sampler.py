"""How one sequence draws its tokens: llama.cpp's sampler chain, a seeded draw at its end, and a grammar.

Owns the chain and its parameters. The runner makes one sampler for each sequence and asks it for each token. Knows
neither slots nor plans.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from llamalith_app.engine.constraint import Constraint, GrammarFailed
from llamalith_app.engine.messages import Sampling
from llamalith_app.engine.thinking import Thinking

PENALTY_LAST_N = 64
"""Tokens that the penalties look back; llama.cpp's own default."""
MIN_TEMPERATURE = 1e-5
"""Below it the most likely token is drawn: logits divided by less exceed the range of a float."""
MIN_PENALTY = 0.01
"""The least `repeat_penalty`, for the same reason."""
CANDIDATE = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)])
"""llama_token_data."""


def make_sampler(
    sampling: Sampling,
    constraint: Constraint | None,
    thinking: Thinking | None,
    n_vocab: int,
    prompt: Sequence[int],
    written: Sequence[int],
) -> Sampler | GreedySampler:
    """A sampler in the state after it drew `written` behind the prompt. The constraint and the thinking, if any, have
    accepted these tokens already. Must be freed by its `free`."""
    if constraint is None and thinking is None and _is_greedy(sampling):
        return GreedySampler(n_vocab)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    penalties = llama_cpp.llama_sampler_init_penalties(
        n_vocab,
        PENALTY_LAST_N,
        max(sampling.repeat_penalty, MIN_PENALTY),
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    for token in [*prompt[-PENALTY_LAST_N:], *written][-PENALTY_LAST_N:]:
        llama_cpp.llama_sampler_accept(penalties, token)
    add(penalties)
    dist = None
    if sampling.temperature < MIN_TEMPERATURE:
        add(llama_cpp.llama_sampler_init_greedy())
    else:
        add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        add(llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1))
        add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1))
        add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1))
        add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        dist = SeededDist(chain, secrets.randbits(32) if sampling.seed is None else sampling.seed, len(written))
    return Sampler(chain, dist, constraint, thinking, n_vocab)


def follow(token: int, constraint: Constraint | None, thinking: Thinking | None) -> None:
    """Notes a drawn token: in the thinking, or else in the grammar. Raises GrammarFailed."""
    if thinking is not None and (constraint is None or thinking.is_outside(token, constraint)):
        thinking.accept(token)
        if constraint is not None and thinking.has_escaped:
            raise GrammarFailed("The model began its reply in front of what the grammar holds.")
    elif constraint is not None:
        constraint.accept(token)
        if thinking is not None:
            thinking.end()


def _is_greedy(sampling: Sampling) -> bool:
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return sampling.temperature < MIN_TEMPERATURE and penalties == (1, 0, 0)


class GreedySampler:
    """Draws the most likely token. Takes a fifth of the time of a greedy chain of llama.cpp."""

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab

    def free(self) -> None:
        return

    def sample(self, context: Any, at: int) -> int:
        """The token after row `at` of the last batch."""
        row = llama_cpp.llama_get_logits_ith(context, at)
        return int(np.ctypeslib.as_array(row, shape=(self._n_vocab,)).argmax())


class SeededDist:
    """The random draw at the end of a chain. It is replaced for each token, so that a draw depends only on the seed and
    the token's position in the reply, and a sequence can resume. llama.cpp's own sampler changes its state with each
    draw, and does not say how often it drew."""

    def __init__(self, chain: Any, seed: int, n_drawn: int) -> None:
        self._chain = chain
        self._seed = seed
        self._n_drawn = n_drawn
        self._add()

    def next(self) -> None:
        """Prepares the draw of the next token."""
        last = llama_cpp.llama_sampler_chain_n(self._chain) - 1
        llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(self._chain, last))
        self._n_drawn += 1
        self._add()

    def _add(self) -> None:
        digest = hashlib.blake2b(b"%d %d" % (self._seed, self._n_drawn), digest_size=4)
        dist = llama_cpp.llama_sampler_init_dist(int.from_bytes(digest.digest(), "little"))
        llama_cpp.llama_sampler_chain_add(self._chain, dist)


class Sampler:
    """A chain, with a grammar's constraint or without, and with thinking that the grammar does not hold or without.
    Owns the chain, and `dist` within it."""

    def __init__(
        self,
        chain: Any,
        dist: SeededDist | None,
        constraint: Constraint | None,
        thinking: Thinking | None,
        n_vocab: int,
    ) -> None:
        self._chain = chain
        self._dist = dist
        self._constraint = constraint
        self._thinking = thinking
        self._n_vocab = n_vocab
        self._candidates = np.zeros(n_vocab if constraint else 0, dtype=CANDIDATE)
        self._candidates["id"] = np.arange(len(self._candidates))

    def free(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def sample(self, context: Any, at: int) -> int | None:
        """The token after row `at` of the last batch; None: the grammar allows none. Raises GrammarFailed."""
        token = self._draw(context, at)
        if self._dist is not None:
            self._dist.next()
        return token

    def _draw(self, context: Any, at: int) -> int | None:
        thinking = self._thinking
        if thinking is not None and (forced := thinking.forced) is not None:
            thinking.accept(forced)
            llama_cpp.llama_sampler_accept(self._chain, forced)
            return forced
        if self._constraint is None:
            token = int(llama_cpp.llama_sampler_sample(self._chain, context, at))
            if thinking is not None:
                thinking.accept(token)
            return token
        row = llama_cpp.llama_get_logits_ith(context, at)
        logits = np.ctypeslib.as_array(row, shape=(self._n_vocab,))
        # The chain's first choice is usually allowed, and checking one token costs a hundredth of checking all.
        chosen = self._choose(logits, self._candidates)
        if thinking is not None and thinking.is_free:
            chosen = None if chosen is None else thinking.instead_of(chosen)
        else:
            openings = list(thinking.openings) if thinking is not None else []
            if chosen is None or not (chosen in openings or self._constraint.allows(chosen)):
                allowed = self._constraint.allowed()
                allowed[openings] = True
                chosen = self._choose(logits[allowed], self._candidates[allowed])
        if chosen is not None:
            follow(chosen, self._constraint, thinking)
            llama_cpp.llama_sampler_accept(self._chain, chosen)
        return chosen

    def _choose(self, logits: Any, candidates: Any) -> int | None:
        """The token that the chain draws from these candidates; None: none has a probability. Forbidden tokens must be
        left out instead of getting the probability 0, which would distort `typical_p`."""
        if not np.isfinite(logits).any():
            return None
        candidates = candidates.copy()
        candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        return int(chosen.id) if math.isfinite(chosen.logit) else None
