"""What passes between deciding and doing: a step's plan, what was sampled, and the runner that does it.

The scheduler makes plans, a runner evaluates them; the real one is `runner.py`, the tests' one is a fake.
Knows tokens and slots only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from llamalith_app.engine.messages import ChatMessage, GpuOffload, RefusalKind, Sampling


class Refusal(Exception):
    """This sequence cannot run; the reason is a sentence for people."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RefusalKind = kind
        self.reason = reason


class Work(NamedTuple):
    """Tokens of one sequence that one step evaluates."""

    sequence_id: int
    slot: int
    tokens: Sequence[int]
    position: int
    """Of the first of them in the slot."""
    wanted: bool
    """Sample a token after the last of them."""


class Sampled(NamedTuple):
    sequence_id: int
    token: int


class SampleFailed(NamedTuple):
    """No token could be drawn under its grammar; ends this sequence and no other."""

    sequence_id: int
    reason: str


class SlotModel(Protocol):
    """What a scheduler has to know of a loaded model with its slots."""

    n_ctx: int
    """Tokens a slot holds."""
    n_slots: int
    can_share: bool
    """Whether a prefix can be taken from a slot that holds more than that."""

    def least_cut(self, slot: int) -> int:
        """To so few leading tokens, and to any more, the slot could be cut and go on from there. To none, always; to
        more than there are room for: never."""

    def least_cut_restored(self, n_tokens: int) -> int:
        """The same for a slot that so many tokens were restored into."""

    def piece(self, token: int) -> bytes:
        """What the token adds to the text; may be part of a character, and is empty for control tokens."""

    def is_end(self, token: int) -> bool: ...


class Runner(SlotModel, Protocol):
    """Used by one thread; `tokenize` and `begin`, which prepare a sequence, by another one beside it at a time;
    `render` by any."""

    extra_stop: Sequence[str]
    """Stop strings that belong to the chat format."""
    can_think: bool
    """Its chat template or its vocabulary has a `<think>` or a `</think>`."""
    gpu: GpuOffload | None
    """Which part of the model a GPU holds; None: nothing was requested and nothing is there."""
    fingerprint: str
    """Model, context, slots and llama.cpp: what must be equal for a saved state to fit."""

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt as the chat template writes it. Raises whatever the template raises."""

    def tokenize(self, text: str) -> list[int]: ...

    def begin(
        self, sequence_id: int, sampling: Sampling, grammar: str, prompt: Sequence[int], written: Sequence[int]
    ) -> bool:
        """Makes the sequence's sampler, as it stood after it had drawn what was written. False: the grammar does not
        allow that, and it stands as at the beginning. Raises Refusal for a grammar that cannot be used."""

    def end(self, sequence_id: int) -> None:
        """Frees its sampler; the slot keeps its tokens."""

    def keep(self, slot: int, n_tokens: int) -> int:
        """Forgets what the slot holds beyond its first tokens; returns how many it could keep: all, or 0."""

    def copy(self, source: int, target: int) -> None:
        """Makes the target hold what the source holds, and nothing else."""

    def save(self, slot: int, max_bytes: int) -> bytes | memoryview | None:
        """What `restore` takes; None: it could not be had, or is larger."""

    def restore(self, slot: int, data: bytes | memoryview) -> bool:
        """Makes the slot hold what it held once; False: it is empty now. Not between a copy and the next step."""

    def evaluate(self, plan: Sequence[Work]) -> Sequence[Sampled | SampleFailed]:
        """The only call that takes time. One result for each work that wants one."""

    def close(self) -> None: ...
