"""One prompt for several models, by API and by the form of the page, and how the page shows their answers."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx
import msgspec

from llamalith_app.contracts.jobs import MAX_COMPARED
from llamalith_app.settings.config import Config, ModelConfig
from llamalith_app.store import check
from llamalith_app.store.database import Database
from tests.store.samples import finish
from tests.web.conftest import log_in, serving
from tests.web.test_branches import live, post, said
from tests.web.test_cancel import claim, queue

MODELS = ["smollm2", "other", "third", "fourth"]
COMPARE = {"compare:other": "1", "compare:third": "1"}


def with_models(config: Config, **changes: Any) -> Config:
    models = tuple(ModelConfig(name=name, path=config.models[0].path) for name in MODELS)
    return msgspec.structs.replace(config, models=models, **changes)


async def test_a_client_asks_several_models_the_same_and_all_or_none_is_stored(
    config: Config, database: Database
) -> None:
    async with serving(with_models(config, max_queued=6)) as api:
        first = await queue(api, content="first", system_prompt="S")
        await database.write(finish, await claim(database), "hello")

        async def compare(**fields: Any) -> httpx.Response:
            headers = {"Idempotency-Key": "k"} if fields.pop("keyed", False) else {}
            body = {"content": "x", "models": MODELS[:3], "conversation_id": "c"} | fields
            return await api.post("/api/jobs/compare", json=body, headers=headers)

        made = await compare(keyed=True, temperature=0.25)
        assert made.status_code == 200, made.text
        jobs = made.json()["jobs"]
        assert [(job["job_id"], job["model"], job["turn_id"], job["conversation_id"]) for job in jobs] == [
            (2, "smollm2", 2, "c"),
            (3, "other", 3, "c"),
            (4, "third", 4, "c"),
        ]
        assert (await compare(keyed=True, temperature=0.25)).json() == made.json(), "once for a key"
        assert (await compare(keyed=True)).status_code == 409
        tree = (await api.get("/api/conversations/c/tree")).json()
        assert [(turn["parent"], turn["prompt"]) for turn in tree["turns"]] == [(None, "first"), *[(first, "x")] * 3]
        assert tree["head"] == 2, "that of the first"
        assert (await api.get("/api/jobs/4")).json()["parameters"] == {"temperature": 0.25}
        for fields, detail in (
            ({"models": ["other", "none"]}, 'models: "none" is not offered here; these are: smollm2, other, third'),
            ({"models": ["other", "other"]}, 'models: "other" stands there twice'),
            ({"models": MODELS}, f"models: expected a list of at most {MAX_COMPARED} entries"),
            ({"models": []}, "models: expected a list of at least 1"),
            ({"models": [""]}, 'models: "" is not offered here'),
            ({"model": "other"}, "model: leave it out here"),
            ({"content": " "}, "content is required"),
            ({"parent": 99}, "parent: "),
        ):
            refused = await compare(**fields)
            assert refused.status_code == 400, refused.text
            assert detail in refused.json()["detail"]
        # 3 of 6 wait: two more fit, then three do not, and of them none is stored.
        assert (await compare(models=MODELS[:2], conversation_id=None)).json()["jobs"][1]["created_new"]
        full = await compare()
        assert (full.status_code, full.json()["type"]) == (429, "about:llamalith/queue-full")
        assert len((await api.get("/api/jobs")).json()["jobs"]) == 6
        assert (await compare(models=["other"])).status_code == 200
        assert await database.read(check.violations) == []


def columns(page: httpx.Response) -> list[tuple[str, str]]:
    """Each item of the list of turns: its id, and `chosen`, `side` or nothing."""
    items = re.findall(r'<li( class="([a-z ]+)")? ?id="([a-z]+-\d+)"', page.text)
    return [(name, kind.split()[-1] if kind else "") for _, kind, name in items]


async def test_the_form_asks_several_models_and_the_page_shows_their_answers_beside_each_other(
    config: Config, database: Database
) -> None:
    async with serving(with_models(config)) as browser:
        await log_in(browser)
        at = "/chat/conversations/c"
        assert 'name="compare:third"' in (await browser.get("/chat/")).text
        fields = {"content": "x", "system_prompt": "S", "model": "smollm2", "once": "o", **COMPARE}
        assert await post(browser, "/chat/jobs", **fields) == f"{at}#job-1"
        assert await post(browser, "/chat/jobs", **fields) == f"{at}#job-1", "a double click"
        page = await browser.get(at)
        sides = [("prompt-0", "compared"), ("job-1", "chosen"), ("job-2", "side"), ("job-3", "side")]
        assert columns(page) == sides
        assert re.findall(r'class="said model" aria-label="(\w+)"', page.text) == MODELS[:3]
        assert (page.text.count('class="bubble"'), "versions" in page.text) == (1, False)
        # Of those that still run only what changes comes again; all of them until the last has ended.
        await database.write(finish, await claim(database), "one")
        poll = await browser.get(live(page))
        assert columns(poll) == sides
        assert re.findall(r'id="([a-z]+-\d)"[^>]* data-brief', poll.text) == ["prompt-0", "job-2", "job-3"]
        assert 'data-said="smollm2: The reply is there"' in poll.text
        # The chat goes on from another one, before all are done. Its answers stay where they are.
        assert await post(browser, "/chat/conversation/head", turn_id=2) == f"{at}#job-2"
        assert await post(browser, "/chat/jobs", content="y", seen=2) == f"{at}#job-4"
        assert await said(browser) == ["S", "x", "y"]
        after = await browser.get(at)
        assert columns(after) == [sides[0], ("job-1", "side"), ("job-2", "chosen"), sides[3], ("job-4", "")]
        # A window that had other columns gets those of its own branch.
        assert columns(await browser.get(live(page))) == sides
        await browser.post("/api/jobs/3/cancel")
        assert re.findall(r"/chat/jobs/3/(re\w+)", (await browser.get(at)).text)[:1] == ["regenerate"], "at its place"
        # Another version makes arrows; "Ask" makes a column.
        assert await post(browser, "/chat/jobs/3/regenerate") == f"{at}#job-5"
        again = await browser.get(at)
        assert columns(again) == [sides[0], ("job-1", "side"), ("job-2", "side"), ("job-5", "chosen")]
        assert "4/4" in again.text
        assert await post(browser, "/chat/jobs/4/regenerate", model="fourth") == f"{at}#job-6"
        await post(browser, "/chat/conversation/head", turn_id=6)
        assert columns(await browser.get(at))[-3:] == [("prompt-1", "compared"), ("job-4", "side"), ("job-6", "chosen")]
        assert await database.read(check.violations) == []


async def test_a_form_with_models_that_cannot_be_asked_comes_back_as_it_was(config: Config, database: Database) -> None:
    async with serving(with_models(config)) as browser:
        await log_in(browser)
        token = re.findall(r'name="csrf_token" value="([^"]+)"', (await browser.get("/chat/")).text)[0]

        async def send(**fields: str) -> httpx.Response:
            return await browser.post("/chat/jobs", data={"csrf_token": token, "content": "typed", **fields})

        for fields, why in (
            ({**COMPARE, "compare:gone": "1"}, "A message can be sent to 3 models at once: choose fewer of them."),
            ({"compare:other": "1", "compare:gone": "1"}, '"gone" is not offered here'),
            ({"compare": "other\nthird", "temperature": "99"}, "temperature: expected a number"),
        ):
            draft = await send(**fields)
            assert (draft.status_code, why in unescape(draft.text)) == (400, True), draft.text
            assert "typed" in draft.text
            assert re.search(r'name="compare:other" value="1" checked', draft.text), "the boxes stay as they were"
        assert (await browser.get("/api/jobs")).json()["jobs"] == []
        # The model that is chosen anyway is not asked twice.
        assert (await send(model="other", **COMPARE)).status_code == 303
        assert [job["model"] for job in (await browser.get("/api/jobs")).json()["jobs"]] == ["third", "other"]
        assert await database.read(check.violations) == []
