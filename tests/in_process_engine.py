"""An engine without a process: the same script as `fake_engine.py`, over the worker's protocol, in the event loop.

For tests of what stands above that protocol: it starts at once, and dies by a call. Nothing of the real child, its
frames and its scheduler is in it; `tests/engine/test_protocol.py` holds both to the same behaviour.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from llamalith_app.engine.client.factory import LocalEngines
from llamalith_app.engine.client.protocol import EngineDied, EngineLimits, EngineLoadFailed, EngineRefused, LoadPlan
from llamalith_app.engine.messages import Advance, FinishReason, PromptFormat, Submit
from llamalith_app.engine.text import ReplyText
from llamalith_app.settings.config import ModelConfig
from tests.fake_engine import (
    END,
    GATE_LOOK_S,
    MARKER_OF,
    piece,
    read_rules,
    rendered,
    reply_tokens,
    rule_for,
    thinking_of,
    without_thinking,
)

N_CHUNK = 32
"""Prompt tokens that a step reads."""


class _Run:
    def __init__(self) -> None:
        self.is_cancelled = False
        self.answers_now = False


class InProcessEngine:
    def __init__(self, script: Path, limits: EngineLimits) -> None:
        self.limits = limits
        self.load_s = 0.0
        self.pid = None
        self.died = asyncio.Event()
        self._script = script
        self._slots = asyncio.Semaphore(limits.n_slots)
        self._runs: dict[int, _Run] = {}
        self._death = ""

    async def run(self, request: Submit) -> AsyncGenerator[Advance, None]:
        self._check_alive()
        run = self._runs[request.sequence_id] = _Run()
        try:
            rule = rule_for(read_rules(self._script), request.messages[-1].content)
            if "refuse" in rule:
                raise EngineRefused(rule.get("kind", "internal"), rule["refuse"])
            if not await self._passes(run, gate=rule.get("prepare_gate")):
                yield Advance(
                    sequence_id=request.sequence_id, prompt_tokens=0, prompt_done=0, prompt_reused=0, finish="cancelled"
                )
                return
            async with self._slots:
                async for step in self._steps(request, run, rule):
                    yield step
        finally:
            del self._runs[request.sequence_id]

    def cancel(self, sequence_id: int) -> None:
        if (run := self._runs.get(sequence_id)) is not None:
            run.is_cancelled = True

    def answer_now(self, sequence_id: int) -> None:
        if (run := self._runs.get(sequence_id)) is not None:
            run.answers_now = True

    def watch(self, elapsed_s: float) -> None:
        """It cannot hang."""

    async def stop(self) -> None:
        self.die("The engine was stopped.")

    def die(self, reason: str) -> None:
        if not self.died.is_set():
            self._death = reason
            self.died.set()

    async def _steps(self, request: Submit, run: _Run, rule: dict[str, Any]) -> AsyncGenerator[Advance, None]:
        prompt = rendered(request.messages, rule, self.limits.family)
        n_prompt, after, step_s = len(prompt.encode()), rule.get("after", 0), rule.get("step_s", 0)
        written = request.written if rule.get("goes_on", True) else []
        text = ReplyText(request.stop)
        written_text = "".join(text.feed(piece(token), is_marker=token in MARKER_OF) for token in written)

        def advance(
            n_read: int, finish: FinishReason | None = None, tokens: Sequence[int] = (), new: str = ""
        ) -> Advance:
            return Advance(
                sequence_id=request.sequence_id,
                prompt_tokens=n_prompt,
                prompt_done=n_read,
                prompt_reused=0,
                tokens=list(tokens),
                text=new,
                markers=text.take_markers(),
                opens_thinking=rule.get("opens_thinking", False),
                finish=finish,
            )

        for n_read in range(N_CHUNK, n_prompt, N_CHUNK):
            if not await self._passes(run, step_s):
                yield advance(n_read - N_CHUNK, "cancelled")
                return
            yield advance(n_read)
        left = reply_tokens(prompt, rule)[len(written) :]
        for n_drawn in itertools.count():
            if not await self._passes(run, step_s, rule.get("gate") if n_drawn >= after else None):
                yield advance(n_prompt, "cancelled")
                return
            if n_drawn >= after:
                self._obey_signal(rule)
            if run.answers_now:
                left = without_thinking(left)
            token, *left = left
            tokens = [] if token == END else [token]
            new = text.end() if token == END else text.feed(piece(token), is_marker=token in MARKER_OF)
            n_all = len(written) + n_drawn + len(tokens)
            finish: FinishReason | None = "stop" if token == END or text.stopped else None
            if finish is None and (n_all >= request.sampling.max_tokens or n_prompt + n_all >= self.limits.n_ctx):
                finish, new = "length", new + text.end()
            if n_drawn == 0:
                tokens, new = [*written, *tokens], written_text + new
            yield advance(n_prompt, finish, tokens, new)
            if finish is not None:
                return

    async def _passes(self, run: _Run, step_s: float = 0, gate: str | None = None) -> bool:
        """A step's time, and a gate. False: the run was cancelled. Raises EngineDied."""
        await asyncio.sleep(step_s)
        while gate is not None and not Path(gate).exists() and not (run.is_cancelled or run.answers_now or self._death):
            await asyncio.sleep(GATE_LOOK_S)
        self._check_alive()
        return not run.is_cancelled

    def _obey_signal(self, rule: dict[str, Any]) -> None:
        if "signal" not in rule or ("once" in rule and Path(rule["once"]).exists()):
            return
        if "once" in rule:
            Path(rule["once"]).touch()
        self.die(_ended_by(rule["signal"]))
        self._check_alive()

    def _check_alive(self) -> None:
        if self._death:
            raise EngineDied(self._death)


class InProcessEngines:
    """Plans as the real factory does, by the models' files."""

    def __init__(self, script: Path, *, default_n_slots: int | None = None) -> None:
        self._script = script
        self._local = LocalEngines(default_n_slots=default_n_slots)

    def plan(self, model: ModelConfig, budget_bytes: int) -> LoadPlan:
        return self._local.plan(model, budget_bytes)

    async def start(self, model: ModelConfig, plan: LoadPlan, on_progress: Callable[[float], None]) -> InProcessEngine:
        for rule in read_rules(self._script):
            if rule.get("model") == model.name:
                while "load_gate" in rule and not Path(rule["load_gate"]).exists():
                    await asyncio.sleep(GATE_LOOK_S)
                if "load_signal" in rule:
                    reason = _ended_by(rule["load_signal"])
                    raise EngineLoadFailed(f"Model {model.title} could not be loaded. {reason}")
                if "cannot_load" in rule:
                    raise EngineLoadFailed(rule["cannot_load"])
        on_progress(1.0)
        thinking = thinking_of(read_rules(self._script), model.name)
        return InProcessEngine(
            self._script,
            EngineLimits(model.settings.n_ctx, plan.n_slots, *thinking, PromptFormat(source="file", system="own")),
        )


def _ended_by(number: int) -> str:
    return f"The engine was ended by {signal.Signals(number).name}."
