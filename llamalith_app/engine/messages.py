"""The messages between worker and engine. `frames.py` puts each into one msgpack frame.

Owns the wire contract and the limit of a frame's length. The worker sends `LoadModel` first, then `Submit`,
`Cancel` and `AnswerNow` at any time, and `End` last. The engine answers a load with `Loading` and then `Loaded` or
`LoadFailed`, and sends one `Step` for each step, for all sequences that took part.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""A peer that sends a longer frame is broken."""

TemplateArguments = Mapping[str, bool | int | float | str | None]
NO_ARGUMENTS: TemplateArguments = MappingProxyType({})
FinishReason = Literal["stop", "length", "cancelled"]
RefusalKind = Literal["context_overflow", "template", "grammar", "internal", "engine_died"]
"""Why a sequence cannot run. `engine_died`: a process beside the engine died, and another attempt may succeed."""


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence samples its tokens. Names and meanings are those of llama.cpp's sampler chain."""

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
    """First message to an engine: the one model that it holds until it ends."""

    model: str
    path: str
    sha256: str | None
    """Lower-case hex, checked before llama.cpp sees the file. None: not checked."""
    chat_format: str
    """`auto`: the GGUF's own template. Otherwise the name of one of llama-cpp-python's chat formats."""
    n_ctx: int
    """Tokens that a sequence can hold, prompt and reply together."""
    n_slots: int
    """Sequences that can run at the same time."""
    n_chunk: int
    """Prompt tokens that one step evaluates at most. The measured speed may allow fewer."""
    n_threads: int
    """0: one for each core that this process may use."""
    n_gpu_layers: int = 0
    """Layers that the GPU computes; -1: all."""
    reasoning: str = ""
    """The family of reasoning models that the model is of. Any other word: the engine finds it."""
    parse_special_in_content: bool = False
    """The text of a control token is that token also where somebody typed it."""
    state_dir: str = ""
    """Folder for the states of slots that are needed for another sequence, or that the engine holds when it ends.
    Empty: no state is saved."""
    state_max_bytes: int = 0
    """Limit for all files in that folder together."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    sequence_id: int
    """Chosen by the worker; greater than every earlier one in this engine."""
    messages: list[ChatMessage]
    """The whole conversation: the system message if any, earlier turns, and the prompt as the last message."""
    sampling: Sampling
    stop: list[str]
    is_raw: bool = False
    """The last message is the prompt as it is: no template, no other message, and its control tokens count."""
    may_omit: bool = True
    """Earlier turns that do not fit the context are left out. False: the sequence is refused then."""
    grammar: str = ""
    """In llguidance's own notation, as `grammars/grammar.py` makes it. Empty: none."""
    effort_arguments: dict[str, bool | int | str] = {}
    """For the chat template. It gets none of them if it refuses them."""
    template_arguments: dict[str, bool | int | float | str | None] = {}
    """For the chat template, over those."""
    thinks: bool = False
    """The reply may begin with thinking, if the model's family is known. The grammar does not hold that."""
    thinking_budget: int | None = None
    """Tokens that the thinking may take; then it is ended. None: any number."""
    written: list[int] = []
    """Tokens of the reply that an earlier attempt drew. The sequence resumes behind them, and its first `Advance` with
    a token contains them too. If it cannot resume, it writes the whole reply again."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Frees the slot within one step. Answered by a finish `cancelled`, or not at all if the sequence had ended."""

    sequence_id: int


class AnswerNow(msgspec.Struct, frozen=True, tag="answer_now"):
    """Closes the thinking of a running sequence, so that its reply begins. Nothing for one that does not think, or not
    any more."""

    sequence_id: int


class End(msgspec.Struct, frozen=True, tag="end"):
    """The engine saves the states of its slots and ends."""


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


FormatSource = Literal["file", "setting", "vocabulary", "architecture", "guess"]


class PromptFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's prompts are written, and why so."""

    source: FormatSource
    """`file`: by the chat template of its file; `setting`: as its settings say. Otherwise the file brings none:
    `vocabulary`: it has the tokens of this format; `architecture`: its family has it; `guess`: nothing is known."""
    name: str = ""
    """Of the format, as llama.cpp or llama-cpp-python calls it; empty: it is the file's own."""
    system: Literal["own", "first", "last", "none"] | None = None
    """Where a system prompt goes: into a message of its own, in front of the first or the last message of a user, or
    nowhere, so that such a job is refused. None: not known."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    n_ctx: int
    """Tokens that a sequence can hold: the configured number, or the model's own limit if that is lower."""
    n_slots: int
    load_s: float
    family: str = ""
    """Which family of reasoning models the model is of; empty: it cannot think."""
    marker_tokens: list[str] = []
    """The markers around its thinking that are tokens of its vocabulary."""
    format: PromptFormat | None = None
    gpu: GpuOffload | None = None
    """None: no layers were requested and no GPU holds any."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """The engine ends after this message."""

    reason: str
    """A sentence for people that names the file."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """This sequence cannot run. Another attempt would fail too, except for the kind `engine_died`. Other sequences go
    on."""

    sequence_id: int
    kind: RefusalKind
    reason: str


class Advance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress that one step made for one sequence."""

    sequence_id: int
    prompt_tokens: int
    prompt_done: int
    """Prompt tokens in the slot, reused ones included."""
    prompt_reused: int
    """Prompt tokens that were not computed for this sequence: they were in the slot, were copied, or came from disk."""
    tokens: list[int] = []
    text: str = ""
    """Whole characters only. Text that could still become a stop string is held back."""
    markers: list[int] = []
    """Where in the whole text of the reply, in characters, the text of tokens begins that are markers around thinking.
    Told with that text or before."""
    omitted_messages: int = 0
    """Earlier messages that were left out because they did not fit the context."""
    opens_thinking: bool = False
    """The prompt ends inside of thinking, so the reply begins with it."""
    finish: FinishReason | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    sequences: list[Advance]


ToEngine = LoadModel | Submit | Cancel | AnswerNow | End
FromEngine = Loading | Loaded | LoadFailed | Refused | Step
