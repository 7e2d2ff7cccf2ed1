"""Asks a server: one prompt with its times, or many at once. The same for the product and the peer.

Measures the time of every compared figure. Does not know any server's routes: `peer.py` and `product.py` do.
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
    """Tokens of the reply, as the server counts them."""
    first_s: float
    """From just before the request to the first text."""
    seconds: float
    """From just before the request to the end."""


class Server(Protocol):
    async def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        """One reply, sampled greedily and without penalties."""


class Round(NamedTuple):
    """The result of many jobs at once."""

    tokens_a_second: float
    first_s: list[float]


async def at_once(server: Server, prompts: Sequence[Sequence[Message]], n_clients: int, max_tokens: int) -> Round:
    """Asks all prompts with so many clients; each waits for its answer before it asks the next."""
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
    """The name (empty if there is none) and data of each server-sent event. Skips `[DONE]`, which is not JSON."""
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
