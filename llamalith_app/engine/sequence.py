"""One prompt on its way to a reply: its tokens, how far it is, and the text so far.

State only: what is done with it next, the scheduler decides.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from llamalith_app.engine.messages import FinishReason
from llamalith_app.engine.text import ReplyText


class State(NamedTuple):
    """What a slot held once, read back from disk."""

    tokens: list[int]
    data: bytes | memoryview
    """As llama.cpp wrote it."""
    least_cut: int = 0
    """To so few of its tokens, or any more, it can be cut."""


def own_memory(n_bytes: int) -> memoryview:
    """For a state: the system's, that goes back to it as soon as nobody holds it. The heaps of malloc would keep the
    room of the largest that ever stood in each (tens of MB with a small model, gigabytes with a large one). Raises
    OSError where there is none, ValueError for 0."""
    return memoryview(mmap.mmap(-1, n_bytes))


class Wait(NamedTuple):
    """For a prefix that another sequence is reading now."""

    sequence_id: int
    slot: int
    n_tokens: int


@dataclass
class Sequence:
    id: int
    prompt: Items[int]
    """What is read before it draws: the prompt, and what was written of the reply before."""
    max_tokens: int
    text: ReplyText
    omitted_messages: int = 0
    opens_thinking: bool = False
    """Its prompt ends inside an open `<think>`."""
    written: Items[int] = ()
    """Of the reply, by an earlier attempt: the end of `prompt`."""
    written_text: str = ""
    """What they make certain; told with the first token that is drawn."""
    state: State | None = None
    """Brought along from disk, for the slot that it will get."""
    is_reading: bool = False
    """Its state is on its way from disk: it cannot be admitted yet."""
    slot: int | None = None
    """Set when it is admitted, None again when it ends."""
    wait: Wait | None = None
    """Set at admission where sharing beats computing; None again as soon as the prefix stands."""
    n_reused: int = 0
    """Of its prompt, what it did not have to compute."""
    n_evaluated: int = 0
    """Of its tokens, those that stand in the slot: reused, prefilled, then decoded."""
    generated: list[int] = field(default_factory=list)
    """Sampled so far; the last of them is evaluated by the next step."""
    finish: FinishReason | None = None

    @property
    def in_prefill(self) -> bool:
        return self.n_evaluated < len(self.prompt)

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt alone."""
        return len(self.prompt) - len(self.written)
