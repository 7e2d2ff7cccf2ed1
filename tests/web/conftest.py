"""The real web application behind a real uvicorn on a free port, without a worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from llamalith_app.app import create_app
from llamalith_app.config import Config, ModelConfig

TOKEN = "a-token-of-the-tests"
Serve = Callable[[Config], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    grammars = tmp_path / "grammars"
    grammars.mkdir()
    (grammars / "yes_or_no.gbnf").write_text('root ::= "yes" | "no"\n')
    return Config(
        data_dir=tmp_path,
        api_token=TOKEN,
        models=(
            ModelConfig(name="smollm2", path=tmp_path / "absent.gguf"),
            ModelConfig(name="other", path=tmp_path / "absent.gguf"),
        ),
        redis_url=redis_url,
        database_path=database_path,
        grammar_dir=grammars,
    )


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base is the running application, with the token."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(config), log_config=None, access_log=False, timeout_graceful_shutdown=5)
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=20,
            trust_env=False,
        ) as client:
            yield client
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.fixture
async def api(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config) as client:
        yield client
