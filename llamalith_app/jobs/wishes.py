"""What people ask of models: that one is loaded, or unloaded. From web to workers, over Redis.

A wish is a hint, as all in Redis: it may be lost, and it expires. Every worker that serves the model tries to fulfil it
until it has, or until it is gone; nothing waits for that. Knows no SQL and no engine.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable
from typing import Literal, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from llamalith_app.errors import RedisUnavailable

TTL_S = 30
"""How long workers try: a model that is at work may become idle meanwhile, and another one may give way."""
BACKOFF_S = 5.0
"""After a failed read, nothing is read for this long."""

WishWord = Literal["load", "unload"]
WORDS: tuple[WishWord, ...] = ("load", "unload")


class Wish(NamedTuple):
    id: str
    """Random: the same again is another wish."""
    word: WishWord


def _key(record: str, model: str) -> str:
    return f"llamalith:wish:{record}:{model}"


async def put(redis: Redis, record: str, model: str, word: WishWord) -> None:
    """Replaces the wish for this model. Raises RedisUnavailable."""
    try:
        await redis.set(_key(record, model), f"{secrets.token_hex(8)} {word}", ex=TTL_S)
    except (RedisError, OSError, TimeoutError) as error:
        raise RedisUnavailable(
            "Redis does not answer, and without it nobody can ask a worker. A job for the model loads it in any case."
        ) from error


class WishReader:
    """What one worker has still to do for these models."""

    def __init__(self, redis: Redis, record: str, models: Iterable[str]) -> None:
        self._redis = redis
        self._record = record
        self._models = list(models)
        self._fulfilled: dict[str, str] = {}
        """By model: the id of the last wish that this worker fulfilled."""
        self._not_before = 0.0

    async def read(self) -> dict[str, Wish]:
        """The wishes that are open, by model; none while Redis is away."""
        if not self._models or time.monotonic() < self._not_before:
            return {}
        try:
            values = await self._redis.mget([_key(self._record, model) for model in self._models])
        except (RedisError, OSError, TimeoutError):
            self._not_before = time.monotonic() + BACKOFF_S
            return {}
        found = {model: _decode(value) for model, value in zip(self._models, values, strict=True)}
        return {
            model: wish for model, wish in found.items() if wish is not None and wish.id != self._fulfilled.get(model)
        }

    def fulfilled(self, model: str, wish: Wish) -> None:
        """It is not returned again."""
        self._fulfilled[model] = wish.id


def _decode(value: object) -> Wish | None:
    with contextlib.suppress(UnicodeDecodeError, ValueError):
        wish_id, _, word = value.decode().partition(" ") if isinstance(value, bytes) else ("", "", "")
        return Wish(wish_id, WORDS[WORDS.index(word)])
    return None
