"""Every start of a job, jobs that try others again, and requests that are sent twice under an Idempotency-Key."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import Connection, func, select, update

from llamalith_app.settings.config import Config
from llamalith_app.store import check, keys
from llamalith_app.store.database import Database
from llamalith_app.store.tables import JobRow, KeyRow, Outcome
from tests.store.samples import fail, finish
from tests.web.conftest import serving
from tests.web.test_cancel import another_owners_job, claim, queue, states, token_of


async def failed(api: httpx.AsyncClient, database: Database, **fields: Any) -> int:
    """A job that ended as an error, at its first start."""
    job_id = await queue(api, **fields)
    await database.write(fail, await claim(database, fields.get("model", "smollm2")), pause=None)
    return job_id


async def test_a_job_lists_every_start_with_its_reason(api: httpx.AsyncClient, database: Database) -> None:
    job_id = await queue(api, max_attempts=2)
    await database.write(fail, await claim(database), outcome=Outcome.RELEASED, kind="drained", reason="It ended.")
    await database.write(fail, await claim(database), outcome=Outcome.LOST, kind="worker_lost", reason="It is gone.")
    waiting = (await api.get(f"/api/jobs/{job_id}")).json()
    assert (waiting["status"], waiting["attempt"], waiting["max_attempts"]) == ("queued", 2, 2)
    assert waiting["next_attempt_at"] is not None
    await database.write(fail, await claim(database), kind="engine_died", reason="It crashed.")
    ended = (await api.get(f"/api/jobs/{job_id}")).json()
    assert (ended["status"], ended["error"]["kind"], ended["next_attempt_at"]) == ("error", "engine_died", None)
    listed = (await api.get(f"/api/jobs/{job_id}/attempts")).json()["attempts"]
    assert [(one["attempt"], one["outcome"], one["kind"], one["reason"]) for one in listed] == [
        (1, "released", "drained", "It ended."),
        (2, "lost", "worker_lost", "It is gone."),
        (3, "failed", "engine_died", "It crashed."),
    ]
    assert all(one["started_at"] and one["ended_at"] for one in listed)


@pytest.mark.parametrize(("given", "status"), [(0, 400), (101, 400), (1.5, 400), (1, 200), (100, 200)])
async def test_the_number_of_attempts_is_a_number_in_its_range(
    api: httpx.AsyncClient, given: object, status: int
) -> None:
    answer = await api.post("/api/jobs", json={"content": "x", "max_attempts": given})
    assert answer.status_code == status
    assert len(await states(api)) == (status == 200)


@pytest.mark.parametrize("path", ["/api/jobs/{}/attempts", "/api/jobs/{}/retry"])
async def test_nobody_sees_or_retries_what_is_not_theirs(api: httpx.AsyncClient, database: Database, path: str) -> None:
    others = await database.write(another_owners_job)
    await database.write(cancel_row, others)
    for job_id in (others, 99):
        answer = await api.request("GET" if "attempts" in path else "POST", path.format(job_id))
        assert (answer.status_code, answer.json()["detail"]) == (404, "Job not found")
    assert (await api.post("/api/jobs/retry?status=cancelled")).json()["job_ids"] == []


async def test_a_failed_job_is_retried_as_the_last_turn_and_stays_as_it_was(
    api: httpx.AsyncClient, database: Database
) -> None:
    fields = {"assistant_context": "so far", "temperature": 0.25, "priority": "batch", "queue_timeout_s": 60.0}
    fields |= {"system_prompt": "be terse", "max_attempts": 1, "timeout_s": 5.0, "grammar_name": "yes_or_no"}
    job_id = await failed(api, database, **fields)
    later = await queue(api)
    answer = (await api.post(f"/api/jobs/{job_id}/retry")).json()
    new = answer["job_id"]
    assert answer == {
        "ok": True,
        "queued": True,
        "job_id": new,
        "conversation_id": "c",
        "created_new": False,
        "model": "smollm2",
        "turn_id": 3,
    }
    before, again = [(await api.get(f"/api/jobs/{one}")).json() for one in (job_id, new)]
    assert (before["status"], before["retried_as"], again["retry_of"], again["status"]) == (
        "error",
        new,
        job_id,
        "queued",
    )
    same = (
        "user_input",
        "model",
        "system_prompt",
        "grammar_name",
        "priority",
        "parameters",
        "timeout_s",
        "queue_timeout_s",
        "max_attempts",
        "conversation_id",
    )
    assert {name: before[name] for name in same} == {name: again[name] for name in same}
    assert new > later
    messages = (await api.get("/api/conversations/c/messages")).json()["messages"]
    assert [one["content"] for one in messages][-2:] == ["so far", "x"]
    assert (await api.post(f"/api/jobs/{job_id}/retry")).json() == answer, "once for a job"
    assert await database.read(check.violations) == []


async def test_what_is_open_or_done_is_not_tried_again(api: httpx.AsyncClient, database: Database) -> None:
    for _ in range(3):
        await queue(api)
    await database.write(finish, await claim(database))
    await claim(database)
    for job_id, word in ((1, "done: it has its reply"), (2, "processing: it has not"), (3, "queued: it has not")):
        answer = await api.post(f"/api/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json()["type"]) == (409, "about:llamalith/not-retryable")
        assert word in answer.json()["detail"]
    assert len(await states(api)) == 3


async def test_a_filter_tries_again_what_it_finds_in_its_order_and_no_more(
    api: httpx.AsyncClient, database: Database
) -> None:
    first = await failed(api, database, conversation_id="a")
    second = await failed(api, database, conversation_id="b")
    other = await failed(api, database, conversation_id="a", model="other")
    cancelled = await queue(api)
    await api.post(f"/api/jobs/{cancelled}/cancel")

    async def retry(query: str) -> tuple[list[int], bool]:
        answer = (await api.post(f"/api/jobs/retry?{query}")).json()
        of = [(await api.get(f"/api/jobs/{job_id}")).json()["retry_of"] for job_id in answer["job_ids"]]
        return of, answer["more"]

    assert await retry("status=error&error_kind=timeout") == ([], False)
    assert await retry("status=error&conversation_id=a&model=other") == ([other], False)
    assert await retry("status=error&limit=1") == ([first], True)
    assert await retry("status=error&status=cancelled") == ([second, cancelled], False)
    assert await retry("status=error&status=cancelled") == ([], False)
    assert await database.read(check.violations) == []


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("retry?", b"", "status"),
        ("retry?status=done", b"", "status"),
        ("retry?status=error&when=now", b"", "when"),
        ("retry?status=error&limit=0", b"", "limit"),
        ("retry?status=error&model=absent", b"", "model"),
        ("retry?status=error", b'{"conversation_id": "d"}', "filters stand in the query: status, "),
        ("1/retry", b'{"max_tokens": 5}', "The body is not read here; send none"),
    ],
)
async def test_a_retry_that_says_too_little_or_what_is_not_known_makes_nothing(
    api: httpx.AsyncClient, database: Database, path: str, body: bytes, word: str
) -> None:
    await failed(api, database)
    answer = await api.post(f"/api/jobs/{path}", content=body)
    assert answer.status_code == 400
    assert word in answer.json()["detail"]
    assert await states(api) == ["error"]


async def test_a_full_queue_takes_as_many_as_it_has_room_for(config: Config, database: Database) -> None:
    async with serving(msgspec.structs.replace(config, max_queued=2)) as api:
        for _ in range(3):
            await failed(api, database)
        answer = (await api.post("/api/jobs/retry?status=error")).json()
        assert (len(answer["job_ids"]), answer["more"]) == (2, True)
        for path in ("/api/jobs/retry?status=error", "/api/jobs/3/retry"):
            refused = await api.post(path)
            assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)
        assert len(await states(api)) == 5


async def test_a_job_whose_model_is_gone_is_not_tried_again(config: Config, database: Database) -> None:
    async with serving(config) as api:
        await failed(api, database, model="other")
    fewer = msgspec.structs.replace(config, models=config.models[:1])
    async with serving(fewer) as api:
        answer = await api.post("/api/jobs/1/retry")
        assert (answer.status_code, answer.json()["detail"][:6]) == (400, "model:")
        assert len(await states(api)) == 1


async def test_the_page_tries_again_and_leads_to_the_new_job(browser: httpx.AsyncClient, database: Database) -> None:
    await browser.post("/chat/jobs", data={"content": "x", "conversation_id": "c"})
    await database.write(fail, await claim(database), pause=None)
    form = '<form class="retry" method="post" action="/chat/jobs/1/retry">'
    for path in ("/chat/status", "/chat/jobs?status=error", "/chat/jobs/1", "/chat/conversations/c"):
        assert form in (await browser.get(path)).text
    del browser.headers["Origin"]
    assert (await browser.post("/chat/jobs/1/retry", data={"csrf_token": "x"})).status_code == 403
    token = await token_of(browser, "/chat/")
    back = {"Referer": str(browser.base_url).rstrip("/") + "/chat/conversations/c"}
    for _ in range(2):
        answer = await browser.post("/chat/jobs/1/retry", data={"csrf_token": token}, headers=back)
        assert (answer.status_code, answer.headers["location"]) == (303, "/chat/conversations/c#job-2")
    page = (await browser.get("/chat/conversations/c")).text
    assert form not in page
    assert "Tried again as" in page


# Idempotency-Key


def cancel_row(connection: Connection, job_id: int) -> None:
    connection.execute(
        update(JobRow).where(JobRow.id == job_id).values(status="cancelled", processed_at=datetime.now(UTC))
    )


def age_keys(connection: Connection, to: datetime) -> None:
    connection.execute(update(KeyRow).values(created_at=to))


def jobs_stored(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(JobRow)).scalar_one()


async def test_fifty_at_once_under_one_key_make_one_job_and_get_one_answer(
    api: httpx.AsyncClient, database: Database
) -> None:
    send = [api.post("/api/jobs", json={"content": "x"}, headers={"Idempotency-Key": "k"}) for _ in range(50)]
    answers = await asyncio.gather(*send)
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, answers[0].text)}
    assert await database.read(jobs_stored) == 1


WAYS_IN = {
    "/api/jobs": {"content": "x"},
    "/chat/api/jobs": {"content": "x", "conversation_id": "c"},
    "/api/conversations/c/reply": {"content": "x"},
    "/api/submit": {"user_input": "x"},
    "/api/jobs?": {"system_prompt": "only this"},
    "/api/jobs/1/retry": None,
    "/api/jobs/retry?status=error": None,
}


@pytest.mark.parametrize("path", WAYS_IN)
async def test_every_door_that_makes_something_knows_keys(
    api: httpx.AsyncClient, database: Database, path: str
) -> None:
    await failed(api, database)

    async def send(body: object, key: str = "k") -> httpx.Response:
        return await api.post(path, json=body, headers={"Idempotency-Key": key})

    first = await send(WAYS_IN[path])
    assert first.status_code == 200, first.text
    n_jobs = await database.read(jobs_stored)
    n_messages = len((await api.get("/api/conversations/c/messages")).json()["messages"])
    again = await send(WAYS_IN[path])
    assert (again.status_code, again.text) == (200, first.text)
    other = await send({"content": "y", "user_input": "y"})
    refusal = (400, "bad-input") if WAYS_IN[path] is None else (409, "idempotency-key-reused")
    assert (other.status_code, other.json()["type"].removeprefix("about:llamalith/")) == refusal
    elsewhere = await api.post("/api/conversations/d/reply", json={"content": "x"}, headers={"Idempotency-Key": "k"})
    assert elsewhere.status_code == 409
    assert await database.read(jobs_stored) == n_jobs
    assert len((await api.get("/api/conversations/c/messages")).json()["messages"]) == n_messages


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "schlüssel", "a\tb"])
async def test_a_key_that_is_none_is_refused(api: httpx.AsyncClient, key: str) -> None:
    answer = await api.post("/api/jobs", json={"content": "x"}, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("Idempotency-Key: expected 1 to 255 visible ASCII characters")
    assert await states(api) == []


async def test_what_was_refused_is_tried_again_under_its_key(config: Config, database: Database) -> None:
    async with serving(msgspec.structs.replace(config, max_queued=1)) as api:
        headers = {"Idempotency-Key": "k"}
        assert (await api.post("/api/jobs", json={"content": ""}, headers=headers)).status_code == 400
        await queue(api)
        assert (await api.post("/api/jobs", json={"content": "x"}, headers=headers)).status_code == 429
        await api.post("/api/jobs/1/cancel")
        made = await api.post("/api/jobs", json={"content": "x"}, headers=headers)
        assert made.status_code == 200
        again = await api.post("/api/jobs", json={"content": "x"}, headers=headers)
        assert again.text == made.text, "its queue being full does not stand against it: nothing is made"


async def test_a_key_is_its_callers_alone_and_good_for_a_day(api: httpx.AsyncClient, database: Database) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await api.post("/api/jobs", json={"content": "x"}, headers=headers)
    now = datetime.now(UTC)
    theirs = keys.Key(2, "k", "another digest")
    assert await database.read(keys.stored_answer, theirs, now, dict) is None
    past = now - keys.ANSWER_TTL - timedelta(seconds=1)
    await database.write(age_keys, past)
    second = await api.post("/api/jobs", json={"content": "x"}, headers=headers)
    assert second.json()["job_id"] != first.json()["job_id"]
    assert not await database.read(keys.has_expired_keys, now)
    tomorrow = now + keys.ANSWER_TTL + timedelta(seconds=60)
    assert await database.read(keys.has_expired_keys, tomorrow)
    assert await database.write(keys.delete_expired, tomorrow, 100) == 1
    assert not await database.read(keys.has_expired_keys, tomorrow)
