"""The peer: llama.cpp's own server in a process of its own, asked by its OpenAI route."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from bench.client import Answer, Message, events, http
from llamalith_app.settings.declaration import ModelSettings

START_S = 120
N_CHUNK = ModelSettings().n_chunk


class Peer:
    def __init__(self, api: httpx.AsyncClient) -> None:
        self._api = api

    @property
    def base_url(self) -> str:
        """For OpenAI clients."""
        return f"{str(self._api.base_url).rstrip('/')}/v1"

    async def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        body = {
            "messages": [message._asdict() for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        first, texts = 0.0, list[str]()
        usage: dict[str, int] = {}
        async with self._api.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _, data in events(answer):
                usage = data.get("usage") or usage
                for choice in data["choices"]:
                    if text := choice["delta"].get("content"):
                        first = first or time.perf_counter()
                        texts.append(text)
        ended = time.perf_counter()
        return Answer(
            "".join(texts),
            usage["prompt_tokens"],
            usage["completion_tokens"],
            (first or ended) - started,
            ended - started,
        )


@asynccontextmanager
async def running(
    server: Path, model: Path, log: Path, *, n_slots: int, n_ctx: int, n_threads: int
) -> AsyncIterator[Peer]:
    """Starts the peer. `server`: llama.cpp's program, see `llama_server.py`. Its batches are as large as the product's,
    and what it computed before stays in its slots alone, as with the product."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    n_batch = N_CHUNK + n_slots
    batches = ("--batch-size", n_batch, "--ubatch-size", n_batch, "--cache-ram", 0)
    sizes = ("--parallel", n_slots, "--ctx-size", n_ctx * n_slots, "--threads", n_threads, "--threads-batch", n_threads)
    with log.open("wb") as lines:
        process = await asyncio.create_subprocess_exec(
            *(str(server), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *map(str, (*sizes, *batches)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=lines,
            stderr=lines,
            # As the product gives its engine: how long idle threads spin, which costs the most where cores are shared.
            env=os.environ | {"GOMP_SPINCOUNT": "300"},
        )
    try:
        async with http(f"http://127.0.0.1:{port}") as api:
            await _wait_until_healthy(api, process, log)
            yield Peer(api)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _wait_until_healthy(api: httpx.AsyncClient, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.returncode is None:
        try:
            if (await api.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit(f"the peer did not start:\n{log.read_text()[-2000:]}")
