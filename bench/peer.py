"""The peer: llama.cpp's own server in a process of its own, asked by its OpenAI route."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from bench.client import Answer, Message, events, http

SCRIPT = Path(__file__).with_name("peer_server.py")


class Peer:
    def __init__(self, api: httpx.AsyncClient) -> None:
        self._api = api

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
    python: Path, model: Path, log: Path, *, n_slots: int, n_ctx: int, n_threads: int
) -> AsyncIterator[Peer]:
    """Starts the peer. `python`: the interpreter of the environment that has xllamacpp."""
    with log.open("wb") as lines:
        process = await asyncio.create_subprocess_exec(
            *(str(python), str(SCRIPT), str(model), str(n_slots), str(n_ctx), str(n_threads)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=lines,
            # As the product gives its engine: how long idle threads spin, which costs the most where cores are shared.
            env=os.environ | {"GOMP_SPINCOUNT": "300"},
        )
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both are pipes")
    url = (await asyncio.wait_for(process.stdout.readline(), 120)).decode().strip()
    if not url:
        raise SystemExit(f"the peer did not start:\n{log.read_text()[-2000:]}")
    try:
        async with http(url) as api:
            yield Peer(api)
    finally:
        process.stdin.close()
        process.kill()
        await process.wait()
