"""An engine as the worker sees it: one loaded model that runs sequences, whoever computes them.

Owns what every kind of engine can do and how it fails. The pool and the attempts know nothing else. Knows no process,
no file, no HTTP and no job.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, Protocol

from llamalith_app.engine.messages import Advance, PromptFormat, RefusalKind, Submit
from llamalith_app.errors import LlamalithError
from llamalith_app.settings.config import ModelConfig


class EngineLoadFailed(LlamalithError):
    """The model cannot be loaded; the reason names it and where it comes from."""


class EngineDied(LlamalithError):
    """The engine ended while it had work; the reason says how."""


class EngineRefused(LlamalithError):
    """This sequence cannot run; the engine goes on."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class EngineLimits(NamedTuple):
    """What a loaded model can hold and do."""

    n_ctx: int
    """Tokens of a sequence, prompt and reply together."""
    n_slots: int
    """Sequences that can run side by side."""
    family: str = ""
    """Which family of reasoning models it is of, by its name in `reasoning.FAMILIES`; empty: it cannot think."""
    marker_tokens: frozenset[str] = frozenset()
    """The markers around its thinking that are tokens of its vocabulary."""
    format: PromptFormat | None = None
    """How its prompts are written; None: not known."""


class LoadPlan(NamedTuple):
    """How a model would be loaded now. Both numbers are estimates, made again at each load."""

    n_slots: int
    need_bytes: int
    """Of this machine's memory; 0: nothing, or nothing is known."""
    problem: str = ""
    """Why a load will fail, as far as is known without one: a sentence for people that names the file; empty:
    nothing is known."""
    is_refused: bool = False
    """No load is tried: a job fails with the problem."""


class Engine(Protocol):
    """One loaded model; made by an EngineFactory, ended by `stop`. All calls come from one event loop."""

    died: asyncio.Event
    """Set once the engine is gone, whoever ended it; it never comes back."""

    @property
    def limits(self) -> EngineLimits: ...

    @property
    def load_s(self) -> float:
        """Seconds that the load took."""
        ...

    @property
    def pid(self) -> int | None:
        """Of the process that holds the model; None: it is none of this machine's."""
        ...

    def run(self, request: Submit) -> AsyncGenerator[Advance, None]:
        """The steps of one sequence, the last with a `finish`. Closing the generator before that cancels the sequence.

        Raises EngineRefused, and EngineDied as soon as the engine is gone.
        """
        ...

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence within one step, with the finish `cancelled`; does nothing for one that has ended."""
        ...

    def answer_now(self, sequence_id: int) -> None:
        """Closes the sequence's thinking, so that its reply begins; does nothing for one that does not think, or that
        the engine does not know yet."""
        ...

    def watch(self, elapsed_s: float) -> None:
        """To be called every `elapsed_s` seconds: ends an engine that has hung, so that its runs raise EngineDied."""
        ...

    async def stop(self) -> None:
        """Ends the engine and returns once its memory is free."""
        ...


class EngineFactory(Protocol):
    """Plans and starts the engines of one worker."""

    def plan(self, model: ModelConfig, budget_bytes: int) -> LoadPlan:
        """What a load of the model within this budget would take. Reads files, so it is called in a thread; raises
        nothing for a model that cannot be used, its plan says so."""
        ...

    async def start(self, model: ModelConfig, plan: LoadPlan, on_progress: Callable[[float], None]) -> Engine:
        """Loads the model; `on_progress` is called with how far the load is, from 0 to 1.

        Raises EngineLoadFailed. Cancelled, it leaves no engine behind.
        """
        ...
