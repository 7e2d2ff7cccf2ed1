"""Real OpenAI clients against a real web application and a real worker, with engines that follow a script."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import ModelSettings
from tests.web.conftest import TOKEN, make_config, serving
from tests.worker.conftest import Script, working_in_process

CLIENTS = Path(sys.prefix) / "clients"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script.json")


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str, request: pytest.FixtureRequest) -> Config:
    """A test that wants another grace is parametrized with its seconds."""
    config = make_config(tmp_path, database_path, redis_url)
    model = msgspec.structs.replace(config.models[0], settings=ModelSettings(max_tokens=1000))
    return msgspec.structs.replace(config, models=(model,), n_slots=4, v1_grace_s=getattr(request, "param", 60.0))


@pytest.fixture
async def api(config: Config, script: Script) -> AsyncIterator[httpx.AsyncClient]:
    """With a worker."""
    async with serving(config) as api, working_in_process(config, script):
        yield api


@pytest.fixture(scope="session")
def openai() -> Any:
    """OpenAI's own package."""
    # Behind everything that the product imports.
    sys.path.append(str(CLIENTS))
    return importlib.import_module("openai")


def openai_client(openai: Any, api: httpx.AsyncClient, timeout: float = 20, **more: Any) -> Any:
    return openai.AsyncOpenAI(
        base_url=f"{api.base_url}/v1",
        api_key=TOKEN,
        # Without what this machine's environment says of proxies.
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False, verify=False, timeout=timeout),
        **more,
    )


@pytest.fixture
async def client(openai: Any, api: httpx.AsyncClient) -> AsyncIterator[Any]:
    async with openai_client(openai, api) as client:
        yield client
