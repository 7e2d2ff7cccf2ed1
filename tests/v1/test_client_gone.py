"""A client that leaves before its answer: within a grace the same call finds its job again; then it is cancelled."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, select

from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.store.tables import CallRow
from tests.settle import eventually
from tests.v1.conftest import openai_client
from tests.web.conftest import TOKEN, serving
from tests.worker.conftest import Script, working_in_process

CALL = {"model": "smollm2", "messages": [{"role": "user", "content": "wait"}]}
REPLY = "Green, old, and fond of tea."


@pytest.fixture
def gate(tmp_path: Path, script: Script) -> Path:
    """The reply is written up to the sixth letter until this exists."""
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "after": 6, "reply": REPLY})
    return gate


async def jobs(api: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.get("/api/jobs")).json()["jobs"]
    return found


async def only_job(api: httpx.AsyncClient) -> dict[str, Any]:
    (job,) = await jobs(api)
    return job


async def left(database: Database) -> list[tuple[int, bool]]:
    """Of each call: how many wait for it, and whether the last has left."""

    def read(connection: Connection) -> list[tuple[int, bool]]:
        rows = connection.execute(select(CallRow.n_open, CallRow.left_at).order_by(CallRow.job_id))
        return [(n_open, left_at is not None) for n_open, left_at in rows]

    return await database.read(read)


async def eventually_left(database: Database, *wanted: tuple[int, bool]) -> None:
    async def is_so() -> bool:
        return await left(database) == list(wanted)

    await eventually(is_so)


async def eventually_is(api: httpx.AsyncClient, status: str) -> dict[str, Any]:
    async def is_so() -> bool:
        return bool((await only_job(api))["status"] == status)

    await eventually(is_so)
    return await only_job(api)


async def ask(api: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await api.post("/v1/chat/completions", json=CALL, headers=headers)


async def leave(api: httpx.AsyncClient, database: Database, **headers: str) -> None:
    """Sends the call, and leaves once its job is there."""
    asking = asyncio.create_task(ask(api, **headers))

    async def is_there() -> bool:
        return len(await left(database)) == 1

    await eventually(is_there)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_openais_client_gives_up_in_time_tries_again_and_gets_the_one_reply(
    openai: Any, api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    async with openai_client(openai, api, timeout=1.0, max_retries=5) as client:
        asking = asyncio.create_task(client.chat.completions.create(**CALL))
        await eventually_left(database, (0, True))
        await eventually_left(database, (1, False))
        gate.touch()
        answer = await asking
    job = await only_job(api)
    assert (answer.choices[0].message.content, answer.id, job["attempt"]) == (REPLY, f"chatcmpl-{job['id']}", 1)


async def test_a_stream_that_was_cut_comes_whole_to_the_same_call(
    openai: Any, api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    async with openai_client(openai, api) as client:
        stream = await client.chat.completions.create(**CALL, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        await eventually_left(database, (0, True))
        gate.touch()
        again = await client.chat.completions.create(**CALL, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in again])
    job = await only_job(api)
    assert (text, job["attempt"], job["result"]) == (REPLY, 1, REPLY)


@pytest.mark.slow
async def test_langchain_gives_up_in_time_tries_again_and_gets_the_one_reply(
    openai: Any, api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    langchain = importlib.import_module("langchain_openai")
    async with openai.DefaultAsyncHttpxClient(trust_env=False, verify=False) as http:
        model = langchain.ChatOpenAI(
            model="smollm2",
            base_url=f"{api.base_url}/v1",
            api_key=TOKEN,
            timeout=1.0,
            max_retries=5,
            http_async_client=http,
        )
        asking = asyncio.create_task(model.ainvoke("wait"))
        await eventually_left(database, (0, True))
        await eventually_left(database, (1, False))
        gate.touch()
        assert (await asking).content == REPLY
    assert (await only_job(api))["attempt"] == 1


async def test_an_answer_that_was_missed_is_there_for_the_same_call(
    api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    await leave(api, database)
    await eventually_left(database, (0, True))
    gate.touch()
    await eventually_is(api, "done")
    assert (await ask(api)).json()["choices"][0]["message"]["content"] == REPLY
    # It has its answer now: the same call once more is another one.
    await ask(api)
    assert len(await jobs(api)) == 2


@pytest.mark.parametrize("config", [0.2], indirect=True)
async def test_a_job_that_nobody_waits_for_is_cancelled_after_the_grace(
    api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    await leave(api, database)
    job = await eventually_is(api, "cancelled")
    assert job["result"] is None
    answer = asyncio.create_task(ask(api))

    async def is_another() -> bool:
        return len(await jobs(api)) == 2

    await eventually(is_another)
    gate.touch()
    assert (await answer).status_code == 200


@pytest.mark.parametrize("config", [0.2], indirect=True)
async def test_a_job_under_a_key_goes_on_and_its_call_gets_the_answer(
    api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    await leave(api, database, **{"Idempotency-Key": "k"})
    gate.touch()
    await eventually_is(api, "done")
    answer = await ask(api, **{"Idempotency-Key": "k"})
    assert answer.json()["choices"][0]["message"]["content"] == REPLY
    assert len(await jobs(api)) == 1


async def test_where_clients_may_leave_a_job_goes_on(config: Config, script: Script, gate: Path) -> None:
    config = msgspec.structs.replace(config, v1_client_gone="continue", v1_grace_s=0.1)
    database = Database(config.database_path)
    database.open()
    async with serving(config) as api, working_in_process(config, script):
        await leave(api, database)
        await eventually_left(database, (0, True))
        gate.touch()
        await eventually_is(api, "done")
    await database.close()


@pytest.mark.parametrize("config", [0.2], indirect=True)
async def test_while_one_of_two_waits_the_job_goes_on(api: httpx.AsyncClient, database: Database, gate: Path) -> None:
    first = asyncio.create_task(ask(api))
    await eventually_left(database, (1, False))
    # The client says that it sends the call again; that the first connection is gone was not noticed.
    second = asyncio.create_task(ask(api, **{"X-Stainless-Retry-Count": "1"}))
    await eventually_left(database, (2, False))
    first.cancel()
    await eventually_left(database, (1, False))
    gate.touch()
    assert (await second).json()["choices"][0]["message"]["content"] == REPLY
    assert len(await jobs(api)) == 1


async def test_another_call_and_another_body_are_other_jobs(
    api: httpx.AsyncClient, database: Database, gate: Path
) -> None:
    await leave(api, database)
    await eventually_left(database, (0, True))
    gate.touch()
    await api.post("/v1/chat/completions", json=CALL | {"temperature": 0})
    await api.post("/v1/responses", json={"input": "wait"})
    assert len(await jobs(api)) == 3


async def test_a_server_that_ends_sends_its_clients_back_to_the_job(
    config: Config, script: Script, database: Database, gate: Path
) -> None:
    async with working_in_process(config, script):
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=20
        ) as waiting:
            async with serving(config) as api:
                waiting.base_url = api.base_url
                asking = asyncio.create_task(ask(waiting))
                reading = asyncio.create_task(waiting.post("/v1/chat/completions", json=CALL | {"stream": True}))
                await eventually_left(database, (1, False), (1, False))
            assert ((await asking).status_code, (await asking).headers["retry-after"]) == (503, "1")
            assert '"code":"ending"' in (await reading).text
        assert await left(database) == [(0, True), (0, True)]
        gate.touch()
        async with serving(config) as api:
            assert (await ask(api)).json()["choices"][0]["message"]["content"] == REPLY
            assert len(await jobs(api)) == 2


async def test_many_open_calls_share_one_connection_to_redis(
    api: httpx.AsyncClient, config: Config, database: Database, gate: Path, redis_url: str
) -> None:
    async with Redis.from_url(redis_url) as redis:

        async def n_subscribers() -> int:
            return sum(1 for one in await redis.client_list() if int(one["sub"]) or int(one["psub"]))

        asking = [asyncio.create_task(ask(api)) for _ in range(40)]
        await eventually_left(database, *[(1, False)] * 40)
        assert await n_subscribers() <= 3
        gate.touch()
        assert {(await one).status_code for one in asking} == {200}
