"""A real web application and a real Valkey. The test publishes what a worker would, or a real worker with an engine
that is no process does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from llamalith_app.store.record import record_id
from llamalith_app.streams.publisher import StreamPublisher
from llamalith_app.streams.subscriber import history
from llamalith_app.web.follow import Timings
from tests.settle import eventually
from tests.store.samples import finish, register_worker
from tests.web.conftest import make_config, serving
from tests.worker.conftest import Script, working_in_process


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script.json")


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    # On a slow machine a Redis that is there may need longer than it is waited for.
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
def timings() -> Timings:
    # For the same reason.
    return Timings(history_s=20)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def api(config: Config, timings: Timings) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config, follow_timings=timings) as api:
        yield api


@pytest.fixture
async def worked(config: Config, script: Script, timings: Timings) -> AsyncIterator[httpx.AsyncClient]:
    """With a worker. A reply stops at `STOP`."""
    model = msgspec.structs.replace(config.models[0], settings=ModelSettings(stop=("STOP",), max_tokens=1000))
    config = msgspec.structs.replace(config, models=(model,))
    async with serving(config, follow_timings=timings) as api, working_in_process(config, script):
        yield api


async def submit(api: httpx.AsyncClient, content: str, conversation_id: str = "c") -> int:
    answer = await api.post("/api/jobs", json={"content": content, "conversation_id": conversation_id})
    assert answer.status_code == 200, answer.text
    job_id: int = answer.json()["job_id"]
    return job_id


class Attempt:
    """One attempt at the best due job, as a worker's. The test says what it does."""

    def __init__(self, database: Database, redis: Redis, record: str, claim: transitions.Claim) -> None:
        self.claim = claim
        self._database = database
        self._redis = redis
        self._record = record
        self.stream = StreamPublisher(redis, record).open_attempt(claim.job_id, claim.attempt)
        self.reply = ""

    async def write(self, *texts: str) -> None:
        """Publishes each text as an event of its own; all are in the stream when this returns."""
        for text in texts:
            self.reply += text
            n = await self.n_events()
            self.stream.append([("delta", text)])

            async def is_there(n: int = n) -> bool:
                return await self.n_events() > n

            await eventually(is_there)

    async def n_events(self) -> int:
        return len(await history(self._redis, self._record, self.claim.job_id))

    async def finish(self, reply: str | None = None, *, and_publish: bool = True) -> None:
        assert await self._database.write(finish, self.claim, self.reply if reply is None else reply)
        if and_publish:
            await self.stream.publish_end()


async def attempt(database: Database, redis: Redis) -> Attempt:
    worker_id = await database.write(register_worker)
    claim = await database.write(transitions.claim, "smollm2", 1, worker_id, datetime.now(UTC))
    assert claim is not None
    return Attempt(database, redis, record_id(database.path), claim)
