"""What both servers are asked alike: one prompt, its answer with its times, and many of them at once.

Owns the clock of every figure that compares. Knows no server's routes: peer.py and product.py do.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

import httpx


class Message(NamedTuple):
    role: str
    content: str


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    tokens: int
    """Really written, as the server counts them."""
    first_s: float
    """From before the request to the arrival of the first text."""
    seconds: float
    """From before the request to the arrival of the end."""


class Server(Protocol):
    async def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        """Greedy, without penalties."""


class Round(NamedTuple):
    """What so many jobs at once came to."""

    tokens_a_second: float
    first_s: list[float]


async def at_once(server: Server, prompts: Sequence[Sequence[Message]], n_clients: int, max_tokens: int) -> Round:
    """All prompts, asked by so many clients, each of which waits for its answer before it asks the next."""
    waiting = list(reversed(prompts))
    answers: list[Answer] = []

    async def client() -> None:
        while waiting:
            answers.append(await server.ask(waiting.pop(), max_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    seconds = time.perf_counter() - started
    return Round(sum(one.tokens for one in answers) / seconds, [one.first_s for one in answers])


def http(url: str, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=600,
        trust_env=False,
        # A server may close a connection that was idle, or served often enough, at the very moment of the next request.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )


async def events(answer: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    """Server-Sent Events: the name of each (empty: none) and its data; `[DONE]`, which is no JSON, is left out."""
    if answer.status_code != 200:
        raise SystemExit(f"{answer.url}: {answer.status_code} {(await answer.aread()).decode()[:500]}")
    name = ""
    async for line in answer.aiter_lines():
        field, _, value = line.partition(":")
        if field == "event":
            name = value.strip()
        elif field == "data" and value.strip() != "[DONE]":
            yield name, json.loads(value)
            name = ""
