"""A sequence: one prompt on its way to a reply, with its tokens, its progress and its text so far.

Owns data only. The scheduler decides what happens to a sequence next.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from llamalith_app.engine.messages import FinishReason
from llamalith_app.engine.text import ReplyText


class SlotState(NamedTuple):
    """What a slot held once, in memory: on its way to disk or read back from there."""

    tokens: list[int]
    data: bytes | memoryview
    """In llama.cpp's own format."""
    least_cut: int = 0
    """The model can cut the state to this many leading tokens, or to any larger number."""


def anonymous_memory(n_bytes: int) -> memoryview:
    """Memory for a state, which returns to the system as soon as nobody refers to it. malloc would keep the room of the
    largest state for each of its heaps: tens of MB with a small model, gigabytes with a large one.

    Raises OSError if there is not enough memory, and ValueError for 0 bytes."""
    return memoryview(mmap.mmap(-1, n_bytes))


class PrefixWait(NamedTuple):
    """Which prefix a sequence waits for: the other sequence that prefills it, its slot, and the length."""

    sequence_id: int
    slot: int
    n_tokens: int


@dataclass
class Sequence:
    id: int
    prompt: Items[int]
    """Tokens to evaluate before the first draw: the prompt, then the tokens in `written`."""
    max_tokens: int
    text: ReplyText
    omitted_messages: int = 0
    opens_thinking: bool = False
    """The prompt ends inside of thinking."""
    written: Items[int] = ()
    """Tokens of the reply that an earlier attempt wrote. They are the end of `prompt`."""
    written_text: str = ""
    """The text of `written` that can be shown; sent with the first token that is drawn."""
    state: SlotState | None = None
    """State from disk for the slot that the sequence will get."""
    awaits_state: bool = False
    """The state is being read from disk: the sequence cannot be admitted yet."""
    slot: int | None = None
    """Set when the sequence is admitted, None again when it ends."""
    wait: PrefixWait | None = None
    """Set at admission if copying a prefix beats computing it; None again once the prefix is complete."""
    n_reused: int = 0
    """Prompt tokens that were not computed for this sequence."""
    n_evaluated: int = 0
    """Tokens in the slot: reused, then prefilled, then decoded."""
    generated: list[int] = field(default_factory=list)
    """Tokens sampled so far. The next step evaluates the last of them."""
    finish: FinishReason | None = None

    @property
    def in_prefill(self) -> bool:
        return self.n_evaluated < len(self.prompt)

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt without `written`."""
        return len(self.prompt) - len(self.written)
