"""A worker does what a person asked of a model, with engines without a process and a real Redis."""

from __future__ import annotations

from redis.asyncio import Redis

from llamalith_app.jobs import wishes
from llamalith_app.jobs.wishes import WishWord
from llamalith_app.jobs.worker.process import WorkerTimings
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.record import record_id
from tests.settle import eventually
from tests.worker.conftest import Script, Submit, ended, working_in_process


async def test_a_worker_loads_and_unloads_a_model_when_asked_and_the_next_job_loads_it_again(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    timings = WorkerTimings(tend_s=0.05)
    async with working_in_process(config, script, timings=timings) as worker, Redis.from_url(config.redis_url) as redis:

        async def ask(word: WishWord) -> None:
            await wishes.put(redis, record_id(config.database_path), "m", word)

        async def is_loaded() -> bool:
            pooled = worker._pool.pooled.get("m")
            return pooled is not None and pooled.live is not None

        async def is_gone() -> bool:
            return not await is_loaded()

        await ask("load")
        await eventually(is_loaded)
        await ask("unload")
        await eventually(is_gone)
        job_id = await submit("x", model="m")
        assert (await ended(database, job_id)).status == "done"
        assert await is_loaded(), "the wish was fulfilled once, and is not again"
