"""Thinking of every family through a worker: apart in the stream and in the record, also after an engine died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from llamalith_app.engine.reasoning import FAMILIES
from llamalith_app.settings.config import Config
from llamalith_app.store.database import Database
from llamalith_app.web.follow import Timings
from tests.settle import eventually
from tests.streams.sse import heard, read_all
from tests.web.conftest import log_in, serving
from tests.worker.conftest import Script, ended, working_in_process

# As the models write them: what is a marker stands by itself.
WRITTEN: dict[str, tuple[list[str], list[str], list[str]]] = {
    "harmony": (
        ["<|channel|>", "analysis", "<|message|>"],
        ["<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"],
        [],
    ),
    "gemma4": (["<|channel>", "thought\n"], ["<channel|>"], []),
    "command-r7b": (["<|START_THINKING|>"], ["<|END_THINKING|>", "<|START_RESPONSE|>"], ["<|END_RESPONSE|>"]),
    "cohere": (["<|START_THINKING|>"], ["<|END_THINKING|>", "<|START_TEXT|>"], ["<|END_TEXT|>"]),
    "magistral": (["[THINK]"], ["[/THINK]"], []),
    "seed": (["<seed:think>"], ["</seed:think>"], []),
    "minimax-m3": (["<mm:think>"], ["</mm:think>"], []),
    "granite": (["<think>"], ["</think>", "\n", "<response>"], ["</response>", "\n"]),
    "apriel": (
        ["Here are my reasoning steps:", "\n"],
        ["\n", "[BEGIN FINAL RESPONSE]", "\n"],
        ["[END FINAL RESPONSE]"],
    ),
    "exaone": (["<thought>", "\n"], ["\n", "</thought>", "\n\n"], []),
    "think": (["<think>", "\n"], ["\n", "</think>", "\n\n"], []),
    "thinking": (["<thinking>"], ["</thinking>"], []),
}
THOUGHT, REPLY = "Hm, so…", "It is 4. 🐉"


def with_models(config: Config, names: list[str]) -> Config:
    models = tuple(msgspec.structs.replace(config.models[0], name=name) for name in names)
    return msgspec.structs.replace(config, models=models)


async def submit(api: httpx.AsyncClient, model: str, content: str, **parameters: Any) -> int:
    answer = await api.post("/api/jobs", json={"model": model, "content": content, **parameters})
    assert answer.status_code == 200, answer.text
    job_id: int = answer.json()["job_id"]
    return job_id


@pytest.mark.slow
@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "texts"])
async def test_of_every_family_the_thinking_is_apart_from_the_reply(
    config: Config, script: Script, timings: Timings, database: Database, has_tokens: bool
) -> None:
    assert set(WRITTEN) == set(FAMILIES)
    rules: list[dict[str, Any]] = []
    for name, (before, between, behind) in WRITTEN.items():
        closing = FAMILIES[name].closes
        # Cut in two where it is quoted: so it is no token.
        thought = [THOUGHT, closing[:2], closing[2:]] if has_tokens else [THOUGHT]
        for content, reply in (
            ("ask", [*before, *thought, *between, REPLY, *behind]),
            ("open", [*thought, *between, REPLY, *behind]),
            ("cut", [*before, THOUGHT * 99]),
        ):
            rule = {"when": f"{content} {name}.", "reply": reply if has_tokens else "".join(reply)}
            rules.append({**rule, "opens_thinking": content == "open"})
        rules.append({"model": name, "family": name, "marker_tokens": has_tokens})
    script.write(*rules)
    config = with_models(config, list(WRITTEN))
    async with serving(config, follow_timings=timings) as api, working_in_process(config, script):
        jobs = {
            (name, content): await submit(api, name, f"{content} {name}.", max_tokens=60 if content == "cut" else 500)
            for name in WRITTEN
            for content in ("ask", "open", "cut")
        }
        for (name, content), job_id in jobs.items():
            job = await ended(database, job_id)
            if content == "cut":
                assert (job.result, job.finish_reason) == ("", "length"), name
                assert (job.thinking or "").startswith(THOUGHT)
                continue
            got = heard(await read_all(api, f"/api/jobs/{job_id}/events"))
            thought_of_it = THOUGHT + FAMILIES[name].closes * has_tokens
            assert (got.thinking, got.text) == (job.thinking, job.result) == (thought_of_it, REPLY), name
            assert (job.finish_reason, "restart" in got.kinds) == ("stop", False)


@pytest.mark.slow
async def test_a_later_attempt_knows_the_tokens_that_an_earlier_one_drew(
    config: Config, script: Script, timings: Timings, database: Database, tmp_path: Path
) -> None:
    before, between, _ = WRITTEN["harmony"]
    reply = [*before, "I write <|", "end|> here", *between, REPLY]
    script.write(
        {"model": "m", "family": "harmony", "marker_tokens": True},
        {"when": "first", "reply": reply, "after": 20, "signal": 9, "once": str(tmp_path / "first")},
        {"when": "second", "reply": reply, "after": 52, "signal": 9, "once": str(tmp_path / "second")},
    )
    config = with_models(config, ["m"])
    async with serving(config, follow_timings=timings) as api, working_in_process(config, script):
        for content in ("first", "second"):
            job_id = await submit(api, "m", content)
            job = await ended(database, job_id)
            got = heard(await read_all(api, f"/api/jobs/{job_id}/events"))
            assert (job.attempt, job.thinking, job.result) == (2, "I write <|end|> here", REPLY)
            assert (got.thinking, got.text) == (job.thinking, job.result)


async def test_of_a_model_that_does_not_think_every_marker_is_part_of_the_reply(
    config: Config, script: Script, timings: Timings, database: Database
) -> None:
    written = " ".join("".join([*before, "x", *between, "y", *behind]) for before, between, behind in WRITTEN.values())
    script.write({"model": "m", "family": ""}, {"when": "go", "reply": written})
    config = with_models(config, ["m"])
    async with serving(config, follow_timings=timings) as api, working_in_process(config, script):
        job = await ended(database, await submit(api, "m", "go"))
    assert (job.result, job.thinking) == (written, None)


LONG = {"when": "hm", "reply": f"<think>{'Hm. ' * 100}</think>{REPLY}", "after": 20}


async def test_a_job_answers_now_where_it_thinks(worked: httpx.AsyncClient, script: Script, tmp_path: Path) -> None:
    script.write(LONG | {"gate": str(tmp_path / "gate")})
    job_id = await submit(worked, "smollm2", "hm")
    async with worked.stream("GET", f"/api/jobs/{job_id}/events") as stream:
        async for line in stream.aiter_lines():
            if line == "event: thinking":
                break
    answer = await worked.post(f"/api/jobs/{job_id}/answer-now")
    assert (answer.status_code, answer.json()["status"]) == (200, "processing")
    job = await eventually_ended(worked, job_id)
    assert (job["result"], job["finish_reason"]) == (REPLY, "stop")
    assert 0 < len(job["thinking"]) < 100
    ended_already = await worked.post(f"/api/jobs/{job_id}/answer-now")
    assert (ended_already.status_code, ended_already.json()["detail"]) == (
        409,
        f"Job {job_id} is done: it thinks no more.",
    )
    assert (await worked.post("/api/jobs/99/answer-now")).status_code == 404


async def test_a_job_that_waits_will_not_think(
    config: Config, database: Database, script: Script, tmp_path: Path
) -> None:
    script.write(LONG | {"gate": str(tmp_path / "gate")})
    async with serving(config) as api:
        job_id = await submit(api, "smollm2", "hm")
        await api.post(f"/api/jobs/{job_id}/answer-now")
        async with working_in_process(config, script):
            job = await eventually_ended(api, job_id)
    assert job["result"] == REPLY


async def test_the_page_has_the_button_and_leads_back_to_the_chat(
    config: Config, script: Script, tmp_path: Path
) -> None:
    script.write(LONG | {"gate": str(tmp_path / "gate")})
    async with serving(config) as browser, working_in_process(config, script):
        job_id = await submit(browser, "smollm2", "hm")
        await log_in(browser)
        conversation = (await browser.get(f"/chat/api/jobs/{job_id}")).json()["conversation_id"]
        page = await browser.get(f"/chat/conversations/{conversation}")
        assert f'formaction="/chat/jobs/{job_id}/answer-now"' in page.text
        answer = await browser.post(f"/chat/jobs/{job_id}/answer-now", data={"conversation_id": conversation})
        assert answer.headers["location"] == f"/chat/conversations/{conversation}#job-{job_id}"
        assert (await eventually_ended(browser, job_id, "/chat/api"))["result"] == REPLY
        assert (await browser.post(f"/chat/jobs/{job_id}/answer-now", data={})).status_code == 303


async def eventually_ended(api: httpx.AsyncClient, job_id: int, prefix: str = "/api") -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        job: dict[str, Any] = (await api.get(f"{prefix}/jobs/{job_id}")).json()
        return job if job["status"] in ("done", "error", "cancelled") else None

    job = await eventually(look)
    assert job is not None
    return job
