"""What people ask of models, from web to workers over a real Redis."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from llamalith_app.errors import RedisUnavailable
from llamalith_app.jobs import wishes
from llamalith_app.jobs.queue import redis_without_retries
from llamalith_app.jobs.wishes import WishReader


async def test_each_worker_gets_a_wish_until_it_has_fulfilled_it_and_the_same_again_is_another(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        readers = [WishReader(redis, "r", ["a", "b"]) for _ in range(2)]
        assert await readers[0].read() == {}
        await wishes.put(redis, "r", "a", "load")
        await wishes.put(redis, "other", "b", "load")
        (wish,) = (await readers[0].read()).values()
        assert (wish.word, await readers[0].read()) == ("load", {"a": wish})
        readers[0].fulfilled("a", wish)
        assert await readers[0].read() == {}
        assert await readers[1].read() == {"a": wish}
        await wishes.put(redis, "r", "a", "load")
        assert (await readers[0].read())["a"].id != wish.id
        await wishes.put(redis, "r", "a", "unload")
        assert (await readers[0].read())["a"].word == "unload", "the last one counts"


async def test_a_wish_expires(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await wishes.put(redis, "r", "a", "load")
        assert 0 < await redis.ttl("llamalith:wish:r:a") <= wishes.TTL_S


@pytest.mark.parametrize("value", [b"", b"load", b"x explode", b"\xff load", b"x load load"])
async def test_what_is_no_wish_is_none(redis_url: str, value: bytes) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.set("llamalith:wish:r:a", value)
        assert await WishReader(redis, "r", ["a"]).read() == {}


async def test_without_redis_a_wish_is_refused_and_nothing_is_read(absent_redis_url: str) -> None:
    redis = redis_without_retries(absent_redis_url)
    with pytest.raises(RedisUnavailable, match="A job for the model loads it"):
        await wishes.put(redis, "r", "a", "load")
    assert await WishReader(redis, "r", ["a"]).read() == {}
    await redis.aclose()
