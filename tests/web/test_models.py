"""Models, forecasts and the limit of the queue, as API and page show them."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.settings.config import Config
from llamalith_app.store import workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from tests.store.samples import register_worker
from tests.web.conftest import log_in, serving


async def report(database: Database, *engines: EngineStatus) -> None:
    """As a worker's heartbeat does."""
    worker = await database.write(register_worker)
    await database.write(workers.heartbeat, worker, datetime.now(UTC), msgspec.json.encode(engines).decode())


LOADED = EngineStatus(
    model="smollm2",
    state="loaded",
    n_slots=2,
    n_used=1,
    tokens_per_s=20.0,
    prompt_tokens_per_s=300.0,
    load_s=2.0,
    job_s=10.0,
    completion_tokens=100.0,
)


async def test_models_are_listed_with_their_state_in_the_workers(
    config: Config, api: httpx.AsyncClient, database: Database
) -> None:
    await report(database, LOADED, EngineStatus(model="other", state="failed", reason="It is broken.", n_slots=4))
    await report(database, EngineStatus(model="smollm2", state="loading", progress=0.5, n_slots=3, n_used=2))
    await api.post("/api/jobs", json={"content": "x", "model": "other"})
    first, second = (await api.get("/api/models")).json()["models"]
    assert first == {
        "name": "smollm2",
        "file": str(config.models[0].path),
        "size_bytes": None,
        "n_ctx": 4096,
        "format": "auto",
        "state": "loaded",
        "progress": None,
        "reason": None,
        "slots": 5,
        "slots_used": 3,
        "tokens_per_s": 20.0,
        "prompt_tokens_per_s": 300.0,
        "prompt_tokens_computed": 0,
        "prompt_tokens_reused": 0,
        "prompt_format": None,
        "reasoning": None,
        "queued": 0,
        "memory_bytes": None,
        "pinned": False,
    }
    assert (second["state"], second["reason"], second["queued"]) == ("failed", "It is broken.", 1)


async def test_without_a_worker_models_are_absent_and_their_file_sizes_are_shown(
    config: Config, api: httpx.AsyncClient, tmp_path: Path
) -> None:
    assert config.models[0].path is not None
    config.models[0].path.write_bytes(b"12345")
    for model in (await api.get("/api/models")).json()["models"]:
        assert (model["state"], model["slots"], model["size_bytes"]) == ("absent", 0, 5)


async def test_queued_jobs_show_when_they_will_start_and_end_once_a_job_was_measured(
    config: Config, database: Database
) -> None:
    await report(database, LOADED)
    async with serving(config) as api:
        for _ in range(5):
            await api.post("/api/jobs", json={"content": "x"})
        listed = (await api.get("/api/jobs")).json()["jobs"]
        single = (await api.get("/api/jobs/5")).json()
    shown = [(job["progress"]["start_eta_s"], job["progress"]["eta_s"]) for job in reversed(listed)]
    assert shown == [(0.0, 10.0), (0.0, 10.0), (10.0, 20.0), (10.0, 20.0), (20.0, 30.0)]
    assert (single["progress"]["start_eta_s"], single["progress"]["eta_s"]) == (20.0, 30.0)


async def test_a_job_shows_which_job_of_its_conversation_it_waits_for_and_starts_after_that_one_ends(
    config: Config, database: Database
) -> None:
    await report(database, LOADED)
    async with serving(config) as browser:
        for conversation_id in ("c", "c", "other", "c", "c"):
            await browser.post("/api/jobs", json={"content": "x", "conversation_id": conversation_id})
        listed = {job["id"]: job["progress"] for job in (await browser.get("/api/jobs")).json()["jobs"]}
        # The second of its conversation is the second in the queue, for which there is a slot; the last is after all.
        shown = {job_id: (one["waits_for"], one["start_eta_s"], one["eta_s"]) for job_id, one in listed.items()}
        assert shown == {
            1: (None, 0.0, 10.0),
            2: (1, 10.0, 20.0),
            3: (None, 10.0, 20.0),
            4: (2, 20.0, 30.0),
            5: (4, 30.0, 40.0),
        }
        single = (await browser.get("/api/jobs/5")).json()["progress"]
        assert single == listed[5]
        await log_in(browser)
        assert "Waits for the reply before it, starts in about 30 s" in (await browser.get("/chat/jobs")).text
        await database.write(transitions.claim, "smollm2", 0, await database.write(register_worker), datetime.now(UTC))
        behind_a_running = (await browser.get("/api/jobs/2")).json()["progress"]
        assert behind_a_running["waits_for"] == 1
        assert 8 < behind_a_running["start_eta_s"] <= 10
        await browser.post("/api/jobs/1/cancel")
        free = (await browser.get("/api/jobs/2")).json()["progress"]
        assert (free["waits_for"], free["start_eta_s"]) == (None, 0.0)


async def test_the_page_shows_the_models_state_and_when_a_job_starts(config: Config, database: Database) -> None:
    await report(database, LOADED)
    async with serving(config) as browser:
        for _ in range(3):
            await browser.post("/api/jobs", json={"content": "x"})
        await log_in(browser)
        for path in ("/chat/status", "/chat/status/board"):
            shown = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (await browser.get(path)).text))
            assert "smollm2 Busy 1 of 2 places taken, 3 wait, 20.0 tokens a second" in shown
            assert "Place 3 in the queue, starts in about 10 s" in shown


async def test_a_full_queue_accepts_exactly_its_limit_and_says_when_to_retry(
    config: Config, database: Database
) -> None:
    await report(database, LOADED)
    async with serving(msgspec.structs.replace(config, max_queued=5)) as api:
        answers = await asyncio.gather(*(api.post("/api/jobs", json={"content": "x"}) for _ in range(12)))
        assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 7
        refused = await api.post("/api/conversations/c/reply", json={"content": "x"})
        assert (await api.post("/api/jobs", json={"system_prompt": "no job"})).status_code == 200
        assert len((await api.get("/api/jobs")).json()["jobs"]) == 5
        await log_in(api)
        page = await api.post("/chat/jobs", data={"content": "kept text"})
    assert refused.status_code == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["type"] == "about:llamalith/queue-full"
    assert int(refused.headers["retry-after"]) >= 1
    assert page.status_code == 429
    assert "kept text" in page.text
    assert "5 jobs are waiting already" in page.text
