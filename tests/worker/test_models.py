"""Several models in one worker: which are loaded, whose job is next, and what cannot be."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import structlog

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.jobs.worker.memory import MIB
from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store import workers
from llamalith_app.store.database import Database
from tests.gguf import write
from tests.settle import eventually
from tests.worker.conftest import Script, Submit, ended, slots, working, working_in_process


def only_one_fits(config: Config) -> Config:
    for model in config.models:
        assert model.path is not None
        write(model.path, file_bytes=500 * MIB)
    return msgspec.structs.replace(config, memory_budget_mb=900)


@pytest.mark.slow
async def test_jobs_alternating_between_two_models_that_do_not_fit_together_need_few_loads(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "x", "reply": "y"})
    ids = [await submit("x", f"c{n}", model="mn"[n % 2]) for n in range(100)]
    with structlog.testing.capture_logs() as lines:
        async with working(slots(only_one_fits(config), 2), script):
            done = [await ended(database, job_id) for job_id in ids]
    assert {job.status for job in done} == {"done"}
    assert sum(line["event"] == "model loaded" for line in lines) <= 6


async def test_models_that_fit_work_at_the_same_time(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "reply": "waited"})
    async with working_in_process(config, script):
        waiting = await submit("wait", "a", model="m")
        assert (await ended(database, await submit("x", "b", model="n"))).status == "done"
        gate.touch()
        assert (await ended(database, waiting)).status == "done"


async def test_a_job_that_waited_for_its_bound_is_run_before_the_loaded_model_s_queue_ends(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "reply": "y"}, {"when": "x", "reply": "y"})
    own = only_one_fits(msgspec.structs.replace(config, max_wait_s=MaxWait(interactive=0, normal=900)))
    async with working_in_process(own, script) as worker:
        await ended(database, await submit("x", "first", model="m"))
        crowd = [await submit("wait" if n == 0 else "x", f"c{n}", model="m") for n in range(10)]
        await worker.dispatcher.poll()
        urgent_id = await submit("x", "urgent", model="n", priority="interactive")
        gate.touch()
        urgent = await ended(database, urgent_id)
        done = [await ended(database, job_id) for job_id in crowd]
    assert urgent.priority == "interactive"
    last = max(job.processed_at for job in done if job.processed_at)
    assert urgent.processed_at is not None
    assert urgent.processed_at < last


async def test_a_batch_waits_for_what_is_more_urgent(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "x", "reply": "y"})
    batch, normal, urgent = [
        await submit("x", priority, priority=priority) for priority in ("batch", "normal", "interactive")
    ]
    async with working_in_process(config, script):
        started = {
            name: (await ended(database, job_id)).started_at
            for name, job_id in (("batch", batch), ("normal", normal), ("urgent", urgent))
        }
    assert sorted(started, key=lambda name: str(started[name])) == ["urgent", "normal", "batch"]


async def test_a_model_that_can_never_fit_ends_its_jobs_at_once_and_the_others_go_on(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    own = msgspec.structs.replace(config, memory_budget_mb=300)
    assert own.models[0].path is not None
    write(own.models[0].path, file_bytes=500 * MIB)
    async with working_in_process(own, script):
        failed = [await ended(database, await submit("x", f"c{n}")) for n in range(3)]
        assert (await ended(database, await submit("x", "other", model="n"))).status == "done"
    for job in failed:
        assert job.error is not None
        assert (job.status, job.attempt, job.error.kind) == ("error", 1, "model_unavailable")
        assert "needs about 651 MiB of memory with 1 slot of 4096 tokens" in job.error.reason
        assert "300 MiB are allowed" in job.error.reason


async def test_a_worker_reports_its_engines_with_its_heartbeat(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "x", "reply": "y" * 20}, {"model": "n", "cannot_load": "It is broken."})
    async with working_in_process(config, script):
        await ended(database, await submit("x", "a", model="m"))
        await ended(database, await submit("x", "b", model="n", max_attempts=1))

        async def reported() -> dict[str, EngineStatus]:
            texts = await database.read(workers.statuses, datetime.now(UTC))
            found = {one.model: one for text in texts for one in msgspec.json.decode(text, type=list[EngineStatus])}
            return found if found and found["n"].state == "failed" and found["m"].job_s else {}

        engines = await eventually(reported)
    assert (engines["m"].state, engines["m"].n_slots, engines["m"].n_used) == ("loaded", 1, 0)
    assert engines["m"].completion_tokens == 20
    assert min(engines["m"].tokens_per_s or 0, engines["m"].prompt_tokens_per_s or 0, engines["m"].job_s or 0) > 0
    assert "It is broken." in (engines["n"].reason or "")


async def test_an_idle_model_is_unloaded_by_the_worker_itself(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    async with working_in_process(msgspec.structs.replace(config, idle_unload_s=0.01), script) as worker:
        await ended(database, await submit("x"))

        async def unloaded() -> bool:
            return not worker._pool.pooled

        await eventually(unloaded)
        assert (await ended(database, await submit("x"))).status == "done"
