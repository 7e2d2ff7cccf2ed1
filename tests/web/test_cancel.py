"""Cancels by API and page, and the time limits of jobs."""

from __future__ import annotations

import re
import sqlite3
from datetime import UTC, datetime
from html import unescape
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, insert
from sqlalchemy.exc import OperationalError

from llamalith_app.jobs.cancel import CHUNK_JOBS
from llamalith_app.settings.config import Config
from llamalith_app.store import check
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads, submission, transitions, waiting
from llamalith_app.store.tables import Priority, UserRow
from tests.store.samples import finish, prompt, register_worker
from tests.web.conftest import log_in, serving


async def queue(client: httpx.AsyncClient, conversation_id: str = "c", **fields: Any) -> int:
    answer = await client.post("/api/jobs", json={"content": "x", "conversation_id": conversation_id, **fields})
    assert answer.status_code == 200, answer.text
    job_id: int = answer.json()["job_id"]
    return job_id


async def claim(database: Database, model: str = "smollm2") -> transitions.Claim:
    """The oldest of the most urgent class: a page's jobs are of another one than the API's."""
    worker = await database.write(register_worker)
    for priority in Priority:
        claimed = await database.write(transitions.claim, model, priority, worker, datetime.now(UTC))
        if claimed is not None:
            return claimed
    raise AssertionError("nothing is due")


async def states(client: httpx.AsyncClient) -> list[str]:
    return [job["status"] for job in reversed((await client.get("/api/jobs")).json()["jobs"])]


@pytest.mark.parametrize("door", ["/api", "/chat/api"])
@pytest.mark.parametrize(("method", "tail"), [("POST", "/cancel"), ("DELETE", "")])
async def test_a_cancel_is_final_and_is_answered_with_the_final_state(
    api: httpx.AsyncClient, database: Database, door: str, method: str, tail: str
) -> None:
    for _ in range(3):
        await queue(api)
    done = await claim(database)
    await database.write(finish, done)
    running = await claim(database)
    answers = []
    for job_id in (1, 2, 3, 1, 2, 3):
        answer = await api.request(method, f"{door}/jobs/{job_id}{tail}")
        assert answer.status_code == 200
        answers.append((answer.json()["id"], answer.json()["status"], answer.json()["progress"]))
    assert answers == [(1, "done", None), (2, "cancelled", None), (3, "cancelled", None)] * 2
    assert not await database.write(finish, running)
    assert (await api.get("/api/jobs/2")).json()["result"] is None
    assert await states(api) == ["done", "cancelled", "cancelled"]
    assert await database.read(check.violations) == []


def another_owners_job(connection: Connection) -> int:
    owner = insert(UserRow).values(name="other", role="user", created_at=datetime.now(UTC)).returning(UserRow.id)
    owner_id = connection.execute(owner).scalar_one()
    accepted = submission.submit(connection, prompt(owner_id=owner_id, model="smollm2"), datetime.now(UTC))
    assert accepted.job_id is not None
    return accepted.job_id


async def test_nobody_cancels_another_owner_s_job(api: httpx.AsyncClient, database: Database) -> None:
    job_id = await database.write(another_owners_job)
    for method, path in (
        ("POST", f"/api/jobs/{job_id}/cancel"),
        ("DELETE", f"/api/jobs/{job_id}"),
        ("POST", "/api/jobs/99/cancel"),
        ("POST", "/api/conversations/c/cancel"),
    ):
        answer = await api.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (404, "about:llamalith/not-found"), path
    assert (await api.post("/api/jobs/cancel?status=queued")).json() == {"ok": True, "cancelled": 0}
    assert (await database.read(reads.queue_places, {job_id: "smollm2"})).positions == {job_id: 1}


async def test_a_conversation_is_cancelled_as_a_whole(api: httpx.AsyncClient, database: Database) -> None:
    for conversation_id in ("c", "c", "other", "c"):
        await queue(api, conversation_id)
    running = await claim(database)
    assert (await api.post("/api/conversations/c/cancel")).json() == {"ok": True, "cancelled": 3}
    assert await states(api) == ["cancelled", "cancelled", "queued", "cancelled"]
    assert not await database.write(finish, running)
    assert (await api.post("/api/conversations/c/cancel")).json() == {"ok": True, "cancelled": 0}
    assert await database.read(check.violations) == []


