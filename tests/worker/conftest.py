"""A real worker in this process, with engines that follow a script: a child, or none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llamalith_app.contracts.jobs import Job
from llamalith_app.engine.client.protocol import EngineFactory
from llamalith_app.jobs.worker.process import Worker, WorkerTimings, local_engines
from llamalith_app.jobs.worker.running import RunningAttempt
from llamalith_app.jobs.worker.sweep import BATCHES, SweepBatches, SweepTimings
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.store import check
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads, submission
from llamalith_app.store.users import ADMIN_ID
from tests import fake_engine
from tests.in_process_engine import InProcessEngines
from tests.settle import eventually
from tests.store.samples import prompt

Submit = Callable[..., Awaitable[int]]
ENDED = ("done", "error", "cancelled")


def sweeping(**timings: float) -> WorkerTimings:
    return WorkerTimings(sweep=SweepTimings(**timings))


NO_POLL = sweeping(sweep_s=3600)
"""After the first sweep and poll, at the start, there is none."""
OFTEN = sweeping(sweep_s=0.2)
"""So that a job that was submitted without a hint starts soon."""


class Script:
    """The rules that the fake engines follow."""

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
    engines: EngineFactory | None = None,
    timings: WorkerTimings = OFTEN,
    # On a slow machine a Redis that is there may need longer than a worker waits for it.
    redis_timeout_s: float = 20,
    batches: SweepBatches = BATCHES,
) -> AsyncIterator[Worker]:
    """`engines`: None: children with the fake runner."""
    engines = engines or local_engines(config, fake_engine.argv(script.path))
    timings = msgspec.structs.replace(timings, redis_timeout_s=redis_timeout_s)
    worker = Worker(config, engines, timings=timings, batches=batches)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.drain(grace_s)


def working_in_process(config: Config, script: Script, **changed: Any) -> AbstractAsyncContextManager[Worker]:
    """As `working`, with engines that are no processes: for what does not depend on how an engine is made."""
    return working(config, script, engines=InProcessEngines(script.path, default_n_slots=config.n_slots), **changed)


@pytest.fixture
def submit(database: Database) -> Submit:
    """Puts a prompt into the record, as a web process whose hint got lost."""

    async def submit(content: str, conversation_id: str | None = None, **fields: Any) -> int:
        if (parameters := fields.pop("parameters", None)) is not None:
            fields |= msgspec.structs.asdict(parameters)
        accepted = await database.write(
            submission.submit, prompt(content, conversation_id, **fields), datetime.now(UTC)
        )
        assert accepted.job_id is not None
        return accepted.job_id

    return submit


async def ended(database: Database, job_id: int, *, within_s: float = 20) -> Job:
    """The job once it has ended; the record must be whole then."""

    async def look() -> Job | None:
        job = await database.read(reads.one, ADMIN_ID, job_id)
        assert job is not None
        return job if job.status in ENDED else None

    job = await eventually(look, within_s=within_s)
    assert job is not None
    assert await database.read(check.broken) == []
    return job


async def at_phase(worker: Worker, phase: str) -> RunningAttempt:
    """What runs, once it is there."""

    async def look() -> RunningAttempt | None:
        return next((one for one in worker.dispatcher.running.values() if one.progress.phase == phase), None)

    found = await eventually(look)
    assert found is not None
    return found


def engine_pid(worker: Worker) -> int:
    """Of the only child that is there."""
    (pooled,) = worker._pool.pooled.values()
    assert pooled.engine is not None
    assert pooled.engine.pid is not None
    return pooled.engine.pid


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
