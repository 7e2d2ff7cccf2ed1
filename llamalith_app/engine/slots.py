"""The slot table: which tokens each of llama.cpp's sequence ids holds, and who is working in it.

Pure bookkeeping beside the KV cache; an idle slot keeps its tokens until the room is needed. How far the model lets
a slot be cut back, it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_COPIED = 16
"""Tokens that a prefix in another slot must have more than the own one, to be worth the copying."""


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    sequence_id: int | None = None
    """Who works in it; None: idle."""
    used_at: int = 0
    """A count of admissions and frees, so that the least recently used one can be told."""


class Prefix(NamedTuple):
    """Leading tokens of a prompt that stand in a slot."""

    slot: int
    n_tokens: int


class SlotAssignment(NamedTuple):
    """Where a sequence works, and what of its prompt is there before it begins."""

    slot: int
    source: int
    """The slot that the tokens are taken from; the same one: they stand there already."""
    n_reused: int
    evicted: list[int]
    """All that the slot held, where some of it is lost by this; else empty."""


class SlotTable:
    """`least_cut(slot)`: to how few leading tokens the model can cut what the slot holds."""

    def __init__(self, n_slots: int, least_cut: Callable[[int], int]) -> None:
        self.slots = [Slot() for _ in range(n_slots)]
        self._least_cut = least_cut
        self._clock = 0

    def longest_prefix(self, prompt: Sequence[int]) -> Prefix:
        """The most of the prompt that any slot holds, idle or not.

        The last prompt token is never part of it: it must be evaluated for there to be something to sample from.
        """
        found = [Prefix(index, self.usable(index, prompt)) for index in range(len(self.slots))]
        return max(found, key=lambda one: (one.n_tokens, self._is_idle(one.slot)))

    def usable(self, index: int, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt could be taken over from the slot."""
        return usable_prefix(self.slots[index].tokens, prompt[:-1], self._least_cut(index))

    def try_admit(self, sequence_id: int, prompt: Sequence[int]) -> SlotAssignment | None:
        """A slot for the sequence; None: all are taken.

        (1) The idle slot that holds the longest prefix and nothing else, an empty one at least: nothing is lost by
        it; (2) else the idle slot unused for longest. A longer prefix of another slot is copied into it.
        """
        idle = [index for index in range(len(self.slots)) if self._is_idle(index)]
        if not idle:
            return None
        lossless = [index for index in idle if len(self.slots[index].tokens) == self.usable(index, prompt)]
        target = max(lossless, key=lambda index: len(self.slots[index].tokens)) if lossless else self._oldest(idle)
        source, n_reused = self.longest_prefix(prompt)
        n_own = self.usable(target, prompt)
        if n_reused - n_own < MIN_COPIED:
            source, n_reused = target, n_own
        return self._take(sequence_id, target, source, n_reused)

    def try_take(self, sequence_id: int, tokens: Sequence[int]) -> SlotAssignment | None:
        """A slot for tokens that are put there from elsewhere: the idle one that holds most of them and nothing else;
        else the one unused for longest."""
        idle = [index for index in range(len(self.slots)) if self._is_idle(index)]
        if not idle:
            return None
        lossless = [index for index in idle if self._holds_only(index, tokens)]
        target = max(lossless, key=lambda index: len(self.slots[index].tokens)) if lossless else self._oldest(idle)
        place = self._take(sequence_id, target, target, 0)
        self.extend(target, tokens)
        return place._replace(n_reused=len(tokens), evicted=[] if lossless else place.evicted)

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        self.slots[target].tokens = self.slots[source].tokens[:n_tokens]

    def keep(self, index: int, n_tokens: int) -> None:
        del self.slots[index].tokens[n_tokens:]

    def extend(self, index: int, tokens: Sequence[int]) -> None:
        self.slots[index].tokens.extend(tokens)

    def free(self, index: int) -> None:
        slot = self.slots[index]
        slot.sequence_id = None
        self._touch(slot)

    def check_integrity(self) -> None:
        """Raises AssertionError when two slots say that they are the same sequence's."""
        taken = [slot.sequence_id for slot in self.slots if slot.sequence_id is not None]
        if len(taken) != len(set(taken)):
            raise AssertionError(f"one sequence in two slots: {taken}")

    def _take(self, sequence_id: int, target: int, source: int, n_reused: int) -> SlotAssignment:
        slot = self.slots[target]
        n_stays = n_reused if source == target else common_prefix(slot.tokens, self.slots[source].tokens[:n_reused])
        evicted = slot.tokens if n_stays < len(slot.tokens) else []
        slot.tokens = self.slots[source].tokens[:n_reused]
        slot.sequence_id = sequence_id
        self._touch(slot)
        return SlotAssignment(target, source, n_reused, evicted)

    def _oldest(self, idle: Sequence[int]) -> int:
        return min(idle, key=lambda index: self.slots[index].used_at)

    def _holds_only(self, index: int, tokens: Sequence[int]) -> bool:
        held = self.slots[index].tokens
        return common_prefix(held, tokens) == len(held)

    def _is_idle(self, index: int) -> bool:
        return self.slots[index].sequence_id is None

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def usable_prefix(held: Sequence[int], wanted: Sequence[int], least_cut: int) -> int:
    """Number of leading tokens that are equal, where what is held can be cut to them; else 0."""
    n_common = common_prefix(held, wanted)
    return n_common if n_common == len(held) or n_common >= least_cut else 0


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    low, high = 0, min(len(held), len(wanted))
    # By halves: comparing slices is many times faster than a loop over tokens.
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
