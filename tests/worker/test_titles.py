"""A worker makes titles, where it is told to."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from llamalith_app.settings.config import Config
from llamalith_app.store import conversation_list, titles
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission
from llamalith_app.store.tables import Source
from llamalith_app.store.users import ADMIN_ID
from tests.settle import eventually
from tests.store.samples import prompt
from tests.worker.conftest import Script, ended, sweeping, working_in_process


async def test_a_worker_gives_a_title_to_a_chat_and_none_where_that_is_switched_off(
    config: Config, script: Script, database: Database
) -> None:
    script.write({"when": titles.QUESTION, "reply": '{"title": "By the worker"}'})

    async def ask(public_id: str) -> int:
        new = prompt("hello", public_id, source=Source.PAGE)
        job_id = (await database.write(submission.submit, new, datetime.now(UTC))).job_id
        assert job_id is not None
        return job_id

    async def title(public_id: str) -> str | None:
        found = await database.read(conversation_list.conversation, ADMIN_ID, public_id)
        assert found is not None
        return found.title

    async with working_in_process(
        msgspec.structs.replace(config, auto_titles=False), script, timings=sweeping(sweep_s=0.02)
    ):
        await ended(database, await ask("off"))
        last = await ask("later")
        await ended(database, last)
        assert (await database.read(titles.work, datetime.now(UTC), 9)).collect == []
    async with working_in_process(config, script, timings=sweeping(sweep_s=0.02)):

        async def has_title() -> bool:
            return await title("off") == await title("later") == "By the worker"

        assert await eventually(has_title)
        assert (await database.read(titles.work, datetime.now(UTC), 9)) == titles.Work([], [])
