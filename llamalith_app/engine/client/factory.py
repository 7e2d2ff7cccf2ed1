"""Plans and starts the engines of a worker: each model is a file that a child process loads.

Knows which settings of a model the child gets. Does not know when a model is loaded, and for which job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llamalith_app.engine.client.local import DEFAULT_TIMINGS, LocalEngine, LocalTimings
from llamalith_app.engine.client.plan import plan_file
from llamalith_app.engine.client.protocol import Engine, EngineDied, EngineLoadFailed, LoadPlan
from llamalith_app.engine.gguf import BadGguf
from llamalith_app.engine.messages import LoadModel
from llamalith_app.settings.config import ModelConfig


class LocalEngines:
    """`default_n_slots`: of a model whose settings do not say; None: by cores and memory. `state_dir`: folder for what
    slots held; empty: nothing is kept. `argv`: the command of the child; None: the real engine."""

    def __init__(
        self,
        *,
        default_n_slots: int | None = None,
        state_dir: str = "",
        state_max_bytes: int = 0,
        argv: Sequence[str] | None = None,
        timings: LocalTimings = DEFAULT_TIMINGS,
    ) -> None:
        self._default_n_slots = default_n_slots
        self._state_dir = state_dir
        self._state_max_bytes = state_max_bytes
        self._argv = argv
        self._timings = timings

    def plan(self, model: ModelConfig, budget_bytes: int) -> LoadPlan:
        if model.path is None:
            return self._refused("It has no file.")
        try:
            return plan_file(model.path, model.settings, self._default_n_slots, budget_bytes)
        except BadGguf as error:
            return self._refused(str(error))

    async def start(self, model: ModelConfig, plan: LoadPlan, on_progress: Callable[[float], None]) -> Engine:
        load = LoadModel(
            model=model.name,
            path=str(model.path),
            sha256=model.sha256,
            chat_format=model.chat_format,
            n_ctx=model.settings.n_ctx,
            n_slots=plan.n_slots,
            n_chunk=model.settings.n_chunk,
            n_threads=model.settings.n_threads,
            n_gpu_layers=model.settings.n_gpu_layers,
            reasoning=model.settings.reasoning,
            parse_special_in_content=model.settings.parse_special_in_content,
            state_dir=self._state_dir,
            state_max_bytes=self._state_max_bytes,
        )
        try:
            return await LocalEngine.start(load, self._argv, on_progress=on_progress, timings=self._timings)
        except EngineDied as error:
            raise EngineLoadFailed(f"Model {model.title} could not be loaded. {error}") from error

    def _refused(self, problem: str) -> LoadPlan:
        return LoadPlan(self._default_n_slots or 1, 0, problem, is_refused=True)
