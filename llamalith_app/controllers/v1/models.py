"""The models, as OpenAI clients list them, and as llama-server's clients load and unload them."""

from __future__ import annotations

from collections.abc import Mapping

from litestar import Controller, get, post
from litestar.params import JSONBody
from msgspec import UNSET

from llamalith_app.contracts.models import Model, ModelState
from llamalith_app.contracts.openai import (
    OpenAIModel,
    OpenAIModelAsk,
    OpenAIModelAsked,
    OpenAIModelList,
    OpenAIModelStatus,
    StateWord,
)
from llamalith_app.controllers.models import NO_WORKER, ModelInPath, ask, engines
from llamalith_app.errors import UnknownModel
from llamalith_app.web.problems import NAMES_MODEL
from llamalith_app.web.request import AppRequest

UNKNOWN = 0
"""When a model was made; clients sort by it at most."""
STATES: Mapping[ModelState, StateWord] = {
    "absent": "unloaded",
    "failed": "unloaded",
    "loading": "loading",
    "loaded": "loaded",
}


class OpenAIModels(Controller):
    path = "/models"
    tags = ("OpenAI",)

    @get(summary="List the models as OpenAI does")
    async def all(self, request: AppRequest) -> OpenAIModelList:
        return OpenAIModelList(data=[_told(model) for model in await engines(request.parts)])

    @get("/{name:str}", summary="Read one model as OpenAI does")
    async def one(self, request: AppRequest, name: ModelInPath) -> OpenAIModel:
        found = next((model for model in await engines(request.parts) if model.name == name), None)
        if found is None:
            raise UnknownModel(f"There is no model {name!r} here; these are: {', '.join(request.parts.models)}")
        return _told(found)

    @post("/load", status_code=200, summary="Load a model", opt=NAMES_MODEL | {"conflict": NO_WORKER})
    async def load(self, request: AppRequest, data: JSONBody[OpenAIModelAsk]) -> OpenAIModelAsked:
        """Asks the workers to load it before a call needs it."""
        await ask(request, data.model, "load")
        return OpenAIModelAsked(success=True)

    @post(
        "/unload",
        status_code=200,
        summary="Unload a model",
        opt=NAMES_MODEL | {"conflict": f"It runs jobs, or is pinned. Or: {NO_WORKER}"},
    )
    async def unload(self, request: AppRequest, data: JSONBody[OpenAIModelAsk]) -> OpenAIModelAsked:
        """Asks the workers to free its memory. The next call for it loads it again."""
        await ask(request, data.model, "unload")
        return OpenAIModelAsked(success=True)


def _told(model: Model) -> OpenAIModel:
    status = OpenAIModelStatus(value=STATES[model.state], failed=True if model.state == "failed" else UNSET)
    return OpenAIModel(id=model.name, created=UNKNOWN, owned_by="llamalith", status=status)
