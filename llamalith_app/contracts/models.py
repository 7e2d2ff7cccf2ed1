"""What clients read of the models offered, and the status of engines that workers report for it."""

from __future__ import annotations

from typing import Literal

import msgspec

ModelState = Literal["absent", "loading", "loaded", "failed"]


class EngineStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One model in one worker, reported with each heartbeat. Speeds are null until something was measured."""

    model: str
    state: ModelState
    progress: float | None = None
    reason: str | None = None
    n_slots: int
    n_used: int = 0
    fits: bool = True
    """False: others have to go before it can be loaded."""
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    load_s: float | None = None
    job_s: float | None = None
    """From its start in the engine to its end."""
    completion_tokens: float | None = None
    """Of a reply."""
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0


class Model(msgspec.Struct, kw_only=True):
    name: str
    file: str
    """Its path on the server."""
    size_bytes: int | None
    """Of that file; null where it cannot be read."""
    n_ctx: int
    """Tokens that a turn may hold, as configured."""
    format: str
    """`auto`: the model's own chat template."""
    state: ModelState
    """The best of all workers."""
    progress: float | None
    """0 to 1, while it is loading."""
    reason: str | None
    """Why it could not be loaded the last time."""
    slots: int
    """Jobs that run side by side once it is loaded, in all workers together."""
    slots_used: int
    tokens_per_s: float | None
    """Of one reply, lately."""
    prompt_tokens_per_s: float | None
    prompt_tokens_computed: int
    """Of all replies since the workers that are there began."""
    prompt_tokens_reused: int
    """The same: what engines had from earlier prompts and did not compute again."""
    queued: int


class ModelList(msgspec.Struct, kw_only=True):
    models: list[Model]
    """In the order of the configuration; the first is the default."""
