"""The jobs' table with its filters and actions, a job's page, and the status page, as a browser without JavaScript has
them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import update

from llamalith_app.contracts.models import EngineStatus
from llamalith_app.jobs import bulk, wishes
from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store import workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import listing, submission, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.tables import JobRow, Outcome, Source
from llamalith_app.web.curl import MAX_BODY_BYTES
from tests.store.samples import NOW, fail, finish, prompt, register_worker
from tests.web.conftest import TOKEN, log_in, serving

API = {"Authorization": f"Bearer {TOKEN}"}


async def send(client: httpx.AsyncClient, content: str = "Say hello.", **fields: Any) -> int:
    answer = await client.post("/api/jobs", json={"content": content, **fields}, headers=API)
    assert answer.status_code == 200, answer.text
    job_id: int = answer.json()["job_id"]
    return job_id


async def claim(database: Database, priority: int = 1, model: str = "smollm2") -> transitions.Claim:
    worker = await database.write(register_worker)
    claimed = await database.write(transitions.claim, model, priority, worker, datetime.now(UTC))
    assert claimed is not None
    return claimed


async def ended(database: Database, end: Callable[..., Any], **how: Any) -> None:
    await database.write(end, await claim(database), **how)


def text(answer: httpx.Response) -> str:
    """What a page says in its main part, without its tags."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])))


def shown_ids(answer: httpx.Response) -> list[int]:
    return [int(job_id) for job_id in re.findall(r'<tr [^>]*id="job-(\d+)', answer.text)]


def hidden_fields(answer: httpx.Response) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', answer.text.partition("<main")[2])
    return {name: unescape(value) for name, value in found}


# The table


@pytest.mark.slow
async def test_filters_combine_and_stand_in_the_address(browser: httpx.AsyncClient, database: Database) -> None:
    await send(browser, "A red dragon", conversation_id="a")
    await ended(database, finish)
    await send(browser, "A green dragon", model="other", conversation_id="b")
    await send(browser, "A red house", conversation_id="c", priority="batch")
    await send(browser, "100 % RED", conversation_id="d")
    await database.write(submission.submit, prompt("of the page", "e", source=Source.PAGE), datetime.now(UTC))
    for query, expected in (
        ("", [5, 4, 3, 2, 1]),
        ("status=queued", [5, 4, 3, 2]),
        ("q=red", [4, 3, 1]),
        ("q=red&status=queued", [4, 3]),
        ("q=red&status=queued&priority=batch", [3]),
        ("q=dragon&model=other", [2]),
        ("model=other&status=done", []),
        ("q=%23 2".replace(" ", ""), [2]),
        ("q=3", [3]),
        ("q=100+%25", [4]),
        ("q=_ed", []),
        ("age=hour", [5, 4, 3, 2, 1]),
        ("since=2020-01-01&until=2020-12-31", []),
        ("since=2020-01-01", [5, 4, 3, 2, 1]),
        ("until=2020-01-01", []),
        ("source=api", [4, 3, 2, 1]),
        ("source=page", [5]),
        ("source=api&q=red&status=queued", [4, 3]),
        ("source=legacy", []),
    ):
        page = await browser.get(f"/chat/jobs?{query}")
        assert shown_ids(page) == expected, query
        assert shown_ids(await browser.get(f"/chat/jobs/rows?{query}")) == expected, query
    for source, ids in (("page", [5]), ("legacy", []), ("api", [4, 3, 2, 1])):
        for texts in ("true", "false"):
            listed = await browser.get(f"/api/jobs?source={source}&texts={texts}", headers=API)
            assert [job["id"] for job in listed.json()["jobs"]] == ids, source
    assert (await browser.get("/api/jobs?source=title", headers=API)).status_code == 400
    assert (await browser.get("/chat/jobs?source=title")).status_code == 400
    page = await browser.get("/chat/jobs?source=page")
    assert "All Queued 1 Running 0 Done 0" in text(page)
    assert 'href="/chat/jobs/bulk?source=page&amp;action=cancel"' in page.text
    asked = await browser.get("/chat/jobs/bulk?source=page&action=cancel")
    assert "1 open job matches" in text(asked)
    assert hidden_fields(asked)["source"] == "page"
    page = await browser.get("/chat/jobs?q=red&model=smollm2")
    assert 'name="q" value="red"' in page.text
    assert '<option value="smollm2" selected>' in page.text
    links = {unescape(link) for link in re.findall(r'href="(/chat/jobs\?[^"]*)"', page.text)}
    assert "/chat/jobs?status=done&model=smollm2&q=red" in links, "a status is another filter, and the others stay"
    assert 'data-live="/chat/jobs/rows?model=smollm2&amp;q=red"' in page.text


