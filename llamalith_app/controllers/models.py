"""The configured models, and their state in the workers."""

from __future__ import annotations

import asyncio

from litestar import Controller, get

from llamalith_app.contracts.models import EngineStatus, Model, ModelList
from llamalith_app.settings.config import ModelConfig
from llamalith_app.web.request import AppRequest, Parts


class Models(Controller):
    path = "/models"
    tags = ("Models",)

    @get(summary="List the models, and how they stand")
    async def all(self, request: AppRequest) -> ModelList:
        return ModelList(models=await engines(request.parts))


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
    )
