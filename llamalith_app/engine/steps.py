"""What goes through one step of the engine, and what a runner must be able to do.

Owns the shapes that scheduler and runner share: `plan -> evaluate -> apply`. Knows neither llama.cpp nor frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from llamalith_app.engine.messages import ChatMessage, RefusalKind, Sampling
from llamalith_app.errors import LlamalithError


class CannotLoad(LlamalithError):
    """The model cannot be loaded; a sentence that names model and file."""


class Refusal(LlamalithError):
    """One sequence cannot run, now or later; nothing else is touched."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RefusalKind = kind


class Work(msgspec.Struct, frozen=True):
    """Tokens to evaluate in one slot."""

    slot: int
    tokens: list[int]
    position: int
    """Of the first of them in the slot; all before it stand there already."""
    wanted: bool
    """Sample a token after the last one."""


class StepPlan(msgspec.Struct, frozen=True):
    work: list[Work]
    """At most one a slot."""


class Sampled(msgspec.Struct, frozen=True):
    slot: int
    token: int


class SampleFailed(msgspec.Struct, frozen=True):
    """No token could be drawn; ends this slot's sequence and no other."""

    slot: int
    reason: str


class Rendered(msgspec.Struct, frozen=True):
    text: str
    stop: tuple[str, ...] = ()
    """Stop strings that belong to the chat format."""


class Vocabulary(Protocol):
    def piece(self, token: int) -> bytes:
        """The token's part of the text, perhaps in the middle of a character; empty for a control token."""

    def is_end(self, token: int) -> bool:
        """True for the tokens by which the model ends its reply."""


class Runner(Vocabulary, Protocol):
    """One loaded model. Only the thread that made it may call it."""

    @property
    def n_ctx(self) -> int:
        """Tokens that one slot can hold, the model's own limit applied."""

    @property
    def n_slots(self) -> int: ...

    @property
    def can_trim(self) -> bool:
        """False: a slot's memory can only be kept whole or dropped whole (recurrent models)."""

    def render(self, messages: Sequence[ChatMessage]) -> Rendered:
        """The prompt as the model's chat template writes it. Raises Refusal (template)."""

    def tokenize(self, text: str) -> list[int]:
        """Of a rendered prompt: special tokens are parsed, a missing first one is added."""

    def keep(self, slot: int, n: int) -> None:
        """Drops what the slot holds from position `n` on."""

    def begin(self, slot: int, sampling: Sampling, grammar: str, prompt: Sequence[int]) -> None:
        """How the slot draws its tokens from now on, until the next `begin`. Raises Refusal (grammar)."""

    def evaluate(self, plan: StepPlan) -> list[Sampled | SampleFailed]:
        """The only call that costs time; one result for each work with `wanted`. What it raises ends the engine."""
