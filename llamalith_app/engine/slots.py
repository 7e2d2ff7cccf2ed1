"""The slot table: which tokens each slot holds, and which sequence runs in it. A slot is a sequence id of llama.cpp.

Owns the bookkeeping beside the KV cache, and the choice of a slot for a sequence. The scheduler uses it. An idle slot
keeps its tokens until the room is needed. Pure: a function of the caller's says how far the model can cut a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_COPIED = 16
"""A prefix in another slot is copied if it is longer by at least so many tokens."""


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    sequence_id: int | None = None
    """The sequence that runs in the slot; None: the slot is idle."""
    used_at: int = 0
    """Counts admissions and frees, to find the slot that was used least recently."""


class Prefix(NamedTuple):
    """Leading tokens of a prompt that a slot holds."""

    slot: int
    n_tokens: int


class SlotAssignment(NamedTuple):
    """The slot of a sequence, and the prompt tokens that it reuses."""

    slot: int
    source: int
    """The slot that the reused tokens come from; equal to `slot` if they are there already."""
    n_reused: int
    evicted: list[int]
    """All tokens that the slot held, if some of them are lost by this assignment; otherwise empty."""


class SlotTable:
    """`least_cut(slot)` returns the smallest number of leading tokens that the model can cut the slot to."""

    def __init__(self, n_slots: int, least_cut: Callable[[int], int]) -> None:
        self.slots = [Slot() for _ in range(n_slots)]
        self._least_cut = least_cut
        self._clock = 0

    def longest_prefix(self, prompt: Sequence[int]) -> Prefix:
        """The longest prefix of the prompt that any slot holds, idle or not.

        The last prompt token is never part of it: that token must be evaluated to give logits to sample from.
        """
        found = [Prefix(index, self.usable(index, prompt)) for index in range(len(self.slots))]
        return max(found, key=lambda prefix: (prefix.n_tokens, self._is_idle(prefix.slot)))

    def usable(self, index: int, prompt: Sequence[int]) -> int:
        """How many leading tokens of the prompt can be reused from the slot."""
        return usable_prefix(self.slots[index].tokens, prompt[:-1], self._least_cut(index))

    def try_admit(self, sequence_id: int, prompt: Sequence[int]) -> SlotAssignment | None:
        """Assigns a slot to the sequence; None: no slot is idle.

        (1) Prefer idle slots that hold a prefix of the prompt and nothing else (an empty slot counts), because nothing
        is lost: take the one with the longest prefix. (2) Otherwise take the least recently used idle slot. A longer
        prefix in another slot is copied into the slot.
        """
        idle = [index for index in range(len(self.slots)) if self._is_idle(index)]
        if not idle:
            return None
        lossless = [index for index in idle if len(self.slots[index].tokens) == self.usable(index, prompt)]
        target = (
            max(lossless, key=lambda index: len(self.slots[index].tokens))
            if lossless
            else self._least_recently_used(idle)
        )
        source, n_reused = self.longest_prefix(prompt)
        n_own = self.usable(target, prompt)
        if n_reused - n_own < MIN_COPIED:
            source, n_reused = target, n_own
        return self._assign(sequence_id, target, source, n_reused)

    def try_take(self, sequence_id: int, tokens: Sequence[int]) -> SlotAssignment | None:
        """Assigns a slot whose tokens will be restored from disk; None: no slot is idle. Chooses as `try_admit`
        does."""
        idle = [index for index in range(len(self.slots)) if self._is_idle(index)]
        if not idle:
            return None
        lossless = [index for index in idle if self._holds_only(index, tokens)]
        target = (
            max(lossless, key=lambda index: len(self.slots[index].tokens))
            if lossless
            else self._least_recently_used(idle)
        )
        assignment = self._assign(sequence_id, target, target, 0)
        self.extend(target, tokens)
        return assignment._replace(n_reused=len(tokens), evicted=[] if lossless else assignment.evicted)

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Notes that the target holds the first `n_tokens` of the source, and nothing else."""
        self.slots[target].tokens = self.slots[source].tokens[:n_tokens]

    def keep(self, index: int, n_tokens: int) -> None:
        """Notes that the slot holds only its first `n_tokens`."""
        del self.slots[index].tokens[n_tokens:]

    def extend(self, index: int, tokens: Sequence[int]) -> None:
        """Notes that the tokens were evaluated in the slot."""
        self.slots[index].tokens.extend(tokens)

    def free(self, index: int) -> None:
        """Makes the slot idle. It keeps its tokens."""
        slot = self.slots[index]
        slot.sequence_id = None
        self._touch(slot)

    def check_integrity(self) -> None:
        """Raises AssertionError if two slots belong to the same sequence."""
        taken = [slot.sequence_id for slot in self.slots if slot.sequence_id is not None]
        if len(taken) != len(set(taken)):
            raise AssertionError(f"one sequence in two slots: {taken}")

    def _assign(self, sequence_id: int, target: int, source: int, n_reused: int) -> SlotAssignment:
        slot = self.slots[target]
        n_stays = n_reused if source == target else common_prefix(slot.tokens, self.slots[source].tokens[:n_reused])
        evicted = slot.tokens if n_stays < len(slot.tokens) else []
        slot.tokens = self.slots[source].tokens[:n_reused]
        slot.sequence_id = sequence_id
        self._touch(slot)
        return SlotAssignment(target, source, n_reused, evicted)

    def _least_recently_used(self, idle: Sequence[int]) -> int:
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
    """The number of leading tokens that are equal, if what is held can be cut to them; otherwise 0."""
    n_common = common_prefix(held, wanted)
    return n_common if n_common == len(held) or n_common >= least_cut else 0


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """The number of leading tokens that are equal."""
    low, high = 0, min(len(held), len(wanted))
    # A binary search: comparing slices is many times faster than a loop over tokens.
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