@pytest.mark.parametrize(
    ("query", "left"),
    [
        ("status=queued", [1]),
        ("status=processing", [2, 3, 4]),
        ("status=queued&status=processing", []),
        ("status=queued&model=other", [1, 2, 4]),
        ("status=queued&conversation_id=a/b", [1, 2, 3]),
        ("status=queued&conversation_id=a/b&model=other", [1, 2, 3, 4]),
        ("status=queued&model=unknown", [1, 2, 3, 4]),
    ],
)
async def test_a_filter_cancels_the_matching_jobs_and_no_others(
    api: httpx.AsyncClient, database: Database, query: str, left: list[int]
) -> None:
    for conversation_id, model in (("c", "smollm2"), ("c", "smollm2"), ("d", "other"), ("a/b", "smollm2")):
        await queue(api, conversation_id, model=model)
    await claim(database)
    answer = await api.post(f"/api/jobs/cancel?{query}")
    assert answer.json() == {"ok": True, "cancelled": 4 - len(left)}
    assert [number for number, state in enumerate(await states(api), start=1) if state != "cancelled"] == left
    assert await database.read(check.violations) == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "status"),
        ("status=", "status"),
        ("status=done", "status"),
        ("status=queued&conversation_id=", "conversation_id: expected a string of at least 1 character"),
        ("status=queued&model=", "model"),
        ("status=queued&conversation=c", "conversation: unknown filter; these exist: status, conversation_id, model"),
    ],
)
async def test_an_empty_or_unknown_filter_is_refused_and_cancels_nothing(
    api: httpx.AsyncClient, query: str, words: str
) -> None:
    await queue(api)
    answer = await api.post(f"/api/jobs/cancel?{query}")
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert await states(api) == ["queued"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("jobs/cancel?status=queued", b'{"conversation_id": "d"}', "filters stand in the query: status, conv"),
        ("jobs/cancel?status=queued", b"conversation_id=d", "filters stand in the query: status, conv"),
        ("conversations/c/cancel", b'{"status": "queued"}', "send none"),
        ("conversations/c/cancel?status=queued", b"", "status: unknown filter; there are none here"),
    ],
)
async def test_input_that_a_cancel_would_ignore_is_refused_and_cancels_nothing(
    api: httpx.AsyncClient, path: str, body: bytes, words: str
) -> None:
    await queue(api)
    answer = await api.post(f"/api/{path}", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert await states(api) == ["queued"]


async def test_a_stored_cancel_is_not_a_503_if_the_database_cannot_be_read_after_it(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise OperationalError("SELECT", None, sqlite3.OperationalError("unable to open database file"))

    monkeypatch.setattr(waiting, "newly_runnable", unreadable)
    await queue(api)
    answer = await api.post("/api/jobs/cancel?status=queued")
    assert (answer.status_code, answer.json()["cancelled"]) == (200, 1)


@pytest.mark.parametrize("body", [b"", b" \n", b"{}", b"{ }", b"[]", b"null", b'""'])
async def test_an_empty_body_does_not_prevent_a_cancel(api: httpx.AsyncClient, body: bytes) -> None:
    await queue(api)
    assert (await api.post("/api/jobs/cancel?status=queued", content=body)).status_code == 200
    assert await states(api) == ["cancelled"]


async def test_a_body_sent_with_the_cancel_of_one_job_is_ignored(api: httpx.AsyncClient) -> None:
    await queue(api)
    assert (await api.post("/api/jobs/1/cancel?_=123", json={"why": "no"})).status_code == 200
    assert await states(api) == ["cancelled"]


async def test_more_jobs_than_one_transaction_takes_are_all_cancelled(
    api: httpx.AsyncClient, database: Database
) -> None:
    def fill(connection: Connection) -> None:
        for number in range(CHUNK_JOBS + 1):
            submission.submit(connection, prompt(conversation_id=f"c{number % 7}", model="smollm2"), datetime.now(UTC))

    await database.write(fill)
    await claim(database)
    answer = await api.post("/api/jobs/cancel?status=queued&status=processing")
    assert answer.json() == {"ok": True, "cancelled": CHUNK_JOBS + 1}
    assert await database.read(waiting.due_jobs, ["smollm2"], datetime.now(UTC)) == []
    assert await database.read(check.violations) == []


async def test_a_hint_is_sent_for_a_job_that_a_cancel_made_runnable(
    api: httpx.AsyncClient, database: Database, redis_url: str
) -> None:
    for _ in range(2):
        await queue(api)
    await claim(database)
    async with Redis.from_url(redis_url) as redis:
        for _ in range(2):
            assert await redis.blpop(["saq:llamalith:smollm2:queued"], timeout=20)
        await redis.flushall()
        await api.post("/api/jobs/1/cancel")
        hint: Any = await redis.blpop(["saq:llamalith:smollm2:queued"], timeout=20)
    assert hint[1].endswith(b":j2.a1")


async def test_a_cancel_does_not_wait_for_redis(config: Config, absent_redis_url: str) -> None:
    async with serving(msgspec.structs.replace(config, redis_url=absent_redis_url)) as api:
        for _ in range(2):
            await queue(api)
        assert (await api.post("/api/jobs/1/cancel")).json()["status"] == "cancelled"
        assert (await api.delete("/api/jobs/2")).json()["status"] == "cancelled"


# Limits of time


async def test_time_limits_are_stored_with_the_job_and_default_to_the_configuration(
    config: Config,
) -> None:
    async with serving(msgspec.structs.replace(config, timeout_s=7.5, queue_timeout_s=3600)) as api:
        own = await queue(api, timeout_s=30, queue_timeout_s=0.5)
        answer = await api.post("/api/conversations/c/reply", json={"content": "x", "timeout_s": 604_800})
        await api.post("/api/submit", json={"user_input": "x"})
        shown = [(await api.get(f"/api/jobs/{job_id}")).json() for job_id in (own, answer.json()["job_id"], 3)]
    assert [(job["timeout_s"], job["queue_timeout_s"]) for job in shown] == [(30, 0.5), (604_800, 3600), (7.5, 3600)]


async def test_without_a_limit_a_job_may_take_any_time(api: httpx.AsyncClient) -> None:
    job = (await api.get(f"/api/jobs/{await queue(api, timeout_s=None)}")).json()
    assert (job["timeout_s"], job["queue_timeout_s"], job["partial"]) == (None, None, None)


# The page


async def token_of(browser: httpx.AsyncClient, path: str) -> str:
    found = re.search(r'name="csrf_token" value="([^"]+)"', (await browser.get(path)).text)
    assert found is not None
    return found[1]


@pytest.fixture
async def plain(config: Config) -> Any:
    """A session whose client sends no origin: the token in the form counts."""
    async with serving(config) as client:
        await log_in(client)
        del client.headers["Origin"]
        yield client


@pytest.mark.parametrize(
    "path", ["/chat/status", "/chat/jobs", "/chat/jobs?status=queued", "/chat/jobs/1", "/chat/conversations/c"]
)
async def test_every_list_has_a_cancel_form_that_leads_back(plain: httpx.AsyncClient, path: str) -> None:
    plain.headers["X-CSRF-Token"] = await token_of(plain, "/chat/")
    await queue(plain)
    del plain.headers["X-CSRF-Token"]
    page = await plain.get(path)
    # In a chat, the message goes with its job.
    does = "remove" if path.startswith("/chat/conversations") else "cancel"
    assert f'<form class="cancel" method="post" action="/chat/jobs/1/{does}">' in page.text
    fields = {"csrf_token": await token_of(plain, path)}
    refused = await plain.post("/chat/jobs/1/cancel", data={"csrf_token": "x"})
    assert (refused.status_code, await states(plain)) == (403, ["queued"])
    answer = await plain.post(
        "/chat/jobs/1/cancel", data=fields, headers={"Referer": str(plain.base_url).rstrip("/") + path}
    )
    assert (answer.status_code, answer.headers["location"]) == (303, f"{path}#job-1")
    after = await plain.get(path)
    assert f"/chat/jobs/1/{does}" not in after.text
    assert await states(plain) == ["cancelled"]


@pytest.mark.parametrize(
    "referer", ["", "http://[", "https://evil.example//evil.example/x", "javascript:alert(1)", "/chat/logout", "//x/y"]
)
async def test_a_cancel_never_redirects_to_another_host(browser: httpx.AsyncClient, referer: str) -> None:
    answer = await browser.post("/chat/jobs", data={"content": "x"}, headers={"Referer": referer})
    answer = await browser.post("/chat/jobs/1/cancel", headers={"Referer": referer})
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/#job-1")


async def test_all_queued_jobs_can_be_cancelled_from_their_list(browser: httpx.AsyncClient, database: Database) -> None:
    for _ in range(3):
        await browser.post("/chat/jobs", data={"content": "x", "conversation_id": "c"})
    await claim(database)
    (address,) = re.findall(r'href="([^"]*action=cancel[^"]*)"', (await browser.get("/chat/jobs?status=queued")).text)
    asked = await browser.get(unescape(address))
    assert "Cancel 2 jobs" in asked.text
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', asked.text.partition("<main")[2]))
    answer = await browser.post("/chat/jobs/bulk", data=fields)
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/jobs?status=queued&did=cancel&n=2")
    assert "2 jobs were cancelled." in (await browser.get(answer.headers["location"])).text
    assert await states(browser) == ["processing", "cancelled", "cancelled"]
    assert "No job is queued just now." in (await browser.get("/chat/jobs?status=queued")).text


async def test_the_partial_reply_of_a_cancelled_job_is_shown_as_partial(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await browser.post("/chat/jobs", data={"content": "x", "conversation_id": "c"})
    claimed = await claim(database)
    await browser.post("/chat/jobs/1/cancel")
    still = await browser.get("/chat/conversations/c")
    assert 'data-open="1"' in still.text, "its worker may add what was written"
    written = transitions.PartialReply("Once <b>upon</b> a", 9, 4)
    assert await database.write(transitions.store_partial, 1, claimed.lease_token, datetime.now(UTC), written=written)
    page = await browser.get("/chat/conversations/c")
    assert 'data-open="0"' in page.text
    assert "Stopped. Until then this was written" in page.text
    assert '<div class="text markdown unfinished"><p dir="auto">Once &lt;b&gt;upon&lt;/b&gt; a</p>' in page.text
    assert "Once &lt;b&gt;upon&lt;/b&gt; a" in (await browser.get("/chat/jobs")).text
    job = (await browser.get("/api/jobs/1")).json()
    assert (job["partial"], job["result"], job["prompt_tokens"], job["completion_tokens"]) == (
        "Once <b>upon</b> a",
        None,
        9,
        4,
    )
    messages = (await browser.get("/api/conversations/c/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["user"]
