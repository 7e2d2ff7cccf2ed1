"""A real worker in this process, with the fake engine as its child."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llamalith_app.contracts.jobs import Job
from llamalith_app.jobs.queue import TIMINGS, Timings
from llamalith_app.jobs.worker.generate import RunningAttempt
from llamalith_app.jobs.worker.process import Worker
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.store import check, job_reads, jobs
from llamalith_app.store.database import Database
from llamalith_app.store.users import ADMIN_ID
from tests import fake_engine
from tests.settle import eventually
from tests.store.samples import prompt

Submit = Callable[..., Awaitable[int]]
ENDED = ("done", "error", "cancelled")


class Script:
    """The rules that the fake engine follows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write()

    def write(self, *rules: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(rules))


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script.json")


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return Config(
        data_dir=tmp_path,
        models=tuple(ModelConfig(name=name, path=tmp_path / f"{name}.gguf") for name in ("m", "n")),
        redis_url=redis_url,
        database_path=database_path,
        grammar_dir=tmp_path,
        n_slots=1,
    )


@asynccontextmanager
async def working(
    config: Config,
    script: Script,
    *,
    grace_s: float = 5,
    # On a slow machine a Redis that is there may need longer than a worker waits for it.
    redis_timeout_s: float = 20,
    queue_timings: Timings = TIMINGS,
) -> AsyncIterator[Worker]:
    argv = fake_engine.argv(script.path)
    worker = Worker(config, argv, redis_timeout_s=redis_timeout_s, queue_timings=queue_timings)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.drain(grace_s)


@pytest.fixture
def submit(database: Database) -> Submit:
    """Puts a prompt into the record, as a web process whose hint got lost."""

    async def submit(content: str, conversation_id: str | None = None, **fields: Any) -> int:
        if (parameters := fields.pop("parameters", None)) is not None:
            fields |= msgspec.structs.asdict(parameters)
        accepted = await database.write(jobs.submit, prompt(content, conversation_id, **fields), datetime.now(UTC))
        assert accepted.job_id is not None
        return accepted.job_id

    return submit


async def ended(database: Database, job_id: int, *, within_s: float = 20) -> Job:
    """The job once it has ended; the record must be whole then."""

    async def look() -> Job | None:
        job = await database.read(job_reads.one, ADMIN_ID, job_id)
        assert job is not None
        return job if job.status in ENDED else None

    job = await eventually(look, within_s=within_s)
    assert job is not None
    assert await database.read(check.broken) == []
    return job


async def at_phase(worker: Worker, phase: str) -> RunningAttempt:
    """What runs, once it is there."""

    async def look() -> RunningAttempt | None:
        return next((one for one in worker.generation.running.values() if one.progress.phase == phase), None)

    found = await eventually(look)
    assert found is not None
    return found


async def attempts(database: Database, job_id: int) -> list[tuple[Any, ...]]:
    def read(connection: Any) -> list[tuple[Any, ...]]:
        return [
            tuple(row)
            for row in connection.exec_driver_sql(
                f"SELECT attempt, outcome, reason FROM attempts WHERE job_id = {job_id} ORDER BY attempt"
            )
        ]

    return await database.read(read)


def slots(config: Config, n_slots: int) -> Config:
    return msgspec.structs.replace(config, n_slots=n_slots)
