"""The answers about models, and the engine statuses that workers report for them."""

from __future__ import annotations

from typing import Literal

import msgspec

ModelState = Literal["absent", "loading", "loaded", "failed"]


class PromptFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How a model's prompts are written, and why so."""

    source: Literal["file", "setting", "vocabulary", "architecture", "guess"]
    """`file`: by the chat template of its file; `setting`: as model_formats says. Otherwise the file brings none:
    `vocabulary`: it has the tokens of this format; `architecture`: its family has it; `guess`: nothing is known."""
    name: str = ""
    """Of the format, as llama.cpp or llama-cpp-python calls it; empty or absent: it is the file's own."""
    system: Literal["own", "first", "last", "none"] | None = None
    """Where a system prompt goes: into a message of its own, in front of the first or the last message of a user, or
    nowhere, so that such a job is refused. Null or absent: not known."""


class EngineStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One model in one worker, reported with each heartbeat. Speeds are null until something was measured."""

    model: str
    state: ModelState
    progress: float | None = None
    reason: str | None = None
    n_slots: int
    n_used: int = 0
    fits: bool = True
    """False: other models have to be unloaded first."""
    memory_bytes: int = 0
    """Estimated, with its slots; 0: unknown."""
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    load_s: float | None = None
    job_s: float | None = None
    """Seconds from a job's start in the engine to its end, lately."""
    completion_tokens: float | None = None
    """Tokens of a reply, lately."""
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    prompt_format: PromptFormat | None = None
    """Once it is loaded."""
    reasoning: str = ""
    """Its family of reasoning models, once it is loaded; empty: none."""


class Model(msgspec.Struct, kw_only=True):
    name: str
    file: str
    """Its path on the server."""
    size_bytes: int | None
    """Size of that file; null where it cannot be read."""
    n_ctx: int
    """The context window in tokens, as configured."""
    format: str
    """`auto`: the model's own chat template."""
    state: ModelState
    """The best state among all workers."""
    progress: float | None
    """0 to 1, while it is loading."""
    reason: str | None
    """Why the last load failed."""
    slots: int
    """Jobs that run at the same time once it is loaded, in all workers together."""
    slots_used: int
    tokens_per_s: float | None
    """Decode speed of one reply, lately."""
    prompt_tokens_per_s: float | None
    prompt_tokens_computed: int
    """Prompt tokens computed since the live workers started."""
    prompt_tokens_reused: int
    """Prompt tokens since then that the engines still had and did not compute again."""
    queued: int
    memory_bytes: int | None = None
    """Memory that it takes in one worker once it is loaded, estimated; null: unknown."""
    pinned: bool = False
    """Once it is loaded, it is never unloaded."""
    prompt_format: PromptFormat | None = None
    """How its prompts are written; null: not loaded."""
    reasoning: str | None = None
    """Its family of reasoning models, whose thinking is kept apart from the reply; null: it has none, or is not
    loaded."""


class ModelAsked(msgspec.Struct, kw_only=True):
    """The workers were asked. They do it as soon as they can, or not at all: the list of models says how it stands."""

    ok: bool
    model: str


class ModelList(msgspec.Struct, kw_only=True):
    models: list[Model]
    """In the order of the configuration; the first is the default."""
