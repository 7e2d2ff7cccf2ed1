"""Which tokens each slot's memory holds, and which sequence has the slot.

Owns admission: a sequence takes the idle slot that holds the longest part of its prompt. A slot keeps its tokens when
its sequence has ended. Pure: knows no llama.cpp, it decides and the runner does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec


class Admission(msgspec.Struct, frozen=True):
    slot: int
    n_kept: int
    """Leading prompt tokens that stand in the slot already; the rest of what it held is gone."""


@dataclass(slots=True)
class Slot:
    tokens: list[int] = field(default_factory=list)
    """What stands in its memory, in order; grows by what was evaluated, is cut at admission."""
    sequence_id: int | None = None
    """None: idle."""
    last_used: int = 0
    """Admissions and ends, counted over all slots."""


class SlotTable:
    def __init__(self, n_slots: int, *, n_ctx: int, can_trim: bool = True) -> None:
        self._slots = [Slot() for _ in range(n_slots)]
        self._n_ctx = n_ctx
        self._can_trim = can_trim
        self._n_uses = 0

    @property
    def n_idle(self) -> int:
        return sum(slot.sequence_id is None for slot in self._slots)

    def holds(self, slot: int) -> Sequence[int]:
        return self._slots[slot].tokens

    def try_admit(self, sequence_id: int, prompt: Sequence[int]) -> Admission | None:
        """None: no slot is idle. Equally good ones are taken least recently used first."""
        best: Admission | None = None
        for number, slot in sorted(enumerate(self._slots), key=lambda one: one[1].last_used):
            if slot.sequence_id is None:
                n_kept = self._n_reusable(slot.tokens, prompt)
                if best is None or n_kept > best.n_kept:
                    best = Admission(number, n_kept)
        if best is not None:
            slot = self._slots[best.slot]
            del slot.tokens[best.n_kept :]
            slot.sequence_id = sequence_id
            self._use(slot)
        return best

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """They were evaluated and stand in the slot now."""
        self._slots[slot].tokens.extend(tokens)

    def free(self, slot: int) -> None:
        self._slots[slot].sequence_id = None
        self._use(self._slots[slot])

    def check_integrity(self) -> None:
        """Raises AssertionError when a sequence has two slots or a slot holds more than fits."""
        taken = [slot.sequence_id for slot in self._slots if slot.sequence_id is not None]
        if len(taken) != len(set(taken)):
            raise AssertionError(f"a sequence has two slots: {taken}")
        for number, slot in enumerate(self._slots):
            if len(slot.tokens) > self._n_ctx:
                raise AssertionError(f"slot {number} holds {len(slot.tokens)} tokens of {self._n_ctx}")

    def _use(self, slot: Slot) -> None:
        self._n_uses += 1
        slot.last_used = self._n_uses

    def _n_reusable(self, held: Sequence[int], prompt: Sequence[int]) -> int:
        # The last prompt token is always evaluated again: without it there is nothing to sample from.
        limit = min(len(held), len(prompt) - 1)
        n = next((at for at in range(limit) if held[at] != prompt[at]), limit)
        return n if self._can_trim or n == len(held) else 0
