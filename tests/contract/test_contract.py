"""Every recorded step of the original, in order, against the real application with a real worker on the fake runner."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import Connection

from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.store.database import Database
from llamalith_app.store.jobs.statements import LONGEST_BACKOFF
from tests.web.conftest import serving
from tests.worker.conftest import Script, ended, working

STEPS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "original.json").read_text())
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def matches(recorded: object, told: object) -> bool:
    """Each recorded field is there with its value; more may be."""
    if recorded == "<uuid>":
        return isinstance(told, str) and UUID.fullmatch(told) is not None
    if recorded == "<time>":
        return isinstance(told, str) and datetime.fromisoformat(told) is not None
    if isinstance(recorded, dict):
        return isinstance(told, dict) and all(
            name in told and matches(value, told[name]) for name, value in recorded.items()
        )
    if isinstance(recorded, list):
        return isinstance(told, list) and len(told) == len(recorded) and all(map(matches, recorded, told))
    return type(recorded) is type(told) and recorded == told


def expected(step: dict[str, Any]) -> tuple[int, Any]:
    """The recorded answer, with the deliberate differences."""
    status, body = step["response"]["status"], step["response"]["json"]
    if status == 422:
        return 400, {}
    if step["name"] == "system prompt only":
        body = {**body, "model": "smollm2"}
    if step["name"] == "list limit":
        return status, {"jobs": [{"id": 10}]}
    if isinstance(body, dict) and list(body) == ["jobs"]:
        body = {"jobs": sorted(body["jobs"], key=lambda job: -job["id"])}
    return status, body


async def test_the_recorded_steps_hold(
    tmp_path: Path, database: Database, database_path: Path, redis_url: str, absent_redis_url: str
) -> None:
    script = Script(tmp_path / "script.json")
    script.write({"when": "hello", "reply": "Hello to you."}, {"when": "first words", "refuse": "Model exploded"})
    config = Config(
        data_dir=tmp_path,
        api_token="tok",
        models=(ModelConfig(name="smollm2", path=tmp_path / "s.gguf"),),
        redis_url=redis_url,
        database_path=database_path,
        grammar_dir=tmp_path,
    )
    (tmp_path / "json.gbnf").write_text('root ::= "{}"')
    assert len(STEPS) == 47
    async with serving(config) as api:
        del api.headers["Authorization"]
        for step in STEPS:
            if "worker_finishes" in step:
                await finish_one(config, script, database, step["worker_finishes"])
            else:
                await ask(api, step)


async def ask(api: httpx.AsyncClient, step: dict[str, Any]) -> None:
    request = step["request"]
    headers = dict(request.get("headers", {"Authorization": "Bearer tok"}))
    if "raw_body" in request:
        headers["Content-Type"] = "application/json"
    body_sent = {name: request[key] for name, key in (("json", "json"), ("content", "raw_body")) if key in request}
    answer = await api.request(request["method"], request["path"], headers=headers, **body_sent)
    status, body = expected(step)
    told = answer.json()
    assert answer.status_code == status, (step["name"], answer.text)
    assert matches(body, told), (step["name"], body, told)
    for name, value in step["response"].get("headers", {}).items():
        assert answer.headers[name] == value, step["name"]
    if status == 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert isinstance(told["detail"], str)


async def finish_one(config: Config, script: Script, database: Database, finishes: dict[str, Any]) -> None:
    """Lets a real worker at this one job: the others rest in a pause for so long."""

    def rest(connection: Connection, until: str) -> None:
        connection.exec_driver_sql(
            f"UPDATE jobs SET not_before = '{until}' WHERE status = 'queued' AND id <> {finishes['job_id']}"
        )

    # Longer than a worker takes for one job, shorter than what only a clock that went back explains.
    pause = datetime.now(UTC) + LONGEST_BACKOFF - timedelta(seconds=5)
    await database.write(rest, pause.strftime("%Y-%m-%d %H:%M:%S.%f"))
    async with working(msgspec.structs.replace(config, redis_url=f"unix://{config.data_dir}/none"), script):
        job = await ended(database, finishes["job_id"])
    await database.write(rest, "2000-01-01 00:00:00.000000")
    assert (job.status, job.result) == (finishes["status"], finishes["result"])


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (
            {"session_id": "abc", "user_input": "hi", "model": "smollm2", "system_prompt": ""},
            {"job_id": 1, "conversation_id": "abc", "created_new": False},
        ),
        ({"user_input": "hi"}, {"job_id": 1, "conversation_id": "<uuid>", "created_new": True}),
        (
            {"session_id": "", "user_input": "hi"},
            {"job_id": 1, "conversation_id": "<uuid>", "created_new": True},
        ),
    ],
)
async def test_the_older_submit_answers_as_it_did(config: Config, sent: dict[str, str], told: dict[str, Any]) -> None:
    async with serving(config) as api:
        answer = await api.post("/api/submit", json=sent)
    assert answer.status_code == 200
    assert matches(told, answer.json())
    assert set(answer.json()) == set(told)
