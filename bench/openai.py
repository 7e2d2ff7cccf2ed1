"""OpenAI's Python package as the client of both servers: tokens a second, and the time to the first token.

    .venv/bin/python -m bench.openai [--pairs 5] [--peer .venv-bench/llama-server/bin/llama-server]

The peer is llama.cpp's own server, built from the sources of the product's own engine (`llama_server.py`). Alike on
both sides: the GGUF file, 16 slots of 2,048 tokens, the size of batches, no cache but the slots, as many threads as
there are cores, greedy sampling, the prompts, of which none is asked twice, and the client. A reply ends where a model
ends it, at the latest after so many tokens. The product keeps its numbers in bf16 where the processor multiplies that,
the peer in f16, its default. The product stores each call as a job before it runs, and each reply as it ends. Both
servers stand all the time; they take turns, A B A B …
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench import peer, product, prompts
from bench.client import Message
from bench.run import bundled_model
from bench.table import Row, alternate, compared, render

CLIENTS = Path(sys.prefix) / "clients"
N_SLOTS, N_CTX = 16, 2048
LEVELS = {1: 4, 4: 12, 8: 16, 16: 32}
"""Streams at once -> calls in one round."""
MAX_TOKENS = 64
SHARED_CALLS, SHARED_MAX_TOKENS = 32, 32
N_OPEN, OPEN_MAX_TOKENS = 200, 16


class Round(NamedTuple):
    tokens_a_second: float
    first_s: list[float]
    """Of each call: from its start to its first text."""


class Client:
    """Asks one server by OpenAI's package."""

    def __init__(self, base_url: str, key: str) -> None:
        if str(CLIENTS) not in sys.path:
            # Behind everything else: only the client is wanted from there.
            sys.path.append(str(CLIENTS))
        openai = importlib.import_module("openai")
        # The peer closes idle connections after 5 s, while it is the other's turn: each call has one of its own.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=600, limits=limits)
        self._client: Any = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, http_client=http)

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], max_tokens: int) -> tuple[int, float]:
        """Tokens of the reply, and seconds to its first text."""
        started, first, n_tokens = time.perf_counter(), 0.0, 0
        stream = await self._client.chat.completions.create(
            model="smollm2",
            messages=[message._asdict() for message in messages],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter()
            if chunk.usage is not None:
                n_tokens = chunk.usage.completion_tokens
        if not n_tokens:
            raise SystemExit("a stream ended without telling its tokens")
        return n_tokens, (first or time.perf_counter()) - started


async def at_once(client: Client, asked: Sequence[Sequence[Message]], n_at_once: int, max_tokens: int) -> Round:
    places = asyncio.Semaphore(n_at_once)

    async def one(messages: Sequence[Message]) -> tuple[int, float]:
        async with places:
            return await client.ask(messages, max_tokens)

    started = time.perf_counter()
    answers = await asyncio.gather(*map(one, asked))
    seconds = time.perf_counter() - started
    return Round(sum(n_tokens for n_tokens, _ in answers) / seconds, [first for _, first in answers])


async def levels(clients: dict[str, Client], n_pairs: int) -> list[Row]:
    rows = []
    for level, n_calls in LEVELS.items():

        async def one(client: Client, pair: int, level: int = level, n_calls: int = n_calls) -> Round:
            return await at_once(client, prompts.short(f"openai-{level}-{pair}", n_calls), level, MAX_TOKENS)

        seen = await alternate(n_pairs, {name: partial(one, client) for name, client in clients.items()})
        rates, firsts = of(seen)
        what = f"{level} stream{'' if level == 1 else 's'} at once, short prompts, {MAX_TOKENS} out"
        rows += [
            compared("tokens", what, rates["peer"], rates["product"], unit="tok/s", better="more", goal=1.0),
            compared("first text", what, firsts["peer"], firsts["product"], unit="ms", better="less", goal=1.1),
        ]
        show(rows[-2:])
    return rows


async def shared_prompt(clients: dict[str, Client], n_pairs: int) -> list[Row]:
    async def one(client: Client, pair: int) -> Round:
        asked = prompts.with_system(f"openai-shared-{pair}", SHARED_CALLS)
        return await at_once(client, asked, N_SLOTS, SHARED_MAX_TOKENS)

    seen = await alternate(n_pairs, {name: partial(one, client) for name, client in clients.items()})
    rates, firsts = of(seen)
    what = f"{SHARED_CALLS} calls, {N_SLOTS} at once, one new system prompt of 400 tokens, {SHARED_MAX_TOKENS} out"
    rows = [
        compared("tokens", what, rates["peer"], rates["product"], unit="tok/s", better="more", goal=2.0),
        compared("first text", what, firsts["peer"], firsts["product"], unit="ms", better="less", goal=1.1),
    ]
    show(rows)
    return rows


async def many_open(clients: dict[str, Client], n_pairs: int) -> list[Row]:
    async def one(client: Client, pair: int) -> Round:
        n = N_OPEN + N_SLOTS
        return await at_once(client, prompts.short(f"openai-open-{pair}", n), n, OPEN_MAX_TOKENS)

    seen = await alternate(n_pairs, {name: partial(one, client) for name, client in clients.items()})
    rates, firsts = of(seen)
    what = f"{N_OPEN + N_SLOTS} streams open at once, {N_OPEN} of them waiting, {OPEN_MAX_TOKENS} out"
    rows = [
        compared("tokens", what, rates["peer"], rates["product"], unit="tok/s", better="more", goal=1.0),
        compared("first text", what, firsts["peer"], firsts["product"], unit="ms", better="less", goal=1.1),
    ]
    show(rows)
    return rows


def of(seen: dict[str, list[Round]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By contender: tokens a second of each round, and the median of its times to the first text, in milliseconds."""
    rates = {name: [one.tokens_a_second for one in rounds] for name, rounds in seen.items()}
    firsts = {name: [1000 * statistics.median(one.first_s) for one in rounds] for name, rounds in seen.items()}
    return rates, firsts


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        print(" | ".join(filter(None, row[:-1])), flush=True)


def config(n_threads: int) -> dict[str, Any]:
    return {
        "model_settings": {"smollm2": product.GREEDY | {"n_ctx": N_CTX, "n_threads": n_threads}},
        "worker_settings": {"worker_count": N_SLOTS},
        "state_cache_mb": 0,
    }


async def measure(folder: Path, server: Path, n_pairs: int) -> list[Row]:
    n_threads = len(os.sched_getaffinity(0))
    sizes = {"n_slots": N_SLOTS, "n_ctx": N_CTX, "n_threads": n_threads}
    async with (
        product.running(folder / "product", config(n_threads)) as ours,
        peer.running(server, bundled_model(), folder / "peer.log", **sizes) as theirs,
    ):
        clients = {"peer": Client(theirs.base_url, "none"), "product": Client(*ours.openai)}
        for client in clients.values():
            await client.ask(prompts.short("warm", 1)[0], 8)
        rows = [
            *await levels(clients, n_pairs),
            *await shared_prompt(clients, n_pairs),
            *await many_open(clients, max(1, n_pairs // 2)),
        ]
        for client in clients.values():
            await client.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer", type=Path, default=Path(".venv-bench/llama-server/bin/llama-server"))
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llamalith-bench-") as folder:
        rows = asyncio.run(measure(Path(folder), options.peer, options.pairs))
    took = time.perf_counter() - started
    print(f"\n{options.pairs} pairs, {took:.0f} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end\n")
    print(render(rows))


if __name__ == "__main__":
    main()
