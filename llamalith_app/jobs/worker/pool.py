"""The engines of this worker: which models are loaded within the memory budget, and who has a place in them.

`reserve` never waits: a place, or nothing now. Idle engines give way to a model whose turn it is, the least
recently used first; one that works is never stopped. Knows models, slots and memory, nothing of jobs: whose turn it
is, `jobs/order.py` says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Self

import structlog

from llamalith_app.contracts.models import EngineStatus, ModelState
from llamalith_app.engine.client.local import EngineDied, EngineLoadFailed, EngineProcess
from llamalith_app.engine.gguf import BadGguf
from llamalith_app.engine.messages import LoadModel
from llamalith_app.jobs.order import ModelCapacity
from llamalith_app.jobs.worker import memory
from llamalith_app.jobs.worker.memory import MIB, Plan
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.settings.config import ModelConfig

COOLDOWN_FACTOR = 3.0
"""For so many times as long as a load took that failed, the model is not loaded again: one that cannot be loaded has at
most a quarter of the time."""
RETRY_PRELOAD_S = 60.0
"""Between tries to load a model that nobody asked for."""

log = structlog.get_logger(__name__)


class ModelTooLarge(EngineLoadFailed):
    """It can never be loaded with this budget; says how much it needs and how much is allowed."""


class PooledModel:
    """A model that has a share of the memory: loaded, being loaded, or about to be."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.since = datetime.now(UTC)
        """Wall clock: what was queued before then belongs to its turn."""
        self.n_taken = 0
        self.used_at = time.monotonic()
        self.new_until: float | None = None
        """Monotonic: so long as it took to load; None: it was not loaded yet."""
        self.preloading = False
        self.progress = 0.0
        """Of a load, from 0 to 1."""
        self.engine: EngineProcess | None = None
        self.starting: asyncio.Task[EngineProcess] | None = None
        self.loading = asyncio.Lock()

    def tell(self, progress: float) -> None:
        self.progress = progress

    @property
    def is_busy(self) -> bool:
        return self.n_taken > 0 or self.preloading or self.loading.locked()

    @property
    def is_new(self) -> bool:
        return self.new_until is None or time.monotonic() < self.new_until

    @property
    def live(self) -> EngineProcess | None:
        return None if self.engine is None or self.engine.died.is_set() else self.engine


class Failure(NamedTuple):
    """Of a load."""

    error: EngineLoadFailed
    at: float
    """Monotonic seconds."""
    took_s: float

    @property
    def rest_s(self) -> float:
        """For which the model is not loaded again: others have the engines meanwhile."""
        return max(0.0, self.at + COOLDOWN_FACTOR * self.took_s - time.monotonic())