async def test_each_status_has_the_count_of_what_the_other_filters_leave(
    browser: httpx.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        await send(browser, "red" if n else "blue", conversation_id=f"c{n}")
    await ended(database, finish)
    assert "All Queued 2 Running 0 Done 1 Failed 0 Cancelled 0" in text(await browser.get("/chat/jobs"))
    assert "All Queued 2 Running 0 Done 0" in text(await browser.get("/chat/jobs?q=red&status=done"))
    monkeypatch.setattr(listing, "MAX_COUNTED", 2)
    assert "All Queued 2+ Running 0 Done 1 Failed" in text(await browser.get("/chat/jobs"))


async def test_a_search_that_ends_before_the_record_does_says_so_and_goes_on(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "WINDOW_TEXTS", 2)
    await send(browser, "a needle")
    for _ in range(5):
        await send(browser, "hay")
    address, n_pages = "/chat/jobs?q=needle", 1
    while not shown_ids(page := await browser.get(address)):
        (address,) = (unescape(link) for link in re.findall(r'id="older" href="([^"]+)"', page.text))
        assert "None of the jobs that were looked through matches." in text(page)
        n_pages += 1
    assert (shown_ids(page), n_pages) == ([1], 3)


async def test_jobs_of_a_time_are_found_by_their_ids(browser: httpx.AsyncClient, database: Database) -> None:
    for _ in range(6):
        await send(browser)
    day = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def move(connection: Any) -> None:
        for job_id in range(1, 7):
            connection.execute(
                update(JobRow).where(JobRow.id == job_id).values(created_at=day + timedelta(days=job_id))
            )

    await database.write(move)
    assert shown_ids(await browser.get("/chat/jobs?since=2026-03-03&until=2026-03-05")) == [4, 3, 2]
    assert shown_ids(await browser.get("/chat/jobs?since=2026-03-07")) == [6]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        ("status=x", "status"),
        ("priority=urgent", "priority"),
        ("age=year", "age"),
        ("since=yesterday", "since"),
        ("until=2026-13-45", "until"),
        (f"q={'x' * 201}", "q"),
        (f"model={'x' * 201}", "model"),
    ],
)
async def test_a_filter_that_means_nothing_is_refused_by_name(
    browser: httpx.AsyncClient, query: str, place: str
) -> None:
    answer = await browser.get(f"/chat/jobs?{query}", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json()["detail"].partition(":")[0]) == (400, place)


async def test_the_ends_of_time_are_days_too(browser: httpx.AsyncClient) -> None:
    await send(browser)
    assert shown_ids(await browser.get("/chat/jobs?since=0001-01-01&until=9999-12-31")) == [1]


async def test_a_very_long_prompt_is_an_excerpt_in_every_list(browser: httpx.AsyncClient, database: Database) -> None:
    await send(browser, "word " * 100_000)
    for path in ("/chat/jobs", "/chat/jobs/rows", "/chat/status"):
        assert len((await browser.get(path)).text) < 100_000, path
    page = await browser.get("/chat/jobs/1")
    assert len(page.text) < 100_000
    assert "The first 20000 of 499999 characters" in text(page)


