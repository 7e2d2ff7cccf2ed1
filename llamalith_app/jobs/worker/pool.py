"""The engines of this worker: loads and unloads models, and gives places in them.

`reserve` never waits: a place, or nothing now. What may be loaded, `placement.py` decides; how, the engine's factory
knows. Knows no jobs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Self

import structlog

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.engine.client.protocol import Engine, EngineFactory, EngineLoadFailed, LoadPlan
from llamalith_app.jobs.order import ModelCapacity
from llamalith_app.jobs.worker.placement import LoadFailure, Placement, PooledModel
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.jobs.worker.tasks import TaskSet
from llamalith_app.settings.config import ModelConfig

MAKES_ROOM = "another model needs its memory"
ENDING = "This worker is ending."

log = structlog.get_logger(__name__)


class ModelTooLarge(EngineLoadFailed):
    """It can never be loaded with this budget; says how much it needs and how much is allowed."""


class Reservation:
    """The right to run one sequence of a model; `with` releases it."""

    def __init__(self, model: str, load: Callable[[], Awaitable[Engine]], release: Callable[[], None]) -> None:
        self.model = model
        self._load = load
        self._release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    async def engine(self) -> Engine:
        """Loads the model if need be, and again if its engine died. Raises EngineLoadFailed; ModelTooLarge, if that
        is for ever."""
        return await self._load()


class Pool:
    """`budget_bytes` bounds the estimated need of all that is loaded. `idle_unload_s`: 0 is never."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        engines: EngineFactory,
        *,
        budget_bytes: int,
        idle_unload_s: float = 0.0,
    ) -> None:
        self._models = models
        self._engines = engines
        self._placement = Placement(models, budget_bytes)
        self._idle_unload_s = idle_unload_s
        self._ending = TaskSet()
        self._preloads = TaskSet()
        self._held_out: set[str] = set()
        """Unloaded by `unload`, and not to be preloaded until `load` or a job asks for them."""
        self._is_closed = False

    @property
    def pooled(self) -> Mapping[str, PooledModel]:
        """The models that have a share of the memory, by name."""
        return self._placement.pooled

    @property
    def failures(self) -> dict[str, LoadFailure]:
        return self._placement.failures

    @property
    def plans(self) -> Mapping[str, LoadPlan]:
        return self._placement.plans

    async def survey(self) -> None:
        """Plans every model, which says its slots; to be awaited before anything else."""
        for name in self._models:
            plan = self._placement.plans[name] = await self._plan(name)
            if plan.problem:
                log.warning("model cannot be used", model=name, reason=plan.problem)

    def capacity(self, model: str) -> ModelCapacity:
        """What `reserve` would do for the model now."""
        return self._placement.capacity(model)

    def cooldown_s(self, model: str) -> float:
        """Seconds until a model whose load failed may be loaded again."""
        return self._placement.cooldown_s(model)

    def reserve(self, model: str) -> Reservation | None:
        """A place in the model's engine, or the right to load it; None: not now. Never waits."""
        if self.capacity(model).n_free < 1:
            return None
        pooled = self._placement.find(model)
        if pooled is None:
            if why := self._placement.why_too_large(model):
                return Reservation(model, lambda: _refuse(why), lambda: None)
            self._give_way(model)
            pooled = self._add(model)
        pooled.n_taken += 1
        return Reservation(model, lambda: self._loaded(model, pooled), lambda: self._release(model, pooled))

    def tend(self, now: float) -> None:
        """Unloads models that were idle for long, and loads those to be preloaded; to be called now and then with the
        monotonic time."""
        for model in list(self.pooled):
            if self._placement.is_idle_for_long(model, now, self._idle_unload_s):
                self._unload(model, "idle")
        for model in self._models:
            if not self._is_closed and model not in self._held_out and self._placement.may_preload(model, now):
                self._start_preload(model)

    def load(self, model: str) -> bool:
        """Begins to load the model without a job, if it finds room as a job would. True: it is loaded or being loaded,
        or can never be, which its status says."""
        if self._placement.find(model) is not None:
            return True
        if why := self._placement.why_too_large(model):
            self.failures[model] = LoadFailure(ModelTooLarge(why), time.monotonic(), 0.0)
            return True
        if self._is_closed or self.capacity(model).n_free < 1:
            return False
        self._give_way(model)
        self._start_preload(model)
        return True

    def unload(self, model: str) -> bool:
        """Unloads the model if it is idle and not pinned; the next job loads it again. True: it is not loaded now."""
        pooled = self._placement.find(model)
        if pooled is None:
            return True
        if pooled.is_busy or self._models[model].settings.pinned:
            return False
        self._held_out.add(model)
        self._unload(model, "a person asked for it")
        return True

    def watch(self, elapsed_s: float) -> None:
        """To be called every `elapsed_s` seconds: ends engines that have hung."""
        for pooled in self.pooled.values():
            if (engine := pooled.live) is not None:
                engine.watch(elapsed_s)

    def statuses(self, speeds: Speeds) -> list[EngineStatus]:
        """How each model stands in this worker."""
        return [self._placement.status(model, speeds) for model in self._models]

    async def close(self) -> None:
        """Ends all engines, also those still loading; whoever waits for an engine, or asks again, gets
        EngineLoadFailed."""
        self._is_closed = True
        starting = [pooled.starting for pooled in self.pooled.values() if pooled.starting is not None]
        for start in starting:
            start.cancel()
        for model in list(self.pooled):
            self._unload(model, "this worker is ending")
        while not (await self._preloads.all_end() and await self._ending.all_end()):
            pass
        await asyncio.gather(*starting, return_exceptions=True)

    def _give_way(self, model: str) -> None:
        for other in self._placement.blockers(model).idle:
            self._unload(other, MAKES_ROOM)

    def _start_preload(self, model: str) -> None:
        pooled = self._add(model)
        pooled.is_preloading = True
        self._preloads.start(self._preload(model, pooled))

    def _add(self, model: str) -> PooledModel:
        self._held_out.discard(model)
        pooled = self._placement.pooled[model] = PooledModel(self.plans[model])
        return pooled

    def _release(self, model: str, pooled: PooledModel) -> None:
        pooled.n_taken -= 1
        pooled.used_at = time.monotonic()
        self._placement.forget_unloaded(model, pooled)

    def _unload(self, model: str, why: str) -> None:
        pooled = self._placement.pooled.pop(model)
        if pooled.engine is None:
            return
        log.info("model unloaded", model=model, pid=pooled.engine.pid, why=why)
        self._ending.start(pooled.engine.stop())

    async def _preload(self, model: str, pooled: PooledModel) -> None:
        try:
            await self._loaded(model, pooled)
        except EngineLoadFailed as error:
            log.warning("model could not be preloaded", model=model, reason=str(error))
        finally:
            pooled.is_preloading = False
            self._placement.forget_unloaded(model, pooled)

    async def _plan(self, model: str) -> LoadPlan:
        return await asyncio.to_thread(self._engines.plan, self._models[model], self._placement.budget_bytes)

    async def _loaded(self, model: str, pooled: PooledModel) -> Engine:
        # The reservation may be released by now, and the model's share with it.
        if (current := self._placement.pooled.setdefault(model, pooled)) is not pooled:
            return await self._loaded(model, current)
        try:
            return await self._load_or_share(model, pooled)
        finally:
            self._placement.forget_unloaded(model, pooled)

    async def _load_or_share(self, model: str, pooled: PooledModel) -> Engine:
        """One load at a time; whoever waited for it shares what came of it."""
        asked_at = time.monotonic()
        async with pooled.loading:
            if pooled.live is not None:
                return pooled.live
            failure = self.failures.get(model)
            if failure is not None and (failure.at > asked_at or failure.cooldown_s):
                raise type(failure.error)(str(failure.error))
            pooled.new_until = None
            started_at = time.monotonic()
            try:
                pooled.engine = await self._start(model, pooled)
            except EngineLoadFailed as error:
                self.failures[model] = LoadFailure(error, time.monotonic(), time.monotonic() - started_at)
                raise
            self.failures.pop(model, None)
            pooled.new_until = 2 * time.monotonic() - started_at
            self._log_load(model, pooled.engine)
            return pooled.engine

    def _log_load(self, model: str, engine: Engine) -> None:
        found = engine.limits.format
        told = {} if found is None else {"prompt_format": f"{found.source} {found.name}".strip()}
        log.info("model loaded", model=model, pid=engine.pid, load_s=engine.load_s, **told)
        if found is not None and found.source == "guess":
            log.warning(
                "the file has no chat template, and how the model's prompts are written is a guess; model_formats says"
                " it, or a file that has a template",
                model=model,
                guess=found.name,
            )

    async def _start(self, model: str, pooled: PooledModel) -> Engine:
        await self._make_room(model, pooled)
        self._refuse_when_closed()
        starting = self._engines.start(self._models[model], pooled.plan, pooled.set_load_progress)
        pooled.starting = asyncio.create_task(starting)
        try:
            engine = await pooled.starting
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
            raise EngineLoadFailed(ENDING) from None
        finally:
            pooled.starting = None
        if self._is_closed:
            await engine.stop()
        self._refuse_when_closed()
        return engine

    async def _make_room(self, model: str, pooled: PooledModel) -> None:
        """Plans the model again, since its file may have changed; returns once its memory is
        free."""
        plan = await self._plan(model)
        if plan.is_refused:
            raise EngineLoadFailed(f"Model {model} could not be loaded. {plan.problem}")
        self._placement.plans[model] = pooled.plan = plan
        if why := self._placement.why_too_large(model):
            raise ModelTooLarge(why)
        if why := self._placement.why_not_now(model):
            raise EngineLoadFailed(why)
        self._give_way(model)
        await self._ending.all_end()

    def _refuse_when_closed(self) -> None:
        if self._is_closed:
            raise EngineLoadFailed(ENDING)


async def _refuse(why: str) -> Engine:
    raise ModelTooLarge(why)
