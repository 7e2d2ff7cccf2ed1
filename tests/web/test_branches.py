"""The branches of a conversation, by API and by the forms of its page."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, insert

from llamalith_app.controllers.pages.conversation import TURNS_ON_PAGE
from llamalith_app.settings.config import Config
from llamalith_app.store import check
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission
from llamalith_app.store.tables import UserRow
from tests.store.samples import NOW, finish, prompt
from tests.web.conftest import log_in, serving
from tests.web.test_cancel import claim, queue


async def answered(client: httpx.AsyncClient, database: Database, content: str, **fields: Any) -> dict[str, Any]:
    """The job, which is done, as the API shows it."""
    job_id = await queue(client, content=content, **fields)
    await database.write(finish, await claim(database, fields.get("model", "smollm2")), f"reply to {content}")
    found: dict[str, Any] = (await client.get(f"/api/jobs/{job_id}")).json()
    return found


async def said(client: httpx.AsyncClient, conversation_id: str = "c") -> list[str]:
    answer = await client.get(f"/api/conversations/{conversation_id}/messages")
    return [message["content"] for message in answer.json()["messages"]]


async def test_a_client_walks_edits_and_prunes_the_tree(api: httpx.AsyncClient, database: Database) -> None:
    first = await answered(api, database, "first")
    second = await answered(api, database, "second")
    accepted = (await api.post("/api/conversations/c/reply", json={"content": "2b", "parent": first["turn_id"]})).json()
    assert accepted["turn_id"] == (await api.get(f"/api/jobs/{accepted['job_id']}")).json()["turn_id"]
    assert await said(api) == ["first", "reply to first", "2b"]
    tree = (await api.get("/api/conversations/c/tree")).json()
    assert [(turn["id"], turn["parent"], turn["depth"], turn["status"]) for turn in tree["turns"]] == [
        (1, None, 0, "done"),
        (2, 1, 1, "done"),
        (3, 1, 1, "queued"),
    ]
    assert [(turn["prompt"], turn["reply"], turn["job_id"]) for turn in tree["turns"]] == [
        ("first", "reply to first", 1),
        ("second", "reply to second", 2),
        ("2b", None, 3),
    ]
    assert (tree["head"], tree["more"], tree["conversation_id"]) == (3, False, "c")
    assert (await api.get("/api/conversations/c/tree?limit=1&after=1")).json()["turns"] == tree["turns"][1:2]
    shown = await api.post("/api/conversations/c/head", json={"turn_id": second["turn_id"]})
    assert shown.json() == {"ok": True, "conversation_id": "c", "head": 2}
    assert (await said(api))[-2:] == ["second", "reply to second"]
    latest = (await api.get("/api/conversations/c/latest")).json()
    assert (latest["last_user"]["content"], latest["last_job"]["id"]) == ("second", 2), "all of one branch"
    refused = await api.delete("/api/conversations/c/turns/3")
    assert (refused.status_code, refused.json()["type"]) == (409, "about:llamalith/job-open")
    await api.post("/api/jobs/3/cancel")
    assert (await api.delete("/api/conversations/c/turns/3")).json()["head"] == 2
    assert (await api.get("/api/jobs/3")).status_code == 404
    assert (await api.delete("/api/conversations/c/turns/1")).json()["head"] == 2
    assert await said(api) == ["second", "reply to second"]
    assert await database.read(check.violations) == []


async def test_a_fork_is_there_at_once_and_once_for_a_key(api: httpx.AsyncClient, database: Database) -> None:
    first = await answered(api, database, "first", system_prompt="be brief")
    await queue(api, content="second")
    body = {"turn_id": first["turn_id"], "conversation_id": " fork "}
    made = await api.post("/api/conversations/c/fork", json=body, headers={"Idempotency-Key": "k"})
    assert made.json() == {"ok": True, "conversation_id": "fork", "head": 3}
    again = await api.post("/api/conversations/c/fork", json=body, headers={"Idempotency-Key": "k"})
    assert again.json() == made.json()
    assert await said(api, "fork") == ["be brief", "first", "reply to first", "be brief"]
    taken = await api.post("/api/conversations/c/fork", json=body)
    assert (taken.status_code, taken.json()["type"]) == (409, "about:llamalith/conversation-exists")
    open_path = await api.post("/api/conversations/c/fork", json={"turn_id": 2})
    assert (open_path.status_code, open_path.json()["type"]) == (409, "about:llamalith/job-open")
    nameless = (await api.post("/api/conversations/c/fork", json={"turn_id": 1})).json()
    assert len(nameless["conversation_id"]) == 36
    await queue(api, "fork", content="on the fork")
    assert (await said(api, "fork"))[-1] == "on the fork"
    assert (await said(api))[-1] == "second"
    of_both = (await api.get("/api/conversations/fork/tree")).json()["turns"]
    assert [(turn["id"], turn["conversation_id"]) for turn in of_both] == [(1, "c"), (3, "fork"), (5, "fork")]
    assert await database.read(check.violations) == []


async def test_a_reply_is_written_again_with_what_is_to_be_different(
    api: httpx.AsyncClient, database: Database
) -> None:
    fields = {"temperature": 0.25, "max_tokens": 9, "assistant_context": "so far", "grammar_name": "yes_or_no"}
    job = await answered(api, database, "first", system_prompt="S", priority="batch", **fields)
    headers = {"Idempotency-Key": "k"}
    url = f"/api/jobs/{job['id']}/regenerate"
    answers = [(await api.post(url, json={}, headers=headers)).json() for _ in range(2)]
    assert answers[0] == answers[1], "once for a key"
    assert answers[0]["created_new"] is False
    same = (await api.get(f"/api/jobs/{answers[0]['job_id']}")).json()
    kept = ("user_input", "model", "grammar_name", "priority", "parameters", "timeout_s", "max_attempts")
    assert {name: same[name] for name in kept} == {name: job[name] for name in kept}
    assert same["retry_of"] is None
    assert await said(api) == ["S", "so far", "first"], "another first turn, without the old reply"
    other = (await api.post(url, json={"model": "other", "temperature": 1, "seed": 4})).json()
    changed = (await api.get(f"/api/jobs/{other['job_id']}")).json()
    assert (changed["model"], changed["parameters"]) == ("other", {"max_tokens": 9, "temperature": 1.0, "seed": 4})
    tree = (await api.get("/api/conversations/c/tree")).json()
    assert [turn["parent"] for turn in tree["turns"]] == [None, None, None]
    for body, detail in (
        ({"model": "none"}, "model: "),
        ({"temperature": 9}, "temperature: expected a number"),
        ({"response_format": {"type": "json_object"}}, "response_format: a reply can be held to it or to grammar_name"),
    ):
        answer = await api.post(url, json=body)
        assert (answer.status_code, detail in answer.json()["detail"]) == (400, True), answer.text
    assert (await api.post(url, json={"seed": 1}, headers=headers)).status_code == 409
    assert len((await api.get("/api/jobs")).json()["jobs"]) == 3
    assert await database.read(check.violations) == []


async def test_a_prompt_that_waits_is_edited_and_one_that_was_started_is_not(
    api: httpx.AsyncClient, database: Database
) -> None:
    await queue(api, content="frist")
    await queue(api, content="scond")
    edited = await api.patch("/api/jobs/2", json={"content": " second "})
    assert (edited.status_code, edited.json()["user_input"]) == (200, "second")
    assert edited.json()["progress"]["waits_for"] == 1
    assert await said(api) == ["frist", "second"]
    await claim(database)
    late = await api.patch("/api/jobs/1", json={"content": "first"})
    assert (late.status_code, late.json()["type"]) == (409, "about:llamalith/job-started")
    for body in ({"content": "  "}, {}, {"content": 3}):
        assert (await api.patch("/api/jobs/2", json=body)).status_code == 400
    assert await said(api) == ["frist", "second"]


async def test_what_names_no_turn_of_this_conversation_is_refused_and_nothing_is_stored(
    api: httpx.AsyncClient, database: Database
) -> None:
    await answered(api, database, "first")
    await answered(api, database, "elsewhere", conversation_id="d")
    for parent in (2, 99, -1, "x", 1.5, 2**63):
        answer = await api.post("/api/conversations/c/reply", json={"content": "x", "parent": parent})
        assert (answer.status_code, "parent: " in answer.text) == (400, True), (parent, answer.text)
    answer = await api.post("/api/jobs", json={"content": "x", "parent": 1})
    assert (answer.status_code, "leave parent out" in answer.json()["detail"]) == (400, True)
    for turn_id in (2, 99):
        for route in ("head", "fork"):
            answer = await api.post(f"/api/conversations/c/{route}", json={"turn_id": turn_id})
            assert (answer.status_code, answer.json()["detail"]) == (404, "This conversation has no such turn")
        assert (await api.delete(f"/api/conversations/c/turns/{turn_id}")).status_code == 404
    for method, path in (
        ("GET", "/api/conversations/x/tree"),
        ("POST", "/api/conversations/x/head"),
        ("POST", "/api/conversations/x/fork"),
        ("DELETE", "/api/conversations/x/turns/1"),
        ("POST", "/api/jobs/99/regenerate"),
        ("PATCH", "/api/jobs/99"),
    ):
        answer = await api.request(method, path, json={"turn_id": 1, "content": "x"} if method != "DELETE" else None)
        assert answer.status_code == 404, path
    assert (await api.delete("/api/conversations/c/turns/1?cascade=true")).status_code == 400
    for limit in ("limit=0", "limit=501", "after=-1"):
        assert (await api.get(f"/api/conversations/c/tree?{limit}")).status_code == 400
    assert len((await api.get("/api/jobs")).json()["jobs"]) == 2


def strangers_turn(connection: Connection) -> int:
    user = connection.execute(insert(UserRow).values(name="o", role="user", created_at=NOW).returning(UserRow.id))
    accepted = submission.submit(connection, prompt("theirs", "theirs", owner_id=user.scalar_one()), NOW)
    assert accepted.turn_id is not None
    return accepted.turn_id


async def test_nobody_reaches_the_turns_of_another(api: httpx.AsyncClient, database: Database) -> None:
    await answered(api, database, "mine")
    theirs = await database.write(strangers_turn)
    for conversation in ("theirs", "c"):
        for route in ("head", "fork"):
            answer = await api.post(f"/api/conversations/{conversation}/{route}", json={"turn_id": theirs})
            assert answer.status_code == 404
        assert (await api.delete(f"/api/conversations/{conversation}/turns/{theirs}")).status_code == 404
    assert (await api.get("/api/conversations/theirs/tree")).status_code == 404
    assert (await api.post("/api/jobs/2/regenerate", json={})).status_code == 404
    assert (await api.patch("/api/jobs/2", json={"content": "x"})).status_code == 404
    answer = await api.post("/api/conversations/c/reply", json={"content": "x", "parent": theirs})
    assert answer.status_code == 400
    assert len(await said(api)) == 2


# The page


def shown(page: httpx.Response) -> list[str]:
    """The prompts in its list."""
    return [
        unescape(found)
        for found in re.findall(r'aria-label="You">\s*<div class="bubble">\s*<p [^>]*>([^<]*)</p>', page.text)
    ]


def items(page: httpx.Response) -> list[int]:
    """The jobs in its list."""
    return [int(job_id) for job_id in re.findall(r'<li id="job-(\d+)"', page.text)]


def hidden(page: httpx.Response, name: str) -> str:
    (found,) = re.findall(rf'<input type="hidden" name="{name}" value="([^"]*)">', page.text)
    return unescape(found)


def live(page: httpx.Response) -> str:
    (found,) = re.findall(r'data-live="([^"]*)"', page.text)
    return unescape(found)


async def post(browser: httpx.AsyncClient, path: str, **fields: object) -> str:
    answer = await browser.post(path, data={"conversation_id": "c", **fields})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


async def test_the_buttons_of_a_conversation_lead_back_to_it(browser: httpx.AsyncClient, database: Database) -> None:
    await answered(browser, database, "first", system_prompt="S")
    await answered(browser, database, "second")
    at = "/chat/conversations/c"
    assert await post(browser, "/chat/jobs/2/regenerate", once="o") == f"{at}#job-3"
    assert await post(browser, "/chat/jobs/2/regenerate", once="o") == f"{at}#job-3", "a double click"
    assert await post(browser, "/chat/jobs/2/regenerate", once="o", model="other") == f"{at}#job-4", "another button"
    assert await post(browser, "/chat/conversation/head", turn_id=2) == f"{at}#job-2"
    assert (await said(browser))[-1] == "reply to second"
    assert await post(browser, "/chat/jobs", content="edited", beside=1) == f"{at}#job-5"
    assert await said(browser) == ["S", "edited"], "the system prompt stays"
    assert await post(browser, "/chat/jobs/5/edit", content="edited again") == f"{at}#job-5"
    assert shown(await browser.get(at)) == ["edited again"]
    assert await post(browser, "/chat/jobs/5/remove") == at
    assert shown(await browser.get(at)) == ["first", "second"], "back on the newest branch that is left"
    assert (await browser.get("/api/jobs/5")).status_code == 404
    assert await post(browser, "/chat/conversation/head", turn_id=2) == f"{at}#job-2"
    assert await post(browser, "/chat/conversation/turns/delete", turn_id=2) == f"{at}#job-1"
    fork = await post(browser, "/chat/conversation/fork", turn_id=1)
    assert fork.startswith("/chat/conversations/")
    assert shown(await browser.get(fork)) == ["first"]
    of_fork = fork.rpartition("/")[2]
    again = await post(browser, "/chat/jobs/1/regenerate", conversation_id=of_fork)
    assert again == f"{fork}#job-6", "in the fork, whose page showed it"
    assert await database.read(check.violations) == []


async def test_an_arrow_leads_to_the_page_that_has_the_turn(browser: httpx.AsyncClient) -> None:
    for number in range(TURNS_ON_PAGE + 5):
        await queue(browser, content=f"prompt {number}")
    await queue(browser, content="anew", parent=0)
    location = await post(browser, "/chat/conversation/head", turn_id=1)
    assert location == f"/chat/conversations/c?before={TURNS_ON_PAGE}#job-1"
    page = await browser.get(location)
    assert shown(page)[0] == "prompt 0"
    assert len(shown(page)) == TURNS_ON_PAGE
    near = await post(browser, "/chat/conversation/head", turn_id=20)
    assert near == "/chat/conversations/c#job-20"


async def test_a_text_that_comes_too_late_is_sent_beside_the_prompt_that_runs(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await queue(browser, content="frist", system_prompt="S")
    await claim(database)
    draft = await browser.post("/chat/jobs/1/edit", data={"content": "first"})
    assert (draft.status_code, hidden(draft, "beside")) == (409, "1")
    assert "\nfirst</textarea>" in draft.text
    sent = await post(browser, "/chat/jobs", content="first", beside=hidden(draft, "beside"))
    assert sent == "/chat/conversations/c#job-2"
    assert await said(browser) == ["S", "first"]
    removed = await post(browser, "/chat/jobs/1/remove")
    assert removed == "/chat/conversations/c#job-1", "it runs: only cancelled"
    assert (await browser.get("/api/jobs/1")).json()["status"] == "cancelled"
    gone = await browser.post("/chat/jobs", data={"content": "x", "conversation_id": "c", "beside": "99"})
    assert (gone.status_code, hidden(gone, "beside")) == (404, "")
    for wrong in ("0", "x", "1e3", "9" * 19):
        answer = await browser.post("/chat/conversation/head", data={"conversation_id": "c", "turn_id": wrong})
        assert answer.status_code == 400, wrong


async def test_two_windows_on_two_branches_each_stay_on_theirs(browser: httpx.AsyncClient, database: Database) -> None:
    await answered(browser, database, "first")
    await answered(browser, database, "second")
    here = await browser.get("/chat/conversations/c")
    await post(browser, "/chat/jobs", content="edited", beside=2)
    there = await browser.get("/chat/conversations/c")
    assert (shown(here), shown(there)) == (["first", "second"], ["first", "edited"])
    poll = await browser.get(live(here))
    assert (items(poll), "data-elsewhere" in poll.text, "data-reload" in poll.text) == ([], True, False)
    # Each sends to the branch that it shows, and sees that alone grow.
    await post(browser, "/chat/jobs", content="after second", seen=hidden(here, "seen"))
    assert items(await browser.get(live(here))) == [4]
    assert items(await browser.get(live(there))) == [3], "which is open"
    await post(browser, "/chat/jobs", content="after edited", seen=hidden(there, "seen"))
    assert items(await browser.get(live(there))) == [3, 5]
    here_next = await browser.get(live(here))
    assert items(here_next) == [4]
    await post(browser, "/chat/jobs", content="more of second", seen=hidden(here, "seen"))
    assert items(await browser.get(live(here_next))) == [4, 6]
    # What a window shows is deleted: it has to load again.
    last = re.findall(r"seen=(\d+)", live(await browser.get(live(here_next))))[0]
    await post(browser, "/chat/jobs/6/remove")
    lost = await browser.get(f"/chat/conversation/turns?id=c&from=3&known=4&seen={last}")
    assert "data-reload" in lost.text


async def test_a_stream_has_the_jobs_of_every_branch_in_the_order_in_which_they_run(
    config: Config, database: Database
) -> None:
    async with serving(config) as api:
        first = await answered(api, database, "first")
        await queue(api, content="second")
        await queue(api, content="2b", parent=first["turn_id"])
        await api.post("/api/conversations/c/head", json={"turn_id": 2})
        ended: list[int] = []
        async with api.stream("GET", "/api/conversations/c/events") as stream:
            event = ""
            async for line in stream.aiter_lines():
                if line.startswith("id: ") and not ended and not event:
                    await database.write(finish, await claim(database), "one")
                event = line.removeprefix("event: ") if line.startswith("event: ") else event
                if line.startswith("data: ") and event == "done":
                    ended.append(int(re.findall(r'"id":(\d+)', line)[0]))
                    if len(ended) == 2:
                        break
                    await database.write(finish, await claim(database), "two")
        assert ended == [2, 3]
        assert (await said(api))[-2:] == ["second", "one"], "the head is where it was"


@pytest.mark.parametrize("path", ["conversation/head", "conversation/fork", "conversation/turns/delete", "jobs/1/edit"])
async def test_a_form_of_another_site_changes_nothing(config: Config, path: str) -> None:
    async with serving(config) as client:
        await queue(client, content="first")
        await log_in(client)
        fields = {"conversation_id": "c", "turn_id": "1", "content": "x"}
        foreign = await client.post(f"/chat/{path}", data=fields, headers={"Origin": "https://elsewhere.example"})
        assert foreign.status_code == 403
        del client.headers["Origin"]
        assert (await client.post(f"/chat/{path}", data=fields)).status_code == 403, "no CSRF token"
        assert await said(client) == ["first"]
