"""What worker and engine say to each other: one msgpack frame a message, 4-byte big-endian length first.

Owns the wire shapes and their framing limit only. The worker sends `LoadModel` once, then `Submit` and `Cancel`
at any time, and `End` last; the child answers with one `Step` frame a step, whatever number of sequences took part.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""A longer frame is a broken peer, not a message."""

FinishReason = Literal["stop", "length", "cancelled"]
RefusalKind = Literal["context_overflow", "template", "grammar", "internal", "engine_died"]
"""`engine_died`: of a process beside the engine; another attempt may succeed."""


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence draws its tokens; names and meaning as in llama.cpp's sampler chain."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None = None


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """First message to a child: the one model that it will hold until it ends."""

    model: str
    path: str
    sha256: str | None
    """Lower-case hex; checked before llama.cpp sees the file. None: not checked."""
    chat_format: str
    """`auto`: the GGUF's own template; else a name of llama-cpp-python's chat formats."""
    n_ctx: int
    """Tokens a sequence can hold, prompt and reply together."""
    n_slots: int
    """Sequences that can run side by side."""
    n_chunk: int
    """Prompt tokens evaluated in one step at most; measured speed sets how many it is."""
    n_threads: int
    """0: as many as there are cores for this process."""
    n_gpu_layers: int = 0
    """-1: all."""
    state_dir: str = ""
    """Folder for what slots hold when their room is needed, or at the end; empty: nothing is kept."""
    state_max_bytes: int = 0
    """Of all files in that folder together."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    sequence_id: int
    """Chosen by the worker: greater than all before it in this child."""
    messages: list[ChatMessage]
    """The whole turn: system message if any, earlier turns, and the prompt as the last one."""
    sampling: Sampling
    stop: list[str]
    grammar: str = ""
    """As llguidance takes it (`llamalith_app/grammar.py` makes them); empty: none."""
    written: list[int] = []
    """Tokens of the reply that an earlier attempt drew: it goes on behind them, and tells them with the first token of
    its own. Where it cannot, it writes the whole anew and tells only that."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Frees the slot within one step; answered by a finish `cancelled`, or by nothing if it had ended."""

    sequence_id: int


class End(msgspec.Struct, frozen=True, tag="end"):
    """The child saves what its slots hold and ends."""


class GpuOffload(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a model a GPU holds."""

    requested: int
    """The model's `n_gpu_layers`; -1: all."""
    n_layers: int
    """Layers that llama.cpp put onto a GPU."""
    n_layers_total: int
    """Layers of the model, the output layer included; 0: llama.cpp found no GPU and did not count."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    progress: float
    """0 to 1."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    n_ctx: int
    """Tokens a sequence can hold after the model's own limit was applied."""
    n_slots: int
    load_s: float
    can_think: bool = False
    """A reply may begin with a `<think>` that is one."""
    gpu: GpuOffload | None = None
    """None: no layers were requested and no GPU holds any."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The child ends after it."""

    reason: str
    """A sentence for people that names the file."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """This sequence cannot run, nor later, unless the kind says so; nothing else is touched."""

    sequence_id: int
    kind: RefusalKind
    reason: str


class Advance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step did for one sequence."""

    sequence_id: int
    prompt_tokens: int
    prompt_done: int
    """Prompt tokens that stand in the slot, reused ones included."""
    prompt_reused: int
    """Of them, those that were not computed for it: they stood there, were copied, or came from disk."""
    tokens: list[int] = []
    text: str = ""
    """Whole characters only; what could still become a stop string is held back."""
    omitted_messages: int = 0
    """Earlier messages left out because they did not fit the context."""
    opens_thinking: bool = False
    """The prompt ends inside an open `<think>`: the reply goes on behind it."""
    finish: FinishReason | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    sequences: list[Advance]


ToEngine = LoadModel | Submit | Cancel | End
FromEngine = Loading | Loaded | LoadFailed | Refused | Step
