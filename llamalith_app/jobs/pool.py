"""The engines of this worker: which model is loaded, and who has a place in it.

Holds one model at a time; a place for another one is given when nobody has a place, and its engine then replaces
the old. Knows models and slots, nothing of jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Self

import structlog

from llamalith_app.config import ModelConfig
from llamalith_app.engine.messages import Load
from llamalith_app.engine.process import EngineDied, EngineLoadFailed, EngineProcess

log = structlog.get_logger(__name__)


class Pool:
    def __init__(
        self, models: Mapping[str, ModelConfig], n_slots: int, engine_argv: Sequence[str] | None = None
    ) -> None:
        self._models = models
        self._n_slots = n_slots
        self._engine_argv = engine_argv
        self._model: str | None = None
        self._n_taken = 0
        self._engine: EngineProcess | None = None
        self._starting: asyncio.Task[EngineProcess] | None = None
        self._closed = False
        self._loading = asyncio.Lock()

    @property
    def model(self) -> str | None:
        """The one that is loaded or being loaded."""
        return self._model

    def n_free(self, model: str) -> int:
        """Places that `reserve` would give for the model now."""
        return self._n_slots - self._n_taken if not self._n_taken or model == self._model else 0

    def reserve(self, model: str) -> Place | None:
        """A place in the model's engine, or the right to load it; None: not now. Never waits."""
        if self._n_taken and (model != self._model or self._n_taken >= self._n_slots):
            return None
        self._model = model
        self._n_taken += 1
        return Place(model, self._loaded, self._give_back)

    async def close(self) -> None:
        """Ends the engine, also one that is still loading; what waits for it, or asks again, gets EngineLoadFailed."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
        await self._end_engine()

    async def _end_engine(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
            self._engine = None

    def _give_back(self) -> None:
        self._n_taken -= 1

    async def _loaded(self, model: str) -> EngineProcess:
        async with self._loading:
            engine = self._engine
            if engine is not None and engine.model == model and not engine.died.is_set():
                return engine
            await self._end_engine()
            if self._closed:
                raise EngineLoadFailed("This worker is ending.")
            self._starting = asyncio.create_task(EngineProcess.start(self._load(model), self._engine_argv))
            try:
                self._engine = await self._starting
            except EngineDied as error:
                path = self._models[model].path
                raise EngineLoadFailed(f"Model {model} ({path}) could not be loaded. {error}") from error
            except asyncio.CancelledError:
                if not self._closed:
                    raise
                raise EngineLoadFailed("This worker is ending.") from None
            finally:
                self._starting = None
            log.info("model loaded", model=model, pid=self._engine.pid, load_s=self._engine.loaded.load_s)
            return self._engine

    def _load(self, model: str) -> Load:
        chosen = self._models[model]
        return Load(
            model=model,
            path=str(chosen.path),
            sha256=chosen.sha256,
            chat_format=chosen.chat_format,
            n_ctx=chosen.settings.n_ctx,
            n_slots=self._n_slots,
            n_chunk=chosen.settings.n_chunk,
            n_threads=chosen.settings.n_threads,
            n_gpu_layers=chosen.settings.n_gpu_layers,
        )


class Place:
    """The right to run one sequence of a model; `with` gives it back."""

    def __init__(self, model: str, load: Callable[[str], Awaitable[EngineProcess]], free: Callable[[], None]) -> None:
        self.model = model
        self._load = load
        self._free = free

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._free()

    async def engine(self) -> EngineProcess:
        """Loads the model if need be, and again if its engine died. Raises EngineLoadFailed."""
        return await self._load(self.model)
