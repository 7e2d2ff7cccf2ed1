"""The slot table: which tokens each of llama.cpp's sequence ids holds, and who is working in it.

Pure bookkeeping beside the KV cache; an idle slot keeps its tokens until the room is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    sequence_id: int | None = None
    """Who works in it; None: idle."""
    used_at: int = 0
    """A count of admissions and frees, so that the least recently used one can be told."""


class SlotTable:
    def __init__(self, n_slots: int) -> None:
        self.slots = [Slot() for _ in range(n_slots)]
        self._clock = 0

    def try_admit(self, sequence_id: int, prompt: Sequence[int]) -> tuple[int, int] | None:
        """An idle slot and how many of the prompt's tokens it already holds; None: all are taken.

        The longest common prefix wins, else the slot unused for longest. The last prompt token is never
        reused: it must be evaluated for there to be something to sample from.
        """
        idle = [index for index, slot in enumerate(self.slots) if slot.sequence_id is None]
        if not idle:
            return None
        reusable = {index: common_prefix(self.slots[index].tokens, prompt[:-1]) for index in idle}
        index = max(idle, key=lambda one: (reusable[one], -self.slots[one].used_at))
        slot = self.slots[index]
        slot.sequence_id = sequence_id
        self._touch(slot)
        self.keep(index, reusable[index])
        return index, reusable[index]

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

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    for index, (one, other) in enumerate(zip(held, wanted, strict=False)):
        if one != other:
            return index
    return min(len(held), len(wanted))