async def test_an_input_that_cannot_succeed_is_offered_a_change_and_no_retry(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for kind in ("context_overflow", "engine_died"):
        await send(browser, conversation_id=kind)
        await ended(database, fail, kind=kind, pause=None)
    for path in ("/chat/jobs", "/chat/status"):
        page = (await browser.get(path)).text
        assert [f"/chat/jobs/{n}/retry" in page for n in (1, 2)] == [False, True], path
        assert [f"/chat/jobs/{n}/again" in page for n in (1, 2)] == [True, False], path
    assert "/chat/jobs/1/retry" not in (await browser.get("/chat/jobs/1")).text
    assert "/chat/jobs/2/retry" in (await browser.get("/chat/jobs/2")).text


# All that match


async def asked(browser: httpx.AsyncClient, query: str) -> httpx.Response:
    answer = await browser.get(f"/chat/jobs/bulk?{query}")
    assert answer.status_code == 200, answer.text
    return answer


async def test_all_that_match_are_cancelled_after_their_number_was_told(browser: httpx.AsyncClient) -> None:
    for n in range(5):
        await send(browser, "red" if n % 2 else "blue", conversation_id=f"c{n}")
    page = await asked(browser, "action=cancel&q=red")
    assert "2 open jobs match" in text(page)
    await send(browser, "red, sent since", conversation_id="late")
    answer = await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/jobs?q=red&did=cancel&n=2")
    assert shown_ids(await browser.get("/chat/jobs?status=cancelled")) == [4, 2]
    assert "2 jobs were cancelled." in text(await browser.get(answer.headers["location"]))
    assert "No job matches that this could be done with." in text(await asked(browser, "action=cancel&status=done"))


async def test_all_that_match_are_tried_again_in_the_order_of_their_chats_but_for_those_that_would_fail_again(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for n, kind in enumerate(("timeout", "context_overflow", "timeout", "timeout")):
        await send(browser, f"prompt {n}", conversation_id="c")
        await ended(database, fail, kind=kind, pause=None)
    await browser.post("/api/jobs/4/retry", headers=API)
    page = await asked(browser, "action=retry")
    assert "2 jobs match that ended without a reply" in text(page)
    await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
    queued = (await browser.get("/api/jobs?status=queued", headers=API)).json()["jobs"]
    assert [(job["id"], job["retry_of"]) for job in queued] == [(7, 3), (6, 1), (5, 4)]


async def test_all_that_match_move_to_another_class(browser: httpx.AsyncClient, database: Database) -> None:
    for n in range(4):
        await send(browser, conversation_id=f"c{n}", priority="batch" if n == 3 else "normal")
    await claim(database)
    page = await asked(browser, "action=priority&to=batch")
    assert "2 waiting jobs match" in text(page)
    answer = await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
    assert "2 jobs changed their class." in text(await browser.get(answer.headers["location"]))
    listed = (await browser.get("/api/jobs", headers=API)).json()["jobs"]
    assert [job["priority"] for job in listed] == ["batch", "batch", "batch", "normal"]


async def test_a_large_action_is_done_in_parts_of_which_each_is_bounded(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(7):
        await send(browser, conversation_id=f"c{n}")
    monkeypatch.setitem(bulk.RULES, "cancel", bulk.RULES["cancel"]._replace(most=5, chunk=2))
    sizes: list[int] = []
    cancel = transitions.cancel_jobs

    def counted(connection: Any, owner_id: int, job_ids: list[int], now: datetime) -> list[int]:
        sizes.append(len(job_ids))
        return cancel(connection, owner_id, job_ids, now)

    monkeypatch.setattr(transitions, "cancel_jobs", counted)
    page = await asked(browser, "action=cancel")
    assert "5 open jobs match" in text(page)
    assert "There may be more" in text(page)
    answer = await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
    assert answer.headers["location"] == "/chat/jobs?did=cancel&n=5&more=1"
    assert sizes == [2, 2, 1]
    assert shown_ids(await browser.get("/chat/jobs?status=queued")) == [2, 1], "the newest go first"


async def test_an_action_needs_a_good_form(browser: httpx.AsyncClient) -> None:
    await send(browser)
    for fields in ({"action": "delete"}, {"action": "priority"}, {"to": "batch"}, {"action": "cancel", "newest": "-1"}):
        assert (await browser.post("/chat/jobs/bulk", data=fields)).status_code == 400, fields
    del browser.headers["Origin"]
    answer = await browser.post("/chat/jobs/bulk", data={"action": "cancel", "newest": "9", "csrf_token": "x"})
    assert answer.status_code == 403
    assert (await browser.get("/api/jobs/1", headers=API)).json()["status"] == "queued"


async def test_a_retry_of_all_queues_as_many_as_there_is_room_for_and_says_that_there_are_more(
    config: Config, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bulk.RULES, "retry", bulk.RULES["retry"]._replace(chunk=2))
    async with serving(msgspec.structs.replace(config, max_queued=2)) as browser:
        for n in range(3):
            await send(browser, conversation_id=f"c{n}")
            await ended(database, fail, pause=None)
        await log_in(browser)
        page = await asked(browser, "action=retry")
        answer = await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
        assert answer.headers["location"] == "/chat/jobs?did=retry&n=2&more=1"
        assert shown_ids(await browser.get("/chat/jobs?status=queued")) == [5, 4]
        full = await browser.post("/chat/jobs/bulk", data=hidden_fields(page))
        assert full.status_code == 429, "where there is none at all"


# Another class for one job


async def test_a_job_that_waits_changes_its_class_by_api_and_page(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for n in range(3):
        await send(browser, conversation_id=f"c{n}")
    answer = await browser.patch("/api/jobs/3", json={"priority": "interactive"}, headers=API)
    assert (answer.status_code, answer.json()["priority"]) == (200, "interactive")
    assert answer.json()["progress"]["position"] == 1
    page = await browser.get("/chat/jobs/3")
    assert 'action="/chat/jobs/3/priority"' in page.text
    back = {"Referer": str(browser.base_url).rstrip("/") + "/chat/status"}
    moved = await browser.post("/chat/jobs/2/priority", data={"priority": "batch"}, headers=back)
    assert (moved.status_code, moved.headers["location"]) == (303, "/chat/status#job-2")
    order = re.findall(r'id="waits-(\d)-', (await browser.get("/chat/status")).text)
    assert order == ["3", "1", "2"]
    again = await browser.patch("/api/jobs/2", json={"priority": "batch"}, headers=API)
    assert again.status_code == 200, "nothing to change is no error"
    claimed = await claim(database, priority=0)
    assert claimed.job_id == 3


async def test_the_class_of_a_job_that_was_started_stays(browser: httpx.AsyncClient, database: Database) -> None:
    await send(browser)
    await claim(database)
    answer = await browser.patch("/api/jobs/1", json={"priority": "batch"}, headers=API)
    assert (answer.status_code, answer.json()["type"]) == (409, "about:llamalith/not-queued")
    assert (await browser.patch("/api/jobs/9", json={"priority": "batch"}, headers=API)).status_code == 404
    assert (await browser.post("/chat/jobs/1/priority", data={"priority": "batch"})).status_code == 409
    for body in ({}, {"priority": "urgent"}, {"priority": None}):
        assert (await browser.patch("/api/jobs/1", json=body, headers=API)).status_code == 400, body


# A job's page


async def test_a_job_s_page_tells_what_happened_attempt_by_attempt(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await send(browser, "Once", conversation_id="c", system_prompt="Be brief.", temperature=0.25, stop=["\n"])
    await ended(database, fail, outcome=Outcome.LOST, kind="worker_lost", reason="Its <worker> was lost.")
    claimed = await claim(database)
    loaded, read, first = (NOW + timedelta(seconds=n) for n in (1, 2, 3))
    times = transitions.AttemptTimes(loaded, read, first)
    await database.write(finish, claimed, reply="upon a <time>", thinking="<hm>", thinking_s=2.4, times=times)
    page = await browser.get("/chat/jobs/1")
    said = text(page)
    assert re.search(r"Waited [\d.]+ .* Attempt 1 was lost with its worker .* Attempt 2 wrote the reply", said)
    assert "Its <worker> was lost. (worker_lost)" in said
    assert "upon a <time>" in said
    assert "Be brief." in said
    assert "temperature 0.25" in said
    assert len(re.findall("its prompt read and its first token there is not known", said)) == 1, "of the first attempt"
    assert re.search(
        r"The model was ready after .* The prompt was read in 1\.0 s .* The first token came after 1\.0 s"
        r" .* The reply was written in",
        said,
    )
    assert "Thought for 2 s <hm>" in said
    chat = await browser.get("/chat/conversations/c")
    folded = r'<details class="thinking"[^>]*><summary>Thought for 2 s</summary><p[^>]*>&lt;hm&gt;</p>'
    assert re.search(folded, chat.text)
    assert "<hm>" not in chat.text
    assert re.search(r"<svg[^>]*role=\"img\"[^>]*>\s*<title id=\"timeline-title\">How its time was spent", page.text)
    assert 'data-open="0"' in page.text
    assert (await browser.get("/chat/jobs/2")).status_code == 404
    assert (await browser.get("/chat/jobs/x")).status_code in (400, 404)


def body_of(page: httpx.Response) -> dict[str, Any]:
    """What the command on the page sends."""
    (command,) = re.findall(r"<pre[^>]*data-command[^>]*><code>(curl .*?)</code>", page.text, re.DOTALL)
    words = shlex.split(unescape(command).replace("\\\n", ""))
    assert words[:2] == ["curl", "-s"]
    assert "Authorization: Bearer $N8N_API_TOKEN" in words
    body: dict[str, Any] = json.loads(words[words.index("-d") + 1])
    return body


HOSTILE = "it's $HOME `id` \"x\" \\ \n\t !! \u202e\u200d 🐉 ${IFS} 'a' $(touch /tmp/x)"


async def test_the_command_on_the_page_makes_the_same_job_again_whatever_the_prompt_holds(
    browser: httpx.AsyncClient,
) -> None:
    fields = {"system_prompt": "Don't.", "assistant_context": "C'est moi.", "temperature": 0.5, "priority": "batch"}
    await send(browser, HOSTILE, **fields)
    page = await browser.get("/chat/jobs/1")
    assert "\u202e" not in page.text.partition("<code>curl")[2].partition("</code>")[0]
    body = body_of(page)
    assert body["content"] == HOSTILE.strip()
    assert {name: body[name] for name in fields} == fields
    assert "conversation_id" not in body, "it began its conversation, and so does the same again"
    again = (await browser.post("/api/jobs", json=body, headers=API)).json()["job_id"]
    jobs = [(await browser.get(f"/api/jobs/{job_id}", headers=API)).json() for job_id in (1, again)]
    same = ("user_input", "system_prompt", "parameters", "priority", "model", "max_attempts")
    assert [jobs[0][name] for name in same] == [jobs[1][name] for name in same]
    saved = await browser.get("/chat/jobs/1/request.json")
    assert saved.json() == body
    assert saved.headers["content-disposition"] == 'attachment; filename="job-1.json"'


async def test_the_command_of_a_later_message_makes_another_version_beside_it(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for content in ("First.", "Second.", "Third."):
        await send(browser, content, conversation_id="c")
        await ended(database, finish)
    body = body_of(await browser.get("/chat/jobs/2"))
    again = (await browser.post("/api/jobs", json=body, headers=API)).json()
    assert again["conversation_id"] == "c"
    tree = (await browser.get("/api/conversations/c/tree", headers=API)).json()["turns"]
    parents = {turn["job_id"]: turn["parent"] for turn in tree}
    assert parents[again["job_id"]] == parents[2]


async def test_a_request_that_no_command_line_takes_comes_as_a_file(browser: httpx.AsyncClient) -> None:
    await send(browser, "x" * (MAX_BODY_BYTES + 1))
    page = await browser.get("/chat/jobs/1")
    assert "-d @job-1.json" in page.text
    assert 'href="/chat/jobs/1/request.json"' in page.text
    assert (await browser.get("/chat/jobs/1/request.json")).json()["content"] == "x" * (MAX_BODY_BYTES + 1)


async def test_a_job_is_run_again_with_changes_and_shown_beside_the_old_one(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await send(browser, "First.", conversation_id="c", system_prompt="Be brief.")
    await ended(database, finish)
    await send(browser, "Second.", conversation_id="c", temperature=0.5, presence_penalty=1.0, grammar_name="yes_or_no")
    await ended(database, finish, reply="the old reply")
    form = await browser.get("/chat/jobs/2/again")
    assert "the old reply" in text(form)
    assert 'name="temperature" value="0.5"' in form.text
    changed = {
        "content": "Second, better.",
        "model": "other",
        "temperature": "1.5",
        "max_tokens": " 7 ",
        "stop": "a\nb",
    }
    fields = hidden_fields(form) | changed
    answers = [await browser.post("/chat/jobs/2/again", data=fields) for _ in range(2)]
    assert {answer.headers["location"] for answer in answers} == {"/chat/jobs/3?beside=2"}, "sent twice, it is one job"
    job = (await browser.get("/api/jobs/3", headers=API)).json()
    assert (job["user_input"], job["model"], job["grammar_name"]) == ("Second, better.", "other", "yes_or_no")
    assert job["parameters"] == {
        "max_tokens": 7,
        "temperature": 1.5,
        "presence_penalty": 1.0,
        "stop": ["a", "b"],
    }
    assert job["conversation_id"] != "c"
    page = await browser.get("/chat/jobs/3?beside=2")
    assert "the old reply" in text(page)
    messages = (await browser.get("/api/conversations/c/messages", headers=API)).json()["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["First.", "Second."]
    forked = (await browser.get(f"/api/conversations/{job['conversation_id']}/messages", headers=API)).json()[
        "messages"
    ]
    assert "First." in [message["content"] for message in forked], "it reads what the old one read"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"content": " "}, "type one"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": "0"}, "max_tokens"),
        ({"model": "gpt-5"}, "is not offered here"),
    ],
)
async def test_changes_that_cannot_be_come_back_with_the_reason(
    browser: httpx.AsyncClient, fields: dict[str, str], why: str
) -> None:
    await send(browser, "Typed & kept.")
    answer = await browser.post("/chat/jobs/1/again", data={"content": "Typed & changed.", "model": "smollm2"} | fields)
    assert answer.status_code == 400
    assert why in text(answer)
    if "content" not in fields:
        assert "\nTyped &amp; changed.</textarea>" in answer.text
    assert len((await browser.get("/api/jobs", headers=API)).json()["jobs"]) == 1


# What runs


LOADED = EngineStatus(
    model="smollm2",
    state="loaded",
    n_slots=2,
    n_used=1,
    job_s=10.0,
    completion_tokens=100.0,
    tokens_per_s=20.0,
    memory_bytes=640_000_000,
)


async def report(database: Database, *engines: EngineStatus) -> None:
    worker = await database.write(register_worker)
    await database.write(workers.heartbeat, worker, datetime.now(UTC), msgspec.json.encode(engines).decode())


async def test_the_status_page_shows_what_runs_what_waits_and_what_failed(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await report(
        database,
        LOADED,
        EngineStatus(model="other", state="failed", reason="There is no <file>.", n_slots=1),
    )
    for n in range(4):
        await send(browser, f"prompt {n}", conversation_id=f"c{n}", priority="interactive" if n == 3 else "normal")
    first = await claim(database)
    await database.write(
        transitions.fail,
        first.job_id,
        first.lease_token,
        datetime.now(UTC),
        outcome=Outcome.FAILED,
        kind="timeout",
        reason="It took <too> long.",
        pause=None,
    )
    await claim(database)
    page = await browser.get("/chat/status")
    said = text(page)
    assert re.search(r"Runs now #2 prompt 1 .* smollm2 : 1 free place Waits All 2", said)
    assert re.findall(r'id="waits-(\d)-', page.text) == ["4", "3"], "in the order in which they start"
    assert "starts in about" in said
    assert "Cannot be loaded" in said
    assert "There is no <file>." in said
    assert "about 640 MB of memory" in said
    assert "It took <too> long." in said
    assert re.search(r"Worker \d Alive heard \d s ago", said)
    for name in ("throughput", "waits"):
        assert f'<title id="{name}-title">' in page.text
        assert f'<desc id="{name}-desc">' in page.text
    assert "0 done and 1 failed in the last 24 h" in said
    assert (await browser.get("/chat/status/board")).status_code == 200


async def test_an_empty_installation_has_a_status_page(browser: httpx.AsyncClient) -> None:
    said = text(await browser.get("/chat/status"))
    for words in ("Nothing runs.", "Nothing waits.", "Nothing failed.", "No worker is there"):
        assert words in said


async def test_a_job_that_waits_too_long_is_loud(browser: httpx.AsyncClient, database: Database) -> None:
    await send(browser)

    def age(connection: Any) -> None:
        connection.execute(update(JobRow).values(created_at=datetime.now(UTC) - timedelta(minutes=30)))

    await database.write(age)
    page = await browser.get("/chat/status")
    assert 'id="class-normal" class="late"' in page.text
    assert "the oldest for 30 min (more than 2 min)" in text(page)


async def test_jobs_of_a_model_that_is_gone_are_not_forgotten(config: Config, database: Database) -> None:
    async with serving(config) as api:
        await send(api, model="other")
    async with serving(msgspec.structs.replace(config, models=config.models[:1])) as browser:
        await log_in(browser)
        page = await browser.get("/chat/status")
        assert "No longer offered" in text(page)
        assert 'href="/chat/jobs?status=queued&amp;model=other"' in page.text


async def test_a_person_asks_the_workers_to_load_and_to_unload_a_model(
    browser: httpx.AsyncClient, database: Database, redis_url: str
) -> None:
    await report(
        database,
        msgspec.structs.replace(LOADED, n_used=0),
        EngineStatus(model="other", state="absent", n_slots=1),
    )
    page = await browser.get("/chat/status")
    assert re.findall(r'action="/chat/status/models/(\w+)"', page.text) == ["unload", "load"]
    answer = await browser.post("/chat/status/models/load", data={"model": "other"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/chat/status")
    unloaded = await browser.post("/api/models/smollm2/unload", headers=API)
    assert (unloaded.status_code, unloaded.json()) == (202, {"ok": True, "model": "smollm2"})
    async with Redis.from_url(redis_url) as redis:
        found = await wishes.WishReader(redis, record_id(database.path), ["smollm2", "other"]).read()
    assert {model: wish.word for model, wish in found.items()} == {"smollm2": "unload", "other": "load"}


async def test_what_no_worker_can_do_is_refused_with_the_reason(config: Config, database: Database) -> None:
    pinned = msgspec.structs.replace(config.models[1], settings=ModelSettings(pinned=True))
    async with serving(msgspec.structs.replace(config, models=(config.models[0], pinned))) as api:
        assert (await api.post("/api/models/nothing/load")).status_code == 404
        assert "No worker is there" in (await api.post("/api/models/smollm2/load")).json()["detail"]
        await report(database, LOADED, EngineStatus(model="other", state="loaded", n_slots=1))
    async with serving(msgspec.structs.replace(config, models=(config.models[0], pinned))) as api:
        for name, why in (("smollm2", "runs jobs"), ("other", "is pinned")):
            answer = await api.post(f"/api/models/{name}/unload")
            assert (answer.status_code, answer.json()["type"]) == (409, "about:llamalith/not-now")
            assert why in answer.json()["detail"]
        assert (await api.post("/api/models/smollm2/load", json={"x": 1})).status_code == 400


async def test_without_redis_nobody_can_be_asked_and_the_status_page_works(
    config: Config, database: Database, absent_redis_url: str
) -> None:
    await report(database, msgspec.structs.replace(LOADED, n_used=0))
    async with serving(msgspec.structs.replace(config, redis_url=absent_redis_url)) as browser:
        answer = await browser.post("/api/models/smollm2/unload")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        await log_in(browser)
        assert (await browser.get("/chat/status")).status_code == 200


# The API's reference


async def test_every_field_of_the_reference_has_an_example_that_its_schema_allows(api: httpx.AsyncClient) -> None:
    import jsonschema  # noqa: PLC0415 - its import takes a while

    document = (await api.get("/api/openapi.json")).json()
    registry = {"components": document["components"]}
    n_checked = 0
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema["properties"].items():
            if described.get("type") == "null" or (described.get("enum") and len(described["enum"]) == 1):
                continue
            if "const" in described:
                continue
            assert described.get("examples"), f"{name}.{field}"
            jsonschema.Draft202012Validator(described | registry).validate(described["examples"][0])
            n_checked += 1
    assert n_checked > 100


async def test_the_reference_is_grouped_by_what_people_do_and_each_operation_has_its_command(
    browser: httpx.AsyncClient,
) -> None:
    page = await browser.get("/chat/docs")
    assert re.findall(r'<h2 id="group-(\w+)"', page.text) == [
        *("send", "follow", "conversations", "manage", "models", "openai", "health")
    ]
    links = re.findall(r'<li><a href="#([\w-]+)"><span class="method', page.text)
    assert len(links) == len(set(links)) == page.text.count('class="card operation"') - page.text.count('id="shape-')
    assert all(f'<div id="{anchor}">' in page.text for anchor in links)
    commands = [unescape(one) for one in re.findall(r"<code>(curl [^<]*)</code>", page.text)]
    assert len(commands) == len(links) + 1
    for command in commands:
        words = shlex.split(command.replace("\\\n", ""))
        if "-d" in words:
            json.loads(words[words.index("-d") + 1])
    assert any("curl -s -X PATCH" in command and '{"priority":"batch"}' in command for command in commands)
    assert "Example:" in text(page)
    assert "number from 0 to 5" in text(page)
