"""The contract between deciding and doing: a step's plan, what was sampled, and the runner that evaluates.

The scheduler makes plans; a runner evaluates them. The real runner is `runner.py`, the tests' one is a fake. Knows
tokens and slots only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from llamalith_app.engine.messages import (
    NO_ARGUMENTS,
    ChatMessage,
    GpuOffload,
    LoadModel,
    PromptFormat,
    RefusalKind,
    Sampling,
    TemplateArguments,
)


class CannotLoad(Exception):
    """The model cannot be loaded. The message is a sentence for people that names model and file."""


class Refusal(Exception):
    """This sequence cannot run. The reason is a sentence for people."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RefusalKind = kind
        self.reason = reason


class Work(NamedTuple):
    """The tokens of one sequence that a step evaluates."""

    sequence_id: int
    slot: int
    tokens: Sequence[int]
    position: int
    """Position of the first of them in the slot."""
    wanted: bool
    """Whether to sample a token after the last of them."""


class Sampled(NamedTuple):
    sequence_id: int
    token: int


class SampleFailed(NamedTuple):
    """No token could be drawn under the sequence's grammar. Ends this sequence and no other."""

    sequence_id: int
    reason: str
    """A sentence for people."""


class Thoughts(NamedTuple):
    """The thinking with which a reply may begin."""

    is_opened: bool
    """The prompt ends inside of it."""
    budget: int | None
    """Tokens that it may take before it is ended; None: any number."""


class SlotModel(Protocol):
    """The properties of a loaded model and its slots that the scheduler needs."""

    n_ctx: int
    """Tokens that a slot holds."""
    n_slots: int
    can_share: bool
    """Whether a slot can be cut, so that a prefix of it can be copied."""

    def least_cut(self, slot: int) -> int:
        """The smallest number of leading tokens, above 0, that the slot can be cut to; any larger number works too.
        Larger than `n_ctx`: the slot cannot be cut. Every slot can be emptied."""

    def least_cut_restored(self, n_tokens: int) -> int:
        """`least_cut` of a slot into which a state of `n_tokens` was restored."""

    def piece(self, token: int) -> bytes:
        """The bytes that the token adds to the text: perhaps part of a character, empty for control tokens, except for
        markers around thinking."""

    def is_marker(self, token: int) -> bool:
        """Whether the token is one of the markers around the model's thinking."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends a reply."""


class Runner(SlotModel, Protocol):
    """One thread uses a runner, with two exceptions for those that prepare sequences: another thread may call
    `tokenize` and `begin`, one at a time, and any thread may call `render`."""

    extra_stop: Sequence[str]
    """Stop strings that belong to the chat format."""
    controls: Mapping[str, Sequence[str]]
    """The texts of control tokens that are nothing but text where people type them, as `typed.mark` takes them."""
    family: str
    """Which family of reasoning models the model is of, by its name in `reasoning.FAMILIES`. Empty: it cannot think."""
    marker_tokens: frozenset[str]
    """The markers of this family that are tokens of the vocabulary."""
    format: PromptFormat
    """How it writes prompts."""
    gpu: GpuOffload | None
    """Which part of the model a GPU holds. None: no layers were requested and no GPU holds any."""
    fingerprint: str
    """Names the model, context, slots and version of llama.cpp: a saved state fits if it is equal."""

    def render(self, messages: Sequence[ChatMessage], arguments: TemplateArguments = NO_ARGUMENTS) -> str:
        """The prompt as the chat template writes it. Raises whatever the template raises."""

    def tokenize(self, text: str, mark: str = "") -> list[int]:
        """The tokens of a prompt, without its marks: see `typed.py`."""

    def begin(
        self,
        sequence_id: int,
        sampling: Sampling,
        grammar: str,
        thoughts: Thoughts | None,
        prompt: Sequence[int],
        written: Sequence[int],
    ) -> bool:
        """Makes the sequence's sampler, in the state after it drew `written`. `thoughts`: the grammar holds the reply
        from behind the thinking on; None: from its first token on. False: the grammar or the thoughts do not allow
        those tokens, and the sampler is in its first state. Raises Refusal for a grammar that cannot be used."""

    def answer_now(self, sequence_id: int, written: Sequence[int]) -> None:
        """Closes the sequence's thinking with its next tokens, if it thinks. `written`: all that it drew so far."""

    def end(self, sequence_id: int) -> None:
        """Frees the sequence's sampler, if there is one. The slot keeps its tokens."""

    def keep(self, slot: int, n_tokens: int) -> int:
        """Cuts the slot to its first `n_tokens`. Returns how many it kept: all of these, or 0."""

    def copy(self, source: int, target: int) -> None:
        """Makes the target hold what the source holds, and nothing else. Takes effect with the next step."""

    def save(self, slot: int, max_bytes: int) -> bytes | memoryview | None:
        """The slot's state as `restore` takes it; None: it is larger than `max_bytes`, or could not be had."""

    def restore(self, slot: int, data: bytes | memoryview) -> bool:
        """Makes the slot hold a saved state. False: the data was not accepted, and the slot is empty. Must not be
        called between a copy and the next step."""

    def evaluate(self, plan: Sequence[Work]) -> Sequence[Sampled | SampleFailed]:
        """Evaluates one step. Returns one result for each work with `wanted`. The only call that takes long."""

    def close(self) -> None:
        """Frees the model and all that belongs to it."""


OpenRunner = Callable[[LoadModel, Callable[[float], None]], Runner]
"""Loads a model, and reports its progress from 0 to 1 to the second argument. Raises CannotLoad."""