class Pool:
    """`worker_count`: slots of a model that does not say its own; None: by cores and memory. `budget_bytes` bounds
    the estimated need of all that is loaded. `idle_unload_s`: 0 is never."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        *,
        budget_bytes: int,
        worker_count: int | None = None,
        idle_unload_s: float = 0.0,
        state_dir: str = "",
        state_max_bytes: int = 0,
        engine_argv: Sequence[str] | None = None,
    ) -> None:
        self._models = models
        self.budget_bytes = budget_bytes
        self._worker_count = worker_count
        self._idle_unload_s = idle_unload_s
        self._state_dir = state_dir
        self._state_max_bytes = state_max_bytes
        self._engine_argv = engine_argv
        self.held: dict[str, PooledModel] = {}
        self.plans: dict[str, Plan] = {}
        """Of every model, by `survey`; judged again at each load."""
        self.failures: dict[str, Failure] = {}
        """Of models whose last load failed."""
        self._ending: set[asyncio.Task[None]] = set()
        self._preloads: set[asyncio.Task[None]] = set()
        self._closed = False

    async def survey(self) -> None:
        """Reads the headers of all models, which says their slots; to be awaited before anything else."""
        for name in self._models:
            try:
                self.plans[name] = await self._plan(name)
            except BadGguf as error:
                self.plans[name] = Plan(self._worker_count or 1, 0)
                log.warning("model cannot be used", model=name, reason=str(error))
            else:
                if flaw := self.plans[name].flaw:
                    log.warning("model cannot be used", model=name, reason=flaw)

    def room(self, model: str) -> ModelCapacity:
        """What `reserve` would do for the model now."""
        held, failure = self._held(model), self.failures.get(model)
        if held is not None and held.live is not None:
            return ModelCapacity(held.plan.n_slots - held.n_taken, held.since, is_new=held.is_new)
        if failure is not None and failure.rest_s:
            return ModelCapacity(0)
        if held is not None:
            return ModelCapacity(held.plan.n_slots - held.n_taken, held.since, is_new=True)
        if self._beyond(model, self.plans[model].need_bytes):
            return ModelCapacity(1)  # to be told so
        idle, busy = self._in_the_way(model)
        # The idle ones as well: they would be at work again before the others have ended.
        return ModelCapacity(0, None, busy | frozenset(idle)) if busy else ModelCapacity(self.plans[model].n_slots)

    def rest_s(self, model: str) -> float:
        """Until a model whose load failed may be loaded again."""
        failure = self.failures.get(model)
        return 0.0 if failure is None else failure.rest_s

    def reserve(self, model: str) -> Reservation | None:
        """A place in the model's engine, or the right to load it; None: not now. Never waits."""
        if self.room(model).n_free < 1:
            return None
        held = self._held(model)
        if held is None:
            if why := self._beyond(model, self.plans[model].need_bytes):
                return Reservation(model, lambda: _refuse(why), lambda: None)
            for other in self._in_the_way(model)[0]:
                self._unload(other, "another model needs its memory")
            held = self.held[model] = PooledModel(self.plans[model])
        held.n_taken += 1
        return Reservation(model, lambda: self._loaded(model, held), lambda: self._give_back(model, held))

    def tend(self, now: float) -> None:
        """Unloads what was idle for long, and loads what is to be there; to be called now and then with the
        monotonic time."""
        for model in list(self.held):
            held, settings = self._held(model), self._models[model].settings
            idle_s = 0.0 if held is None or held.is_busy else now - held.used_at
            if 0 < self._idle_unload_s < idle_s and not settings.pinned and not settings.preload:
                self._unload(model, "idle")
        for model, chosen in self._models.items():
            failure = self.failures.get(model)
            if (
                (chosen.settings.preload and not self._closed and self._held(model) is None)
                and (failure is None or (now - failure.at > RETRY_PRELOAD_S and not failure.rest_s))
                and self.plans[model].need_bytes <= self._free(model)
            ):
                self._preload(model)

    def watch(self, seconds: float) -> None:
        """To be called every so many seconds: ends engines that have hung."""
        for held in self.held.values():
            if (engine := held.live) is not None:
                engine.watch(seconds)

    def told(self, speeds: Speeds) -> list[EngineStatus]:
        """How each model stands, for those who ask."""
        return [self._told(model, speeds) for model in self._models]

    def _told(self, model: str, speeds: Speeds) -> EngineStatus:
        held, failure = self._held(model), self.failures.get(model)
        state: ModelState = "absent" if failure is None else "failed"
        if held is not None:
            state = "loading" if held.live is None else "loaded"
        return EngineStatus(
            model=model,
            state=state,
            progress=round(held.progress, 2) if held is not None and state == "loading" else None,
            reason=str(failure.error) if failure is not None and state == "failed" else None,
            n_slots=(held.plan if held is not None else self.plans[model]).n_slots,
            n_used=held.n_taken if held is not None else 0,
            fits=held is not None or self.plans[model].need_bytes <= self._free(model),
            prompt_tokens_computed=speeds.prompt_tokens(model).computed,
            prompt_tokens_reused=speeds.prompt_tokens(model).reused,
            **speeds.of(model),
        )

    async def close(self) -> None:
        """Ends all engines, also those still loading; who waits for one, or asks again, gets EngineLoadFailed."""
        self._closed = True
        starting = [held.starting for held in self.held.values() if held.starting is not None]
        for one in starting:
            one.cancel()
        for model in list(self.held):
            self._unload(model, "this worker is ending")
        while self._ending or self._preloads:
            await asyncio.gather(*self._ending, *self._preloads, return_exceptions=True)
        await asyncio.gather(*starting, return_exceptions=True)

    def _held(self, model: str) -> PooledModel | None:
        """Forgets an engine that died without work."""
        held = self.held.get(model)
        if held is not None and held.engine is not None and held.live is None and not held.is_busy:
            del self.held[model]
            return None
        return held

    def _free(self, model: str) -> int:
        """Bytes of the budget that no other model holds."""
        return self.budget_bytes - sum(held.plan.need_bytes for name, held in self.held.items() if name != model)

    def _beyond(self, model: str, need_bytes: int) -> str:
        """Why it can never be loaded, or nothing."""
        pinned = sum(held.plan.need_bytes for name, held in self.held.items() if name != model and self._stays(name))
        allowed = self.budget_bytes - pinned
        if need_bytes <= allowed:
            return ""
        settings, n_slots = self._models[model].settings, self.plans[model].n_slots
        beside = f" beside the {_mib(pinned)} of pinned models" if pinned else ""
        return (
            f"Model {model} ({self._models[model].path}) needs about {_mib(need_bytes)} of memory with"
            f" {n_slots} slot{'' if n_slots == 1 else 's'} of {settings.n_ctx} tokens;"
            f" {_mib(max(0, allowed))} are allowed{beside} (memory_budget_mb)."
        )

    def _stays(self, model: str) -> bool:
        """For ever, as far as can be said: a load may fail still."""
        return self._models[model].settings.pinned and self.held[model].live is not None

    def _in_the_way(self, model: str) -> tuple[list[str], frozenset[str]]:
        """The idle models that have to go for this one; and if that is not enough, the busy ones as well."""
        others = [
            name for name in list(self.held) if name != model and self._held(name) is not None and not self._stays(name)
        ]
        missing = self.plans[model].need_bytes - self._free(model)
        found: dict[bool, list[str]] = {False: [], True: []}
        for name in sorted(others, key=lambda name: (self.held[name].is_busy, self.held[name].used_at)):
            if missing <= 0:
                break
            missing -= self.held[name].plan.need_bytes
            found[self.held[name].is_busy].append(name)
        return found[False], frozenset(found[True])

    def _give_back(self, model: str, held: PooledModel) -> None:
        held.n_taken -= 1
        held.used_at = time.monotonic()
        self._forget_unloaded(model, held)

    def _forget_unloaded(self, model: str, held: PooledModel) -> None:
        if not held.is_busy and held.live is None and self.held.get(model) is held:
            del self.held[model]

    def _unload(self, model: str, why: str) -> None:
        held = self.held.pop(model)
        if held.engine is None:
            return
        log.info("model unloaded", model=model, pid=held.engine.pid, why=why)
        task = asyncio.create_task(held.engine.stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _preload(self, model: str) -> None:
        held = self.held[model] = PooledModel(self.plans[model])
        held.preloading = True

        async def load() -> None:
            try:
                await self._loaded(model, held)
            except EngineLoadFailed as error:
                log.warning("model could not be preloaded", model=model, reason=str(error))
            finally:
                held.preloading = False
                self._forget_unloaded(model, held)

        task = asyncio.create_task(load())
        self._preloads.add(task)
        task.add_done_callback(self._preloads.discard)

    async def _plan(self, model: str) -> Plan:
        return await asyncio.to_thread(memory.plan, self._models[model], self._worker_count, self.budget_bytes)

    async def _loaded(self, model: str, held: PooledModel) -> EngineProcess:
        # Who asked may be gone by now, and what was held for it with it.
        if (there := self.held.setdefault(model, held)) is not held:
            return await self._loaded(model, there)
        try:
            return await self._loaded_once(model, held)
        finally:
            self._forget_unloaded(model, held)

    async def _loaded_once(self, model: str, held: PooledModel) -> EngineProcess:
        asked_at = time.monotonic()
        async with held.loading:
            if held.live is not None:
                return held.live
            failure = self.failures.get(model)
            if failure is not None and (failure.at > asked_at or failure.rest_s):
                # What this one waited for, or would only try again.
                raise type(failure.error)(str(failure.error))
            held.new_until = None
            started_at = time.monotonic()
            try:
                held.engine = await self._start(model, held)
            except EngineLoadFailed as error:
                self.failures[model] = Failure(error, time.monotonic(), time.monotonic() - started_at)
                raise
            self.failures.pop(model, None)
            held.new_until = 2 * time.monotonic() - started_at
            log.info("model loaded", model=model, pid=held.engine.pid, load_s=held.engine.loaded.load_s)
            return held.engine

    async def _start(self, model: str, held: PooledModel) -> EngineProcess:
        """The file may be another one than at the last look, so its need is judged again."""
        try:
            plan = self.plans[model] = held.plan = await self._plan(model)
        except BadGguf as error:
            raise EngineLoadFailed(f"Model {model} could not be loaded. {error}") from error
        if why := self._beyond(model, plan.need_bytes):
            raise ModelTooLarge(why)
        idle, busy = self._in_the_way(model)
        if busy:
            raise EngineLoadFailed(
                f"Model {model} needs about {_mib(plan.need_bytes)} of memory, more than when its file was last looked"
                " at, and others are at work."
            )
        for other in idle:
            self._unload(other, "another model needs its memory")
        # What gave way must be gone: its memory is what this one takes.
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._see_that_it_is_open()
        held.starting = asyncio.create_task(EngineProcess.start(self._load(model, plan), self._engine_argv, held.tell))
        try:
            engine = await held.starting
        except EngineDied as error:
            path = self._models[model].path
            raise EngineLoadFailed(f"Model {model} ({path}) could not be loaded. {error}") from error
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise EngineLoadFailed("This worker is ending.") from None
        finally:
            held.starting = None
        if self._closed:
            await engine.stop()
        self._see_that_it_is_open()
        return engine

    def _see_that_it_is_open(self) -> None:
        if self._closed:
            raise EngineLoadFailed("This worker is ending.")

    def _load(self, model: str, plan: Plan) -> LoadModel:
        chosen = self._models[model]
        return LoadModel(
            model=model,
            path=str(chosen.path),
            sha256=chosen.sha256,
            chat_format=chosen.chat_format,
            n_ctx=chosen.settings.n_ctx,
            n_slots=plan.n_slots,
            n_chunk=chosen.settings.n_chunk,
            n_threads=chosen.settings.n_threads,
            n_gpu_layers=chosen.settings.n_gpu_layers,
            state_dir=self._state_dir,
            state_max_bytes=self._state_max_bytes,
        )


class Reservation:
    """The right to run one sequence of a model; `with` gives it back."""

    def __init__(self, model: str, load: Callable[[], Awaitable[EngineProcess]], give_back: Callable[[], None]) -> None:
        self.model = model
        self._load = load
        self._give_back = give_back

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    async def engine(self) -> EngineProcess:
        """Loads the model if need be, and again if its engine died. Raises EngineLoadFailed; ModelTooLarge, if that
        is for ever."""
        return await self._load()


async def _refuse(why: str) -> EngineProcess:
    raise ModelTooLarge(why)


def _mib(n_bytes: int) -> str:
    return f"{-(-n_bytes // MIB):,} MiB"
