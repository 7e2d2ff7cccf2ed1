"""From the 200 of a cancel to an idle processor: real web, real worker, real model; no Redis."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from llamalith_app.jobs.worker.process import Worker
from llamalith_app.jobs.worker.running import RunningAttempt, StopReason
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store import check
from llamalith_app.store.database import Database
from tests.engine.conftest import LAZY_DOG, bundled_model
from tests.settle import eventually
from tests.web.conftest import make_config, serving

pytestmark = pytest.mark.slow

IDLE_WITHIN_S = 0.5
STANDS_STILL_S = 0.5
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def product(config: Config) -> AsyncIterator[tuple[httpx.AsyncClient, Worker]]:
    async with serving(config) as api:
        worker = Worker(config)
        await worker.start()
        try:
            yield api, worker
        finally:
            await worker.drain(5)


@pytest.fixture
def config(tmp_path: Path, database_path: Path, absent_redis_url: str) -> Config:
    settings = ModelSettings(n_ctx=8192, max_tokens=4096, temperature=1.0)
    model = ModelConfig(name="smollm2", path=bundled_model(), settings=settings)
    return msgspec.structs.replace(make_config(tmp_path, database_path, absent_redis_url), models=(model,))


def cpu_ticks(pid: int) -> int:
    """User and system time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def idle_after(pid: int, since: float) -> float:
    """Seconds from `since` to the last moment at which the process used the processor, once that stands still."""
    seen, last = cpu_ticks(pid), since
    while time.monotonic() - last < STANDS_STILL_S:
        await asyncio.sleep(1 / TICKS_A_SECOND)
        if (now := cpu_ticks(pid)) != seen:
            seen, last = now, time.monotonic()
    return last - since


async def steps(worker: Worker, phase: str, n_steps: int) -> float:
    """Waits until so many steps of a phase were seen; the longest time between two of them."""
    seen: list[tuple[object, float]] = []

    async def look() -> bool:
        for running in worker.dispatcher.running.values():
            if running.progress.phase == phase and (not seen or seen[-1][0] is not running.last_step):
                seen.append((running.last_step, time.monotonic()))
        return len(seen) > n_steps

    await eventually(look, within_s=60)
    return max(later - earlier for (_, earlier), (_, later) in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("phase", "content"),
    [("prefill", LAZY_DOG * 600), ("decode", "Write a very long story about a dragon, in many chapters.")],
    ids=["prefill", "decode"],
)
async def test_the_engine_is_idle_half_a_second_after_its_worker_heard_of_a_cancel(
    config: Config, database: Database, monkeypatch: pytest.MonkeyPatch, phase: str, content: str
) -> None:
    async with product(config) as (api, worker):
        job_id = (await api.post("/api/jobs", json={"content": content})).json()["job_id"]
        longest_step_s = await steps(worker, phase, 8)
        engine = worker._pool.pooled["smollm2"].live
        assert engine is not None
        pid = engine.pid
        assert pid is not None
        before = cpu_ticks(pid)

        async def works() -> bool:
            return cpu_ticks(pid) > before + 2

        await eventually(works)
        stopped: list[float] = []
        stop = RunningAttempt.stop

        def note_and_stop(running: RunningAttempt, reason: StopReason) -> None:
            stopped.append(time.monotonic())
            stop(running, reason)

        async def is_stopped() -> bool:
            return bool(stopped)

        monkeypatch.setattr(RunningAttempt, "stop", note_and_stop)
        answer = await api.post(f"/api/jobs/{job_id}/cancel")
        await eventually(is_stopped)
        idle_s = await idle_after(pid, stopped[0])
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        # On a machine whose steps are slow, one of them may stand between.
        assert idle_s < max(IDLE_WITHIN_S, longest_step_s + 0.2), f"{idle_s=} {longest_step_s=}"
        job = (await api.get(f"/api/jobs/{job_id}")).json()
        assert bool(job["partial"]) is (phase == "decode")
        assert (job["prompt_tokens"] > 4000) is (phase == "prefill")
        assert await database.read(check.violations) == []
        # The slot is free and clean: the same engine goes on.
        brief = await api.post("/api/jobs", json={"content": "Say hello.", "timeout_s": 5})

        async def ended() -> bool:
            return (await api.get(f"/api/jobs/{brief.json()['job_id']}")).json()["status"] in ("done", "error")

        await eventually(ended)
        assert worker._pool.pooled["smollm2"].live is engine
