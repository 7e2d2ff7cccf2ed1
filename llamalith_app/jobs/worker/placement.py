"""Which models may be in memory, and how many places each has: decides by budget, use and failures, and does nothing.

Idle models give way to a model whose turn it is, the least recently used first; one that works never does. Knows
models, slots and memory, and no jobs: whose turn it is, `jobs/order.py` says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from llamalith_app.contracts import models
from llamalith_app.contracts.models import EngineStatus, ModelState
from llamalith_app.engine.client.protocol import Engine, EngineLoadFailed, LoadPlan
from llamalith_app.engine.messages import PromptFormat
from llamalith_app.jobs.order import ModelCapacity
from llamalith_app.jobs.worker.memory import MIB
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.settings.config import ModelConfig

COOLDOWN_FACTOR = 3.0
"""After a failed load the model is not loaded again for COOLDOWN_FACTOR times as long as the load took: a model that
cannot be loaded gets at most a quarter of the time."""
RETRY_PRELOAD_S = 60.0
"""Between tries to load a model that no job has asked for."""


class PooledModel:
    """A model that has a share of the memory: loaded, being loaded, or about to be."""

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self.since = datetime.now(UTC)
        """Wall clock: jobs that were queued before this belong to the model's turn."""
        self.n_taken = 0
        """Slots that reservations hold."""
        self.used_at = time.monotonic()
        self.new_until: float | None = None
        """Monotonic: as long after its load as the load took; None: it is not loaded yet."""
        self.is_preloading = False
        self.load_progress = 0.0
        """From 0 to 1."""
        self.engine: Engine | None = None
        self.starting: asyncio.Task[Engine] | None = None
        self.loading = asyncio.Lock()

    def set_load_progress(self, progress: float) -> None:
        self.load_progress = progress

    @property
    def is_busy(self) -> bool:
        return self.n_taken > 0 or self.is_preloading or self.loading.locked()

    @property
    def is_new(self) -> bool:
        return self.new_until is None or time.monotonic() < self.new_until

    @property
    def live(self) -> Engine | None:
        return None if self.engine is None or self.engine.died.is_set() else self.engine

    @property
    def n_free(self) -> int:
        return self.plan.n_slots - self.n_taken


class LoadFailure(NamedTuple):
    error: EngineLoadFailed
    at: float
    """Monotonic seconds."""
    took_s: float

    @property
    def cooldown_s(self) -> float:
        """Seconds from now for which the model is not loaded again: other models have the engines meanwhile."""
        return max(0.0, self.at + COOLDOWN_FACTOR * self.took_s - time.monotonic())


class Blockers(NamedTuple):
    """The models that must go before another one fits."""

    idle: list[str]
    """Least recently used first."""
    busy: frozenset[str]
    """Only where the idle ones are not enough."""


