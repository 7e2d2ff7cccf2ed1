"""What OpenAI clients sent, on the pages."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx
import pytest

from llamalith_app.settings.config import Config
from tests.web.conftest import log_in, serving
from tests.worker.conftest import Script, working_in_process

HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Where is the <gold>?"},
    {"role": "assistant", "content": "On the island."},
    {"role": "user", "content": "Which island?"},
]


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.fixture
async def browser(config: Config, script: Script) -> Any:
    async with serving(config) as browser, working_in_process(config, script):
        await browser.post("/v1/chat/completions", json={"messages": HISTORY})
        await log_in(browser)
        yield browser


async def test_a_chat_of_a_client_is_found_by_its_source_and_shows_the_whole_history(
    browser: httpx.AsyncClient,
) -> None:
    page = await browser.get("/chat/conversations", params={"source": "v1"})
    assert "Where is the <gold>?" in words(page.text)
    conversation = (await browser.get("/chat/api/jobs/1")).json()["conversation_id"]
    address = f"/chat/conversations/{conversation}"
    assert address in page.text
    chat = words((await browser.get(address)).text)
    assert "2 messages were sent with it You Where is the <gold>? Assistant On the island." in chat
    job = await browser.get("/chat/jobs/1")
    assert "2 messages were sent with it" in words(job.text)
    assert "The request that makes it again" not in job.text
    assert (await browser.get("/chat/jobs/1/request.json")).status_code == 404


async def test_another_prompt_in_its_place_keeps_the_history(browser: httpx.AsyncClient) -> None:
    conversation = (await browser.get("/chat/api/jobs/1")).json()["conversation_id"]
    fields = {"content": "How deep?", "model": "smollm2", "beside": "1", "conversation_id": conversation}
    await browser.post("/chat/jobs", data=fields)
    (job, _) = (await browser.get("/chat/api/jobs")).json()["jobs"]
    assert job["user_input"] == "How deep?"
    again = {"content": "How far?", "model": "smollm2", "priority": "normal", "system_prompt": "", "once": "x"}
    await browser.post("/chat/jobs/1/again", data=again)
    for job_id in (2, 3):
        assert "2 messages were sent with it" in words((await browser.get(f"/chat/jobs/{job_id}")).text)
