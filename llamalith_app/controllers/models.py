"""The configured models, and their state in the workers."""

from __future__ import annotations

import asyncio
from typing import Annotated

from litestar import Controller, get, post
from litestar.params import PathParameter

from llamalith_app.contracts.models import EngineStatus, Model, ModelAsked, ModelList
from llamalith_app.contracts.text import MAX_NAME
from llamalith_app.errors import NotFound, NotNow
from llamalith_app.jobs import wishes
from llamalith_app.jobs.wishes import WishWord
from llamalith_app.settings.config import ModelConfig
from llamalith_app.web.request import AppRequest, Parts

ModelInPath = Annotated[
    str,
    PathParameter(min_length=1, max_length=MAX_NAME, description="A model's name, percent-encoded (a slash is %2F)."),
]

NO_WORKER = "No worker is there that could do it."


class Models(Controller):
    path = "/models"
    tags = ("Models",)

    @get(summary="List the models, and how they stand")
    async def all(self, request: AppRequest) -> ModelList:
        return ModelList(models=await engines(request.parts))

    @post("/{name:str}/load", status_code=202, summary="Load a model", opt={"conflict": NO_WORKER})
    async def load(self, request: AppRequest, name: ModelInPath) -> ModelAsked:
        """Asks the workers to load it before a job needs it. Other models that are idle give way, as for a job."""
        await request.takes_only()
        return await ask(request, name, "load")

    @post(
        "/{name:str}/unload",
        status_code=202,
        summary="Unload a model",
        opt={"conflict": f"It runs jobs, or is pinned. Or: {NO_WORKER}"},
    )
    async def unload(self, request: AppRequest, name: ModelInPath) -> ModelAsked:
        """Asks the workers to free its memory. Not while it runs a job, and not a pinned one; the next job for it loads
        it again."""
        await request.takes_only()
        return await ask(request, name, "unload")


async def ask(request: AppRequest, name: str, word: WishWord) -> ModelAsked:
    """Raises NotFound, NotNow and RedisUnavailable."""
    model = next((model for model in await engines(request.parts) if model.name == name), None)
    if model is None:
        raise NotFound("There is no such model.")
    if not model.slots:
        raise NotNow(NO_WORKER)
    if word == "unload" and model.pinned:
        raise NotNow("The model is pinned: once loaded, it stays (model_settings).")
    if word == "unload" and model.slots_used:
        raise NotNow("The model runs jobs. Wait until they end, or cancel them.")
    await wishes.put(request.parts.redis, request.parts.record, name, word)
    return ModelAsked(ok=True, model=name)


async def engines(parts: Parts) -> list[Model]:
    """Each configured model: its file, state over all workers, and queued jobs. Raises StorageUnavailable."""
    board = await parts.forecasts.board()
    sizes = await asyncio.to_thread(lambda: [_size(model) for model in parts.model_configs])
    return [
        _model(chosen, size, board.engines.get(chosen.name), board.queued.get(chosen.name, 0))
        for chosen, size in zip(parts.model_configs, sizes, strict=True)
    ]


def _size(model: ModelConfig) -> int | None:
    if model.path is None:
        return None
    try:
        return model.path.stat().st_size
    except OSError:
        return None


def _model(chosen: ModelConfig, size_bytes: int | None, status: EngineStatus | None, queued: int) -> Model:
    status = status or EngineStatus(model=chosen.name, state="absent", n_slots=0)
    return Model(
        name=chosen.name,
        file="" if chosen.path is None else str(chosen.path),
        size_bytes=size_bytes,
        n_ctx=chosen.settings.n_ctx,
        format=chosen.chat_format,
        state=status.state,
        progress=status.progress,
        reason=status.reason,
        slots=status.n_slots,
        slots_used=status.n_used,
        tokens_per_s=status.tokens_per_s,
        prompt_tokens_per_s=status.prompt_tokens_per_s,
        prompt_tokens_computed=status.prompt_tokens_computed,
        prompt_tokens_reused=status.prompt_tokens_reused,
        queued=queued,
        memory_bytes=status.memory_bytes or None,
        pinned=chosen.settings.pinned,
        prompt_format=status.prompt_format,
        reasoning=status.reasoning or None,
    )