class Placement:
    """`budget_bytes` bounds the estimated need of all models in memory."""

    def __init__(self, models: Mapping[str, ModelConfig], budget_bytes: int) -> None:
        self._models = models
        self.budget_bytes = budget_bytes
        self.pooled: dict[str, PooledModel] = {}
        self.plans: dict[str, LoadPlan] = {}
        """Of every model; made again at each load."""
        self.failures: dict[str, LoadFailure] = {}
        """Of models whose last load failed."""

    def capacity(self, model: str) -> ModelCapacity:
        """What a reservation would get for the model now."""
        pooled, failure = self.find(model), self.failures.get(model)
        if pooled is not None and pooled.live is not None:
            return ModelCapacity(pooled.n_free, pooled.since, is_new=pooled.is_new)
        if failure is not None and failure.cooldown_s:
            return ModelCapacity(0)
        if pooled is not None:
            return ModelCapacity(pooled.n_free, pooled.since, is_new=True)
        if self.why_too_large(model):
            return ModelCapacity(1)  # for one job, which fails with the reason
        blockers = self.blockers(model)
        if blockers.busy:
            # The idle ones as well: they would be at work again before the others have ended.
            return ModelCapacity(0, None, blockers.busy | frozenset(blockers.idle))
        return ModelCapacity(self.plans[model].n_slots)

    def cooldown_s(self, model: str) -> float:
        """Seconds until a model whose load failed may be loaded again; 0: it may."""
        failure = self.failures.get(model)
        return 0.0 if failure is None else failure.cooldown_s

    def find(self, model: str) -> PooledModel | None:
        """The model if it has a share of the memory; one whose engine died without work has none any more."""
        pooled = self.pooled.get(model)
        if pooled is not None and pooled.engine is not None and pooled.live is None and not pooled.is_busy:
            del self.pooled[model]
            return None
        return pooled

    def forget_unloaded(self, model: str, pooled: PooledModel) -> None:
        """Takes the share of a model that is not loaded and that nobody uses."""
        if not pooled.is_busy and pooled.live is None and self.pooled.get(model) is pooled:
            del self.pooled[model]

    def why_too_large(self, model: str) -> str:
        """Why the model can never be loaded, a sentence for people; empty: it can."""
        pinned_bytes = sum(
            pooled.plan.need_bytes for name, pooled in self.pooled.items() if name != model and self._is_kept(name)
        )
        allowed_bytes = self.budget_bytes - pinned_bytes
        need_bytes, n_slots = self.plans[model].need_bytes, self.plans[model].n_slots
        if need_bytes <= allowed_bytes:
            return ""
        chosen = self._models[model]
        beside = f" beside the {_mib(pinned_bytes)} of pinned models" if pinned_bytes else ""
        return (
            f"Model {chosen.title} needs about {_mib(need_bytes)} of memory with"
            f" {n_slots} slot{'' if n_slots == 1 else 's'} of {chosen.settings.n_ctx} tokens;"
            f" {_mib(max(0, allowed_bytes))} are allowed{beside} (memory_budget_mb)."
        )

    def why_not_now(self, model: str) -> str:
        """Why the model cannot be loaded now though it was given a place; empty: it can."""
        if not self.blockers(model).busy:
            return ""
        return (
            f"Model {model} needs about {_mib(self.plans[model].need_bytes)} of memory, more than when its file was"
            " last looked at, and others are at work."
        )

    def blockers(self, model: str) -> Blockers:
        others = [
            name
            for name in list(self.pooled)
            if name != model and self.find(name) is not None and not self._is_kept(name)
        ]
        missing_bytes = self.plans[model].need_bytes - self._free_bytes(model)
        idle: list[str] = []
        busy: list[str] = []
        for name in sorted(others, key=lambda name: (self.pooled[name].is_busy, self.pooled[name].used_at)):
            if missing_bytes <= 0:
                break
            missing_bytes -= self.pooled[name].plan.need_bytes
            (busy if self.pooled[name].is_busy else idle).append(name)
        return Blockers(idle, frozenset(busy))

    def is_idle_for_long(self, model: str, now: float, idle_unload_s: float) -> bool:
        """`now`: monotonic. `idle_unload_s`: 0 is never."""
        pooled, settings = self.find(model), self._models[model].settings
        idle_s = 0.0 if pooled is None or pooled.is_busy else now - pooled.used_at
        return 0 < idle_unload_s < idle_s and not settings.pinned and not settings.preload

    def may_preload(self, model: str, now: float) -> bool:
        """Whether the model is to be loaded without a job; `now`: monotonic."""
        failure = self.failures.get(model)
        return (
            self._models[model].settings.preload
            and self.find(model) is None
            and (failure is None or (now - failure.at > RETRY_PRELOAD_S and not failure.cooldown_s))
            and self._fits_beside_others(model)
        )

    def status(self, model: str, speeds: Speeds) -> EngineStatus:
        pooled, failure = self.find(model), self.failures.get(model)
        state: ModelState = "absent" if failure is None else "failed"
        if pooled is not None:
            state = "loading" if pooled.live is None else "loaded"
        limits = None if pooled is None or pooled.live is None else pooled.live.limits
        return EngineStatus(
            model=model,
            state=state,
            progress=round(pooled.load_progress, 2) if pooled is not None and state == "loading" else None,
            reason=str(failure.error) if failure is not None and state == "failed" else None,
            n_slots=(pooled.plan if pooled is not None else self.plans[model]).n_slots,
            n_used=pooled.n_taken if pooled is not None else 0,
            fits=pooled is not None or self._fits_beside_others(model),
            memory_bytes=(pooled.plan if pooled is not None else self.plans[model]).need_bytes,
            prompt_tokens_computed=speeds.prompt_tokens(model).computed,
            prompt_tokens_reused=speeds.prompt_tokens(model).reused,
            prompt_format=None if limits is None or limits.format is None else _told(limits.format),
            reasoning="" if limits is None else limits.family,
            **speeds.averages(model),
        )

    def _fits_beside_others(self, model: str) -> bool:
        return self.plans[model].need_bytes <= self._free_bytes(model)

    def _free_bytes(self, model: str) -> int:
        """Of the budget, what no other model has."""
        return self.budget_bytes - sum(pooled.plan.need_bytes for name, pooled in self.pooled.items() if name != model)

    def _is_kept(self, model: str) -> bool:
        """Pinned and loaded. A pinned model that is only being loaded is not kept: its load may fail."""
        return self._models[model].settings.pinned and self.pooled[model].live is not None


def _told(found: PromptFormat) -> models.PromptFormat:
    return msgspec.convert(found, models.PromptFormat, from_attributes=True)


def _mib(n_bytes: int) -> str:
    return f"{-(-n_bytes // MIB):,} MiB"
