"""The pages as a browser without JavaScript has them: forms, lists, what is kept, and the messages."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from datetime import UTC, datetime
from functools import partial
from html import unescape
from pathlib import Path
from urllib.parse import urljoin

import httpx
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy.exc import OperationalError

from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.parameters import JsonObject
from llamalith_app.controllers.pages.conversation import TURNS_ON_PAGE
from llamalith_app.controllers.pages.jobs import JOBS_ON_PAGE
from llamalith_app.settings.config import Config
from llamalith_app.store import retention, sessions, turns
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads, submission, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.tables import Outcome
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.web.html import ASSETS, TEMPLATES
from tests.live import publish
from tests.settle import eventually
from tests.store import samples
from tests.store.samples import NOW, prompt, register_worker
from tests.web.conftest import PASSWORD, PATIENT, log_in, serving


async def queue(browser: httpx.AsyncClient, **fields: str) -> httpx.Response:
    return await browser.post("/chat/jobs", data={"content": "Say hello.", "model": "smollm2", **fields})


async def claim(database: Database) -> transitions.Claim:
    worker = await database.write(register_worker)
    claimed = await database.write(transitions.claim, "smollm2", 0, worker, datetime.now(UTC))
    assert claimed is not None
    return claimed


async def finish(database: Database, claimed: transitions.Claim, finish_reason: str = "stop") -> None:
    turn = await database.read(turns.read_turn, claimed.turn_id, 0)
    done = await database.write(
        transitions.finish,
        claimed.job_id,
        claimed.lease_token,
        datetime.now(UTC),
        reply_to=turn.reply_to,
        reply="Hello.",
        finish_reason=finish_reason,
        prompt_tokens=9,
        prompt_tokens_reused=0,
        completion_tokens=2,
        omitted_messages=0,
    )
    assert done


def text(answer: httpx.Response) -> str:
    """What a page says, without its tags."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", answer.text)))


async def test_a_job_made_by_the_form_shows_on_every_page(browser: httpx.AsyncClient) -> None:
    made = await queue(browser, system_prompt="Be brief.\r\nBe kind.")
    (job,) = (await browser.get("/api/jobs")).json()["jobs"]
    its_page = f"/chat/conversations/{job['conversation_id']}#job-1"
    assert (made.status_code, made.headers["location"]) == (303, its_page)
    assert (job["user_input"], job["system_prompt"]) == ("Say hello.", "Be brief.\nBe kind.")
    for path in ("/chat/jobs", "/chat/jobs?status=queued", "/chat/jobs/rows", "/chat/conversations"):
        assert "Say hello." in text(await browser.get(path)), path
    conversation = await browser.get(f"/chat/conversations/{job['conversation_id']}")
    assert "Say hello." in text(conversation)
    assert "Next in the queue" in text(conversation)


async def test_a_form_that_is_sent_twice_makes_one_job_and_with_another_text_another(
    browser: httpx.AsyncClient,
) -> None:
    once = hidden_fields((await browser.get("/chat/")).text)["once"]
    assert once != hidden_fields((await browser.get("/chat/")).text)["once"]
    answers = await asyncio.gather(*(queue(browser, once=once) for _ in range(5)))
    (page,) = {answer.headers["location"] for answer in answers}
    assert page.endswith("#job-1")
    assert (await queue(browser, once=once, content="Something else.")).headers["location"].endswith("#job-2")
    assert (await queue(browser, once=once, temperature="0.1")).headers["location"].endswith("#job-3")
    assert (await queue(browser)).headers["location"].endswith("#job-4")


async def test_a_script_learns_where_its_prompt_went_and_why_one_was_refused(browser: httpx.AsyncClient) -> None:
    asking = {"Accept": "application/json"}
    fields = {"content": "Say hello.", "conversation_id": "c", "once": "o", "temperature": "0,3", "stop": "A\r\nB"}
    made = await browser.post("/chat/jobs", data=fields, headers=asking)
    assert (made.status_code, made.json()["url"]) == (200, "/chat/conversations/c#job-1")
    assert made.json()["once"] != "o"
    assert made.cookies["llamalith_taken"] == "o", "its draft is no longer needed"
    (job,) = (await browser.get("/api/jobs")).json()["jobs"]
    assert job["parameters"] == {"temperature": 0.3, "stop": ["A", "B"]}
    page = await browser.get("/chat/conversations/c")
    assert re.search(r'name="temperature"[^>]* value="0.3"', page.text), "the next message has them too"
    for wrong, why in (
        ({"content": " "}, "The message is empty: type one."),
        ({"temperature": "9"}, "temperature: expected a number ≥ 0 and ≤ 5"),
        ({"seed": "x"}, "seed: expected a whole number ≥ 0 and ≤ 4294967295"),
    ):
        refused = await browser.post("/chat/jobs", data=fields | wrong, headers=asking)
        assert (refused.status_code, refused.json()["detail"]) == (400, why)
    shown = await browser.post("/chat/jobs", data=fields | {"temperature": "9"})
    assert "temperature: expected a number ≥ 0 and ≤ 5" in unescape(shown.text)
    assert re.search(r'name="temperature"[^>]* value="9"', shown.text), "what was typed is there to be corrected"


async def test_the_look_of_pages_is_remembered_without_a_script(browser: httpx.AsyncClient) -> None:
    csrf_token = hidden_fields((await browser.get("/chat/")).text)["csrf_token"]
    assert "data-theme" not in (await browser.get("/chat/")).text.partition(">")[2].partition(">")[0]
    for fields, shown in (
        ({"theme": "dark"}, ' data-theme="dark"'),
        ({"sidebar": "closed"}, ' data-theme="dark" data-sidebar="closed"'),
        ({"theme": "system"}, ' data-sidebar="closed"'),
        ({"sidebar": "open"}, ""),
    ):
        changed = await browser.post(
            "/chat/look", data=fields | {"csrf_token": csrf_token}, headers={"Referer": f"{browser.base_url}/chat/jobs"}
        )
        assert (changed.status_code, changed.headers["location"]) == (303, "/chat/jobs")
        assert f'<html lang="en"{shown}>' in (await browser.get("/chat/jobs")).text
    assert (await browser.post("/chat/look", data={"theme": "pink"})).status_code == 400
    browser.cookies.set("llamalith_theme", '"><script>')
    assert '<html lang="en">' in (await browser.get("/chat/")).text


async def test_what_was_typed_survives_a_record_that_cannot_even_be_read(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise OperationalError("SELECT", None, sqlite3.OperationalError("unable to open database file"))

    with monkeypatch.context() as patched:
        patched.setattr(sessions, "active_session", unreadable)
        answer = await queue(browser, content="Typed for <hours>.", once="o")
    assert answer.status_code == 503
    assert "\nTyped for &lt;hours&gt;.</textarea>" in answer.text
    assert hidden_fields(answer.text)["once"] == "o"


async def test_a_reply_goes_to_its_conversation_and_keeps_model_and_system_prompt(browser: httpx.AsyncClient) -> None:
    await queue(browser, model="other", system_prompt="Be <brief>.", conversation_id="c")
    page = await browser.get("/chat/conversations/c")
    assert '<option value="other" selected' in page.text
    assert "\nBe &lt;brief&gt;.</textarea>" in page.text
    answer = await queue(browser, content="And then?", conversation_id="c", system_prompt="Be <brief>.", model="other")
    assert answer.headers["location"] == "/chat/conversations/c#job-2"
    messages = (await browser.get("/api/conversations/c/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "user"]


async def test_the_form_of_a_new_chat_offers_the_last_model_again(browser: httpx.AsyncClient) -> None:
    await queue(browser, model="other")
    assert '<option value="other" selected' in (await browser.get("/chat/")).text


async def test_rows_show_how_far_a_job_is(browser: httpx.AsyncClient, database: Database, redis_url: str) -> None:
    for _ in range(3):
        await queue(browser)
    claimed = await claim(database)
    page_text = text(await browser.get("/chat/jobs/rows"))
    assert "Next in the queue" in page_text
    assert "Place 2 in the queue" in page_text
    progress_by_words = {
        "Loading the model": Progress(phase="loading"),
        "Reading the prompt: 512 of 2000 tokens": Progress(phase="prefill", prompt_tokens=2000, prompt_tokens_done=512),
        "Writing: 1 token": Progress(phase="decode", completion_tokens=1),
        "Writing: 45 tokens, 12.3 a second": Progress(phase="decode", completion_tokens=45, tokens_per_s=12.345),
    }
    async with Redis.from_url(redis_url) as redis:
        for words, progress in progress_by_words.items():
            await publish(redis, record_id(database.path), 1, claimed.attempt, progress)
            for path in ("/chat/jobs/rows", "/chat/jobs/1", "/chat/jobs/1/state", "/chat/status/board"):
                assert words in text(await browser.get(path)), path
    await finish(database, claimed)
    done = await browser.get("/chat/jobs?status=done")
    assert "Done" in text(done)
    assert re.search(r"\d+ tokens in \d+\.\d s", text(done))


async def test_a_reply_that_was_cut_off_says_so_in_lists_as_well(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for reason in ("stop", "length"):
        await queue(browser, conversation_id=reason)
        await finish(database, await claim(database), reason)
    rows = await browser.get("/chat/jobs/rows")
    assert [("cut off" in row) for row in rows.text.split('id="job-')[1:]] == [True, False]


async def test_a_failed_job_says_why(browser: httpx.AsyncClient, database: Database) -> None:
    await queue(browser, conversation_id="c")
    claimed = await claim(database)
    await database.write(
        transitions.fail,
        claimed.job_id,
        claimed.lease_token,
        datetime.now(UTC),
        outcome=Outcome.FAILED,
        kind="model_unavailable",
        reason="There is no file.",
        pause=None,
    )
    for path in ("/chat/jobs?status=error", "/chat/conversations/c"):
        assert "There is no file." in text(await browser.get(path))


async def test_empty_pages_say_what_to_do_next(browser: httpx.AsyncClient) -> None:
    assert "What shall we write?" in text(await browser.get("/chat/"))
    assert "No job is failed just now." in text(await browser.get("/chat/jobs?status=error"))
    assert "No conversations yet. New chat" in text(await browser.get("/chat/conversations"))


async def test_older_jobs_and_conversations_are_a_link_away(browser: httpx.AsyncClient) -> None:
    for number in range(JOBS_ON_PAGE + 5):
        await browser.post("/api/jobs", json={"content": f"prompt {number}", "conversation_id": f"c{number}"})
    newest = await browser.get("/chat/jobs")
    (older,) = re.findall(r'href="([^"]*before=[^"]*)">\s*Older jobs', newest.text)
    rows = await browser.get("/chat/jobs/rows")
    assert older in rows.text, "the link moves on with the list"
    page = await browser.get(unescape(older))
    assert len(re.findall(r'<tr [^>]*id="job-', newest.text)) == JOBS_ON_PAGE
    assert re.findall(r'<tr [^>]*id="job-(\d+)', page.text) == ["5", "4", "3", "2", "1"]
    assert "Older jobs" not in page.text
    first = await browser.get("/chat/conversations")
    assert first.text.index("prompt 54") < first.text.index("prompt 53"), "newest first"
    (older,) = re.findall(r'href="([^"]*before=[^"]*)">Older<', first.text)
    second = await browser.get(unescape(older))
    listed = second.text.partition("<main")[2]
    assert [f">prompt {number}<" in listed for number in (15, 14, 0)] == [False, True, True]
    assert "Older<" not in second.text


async def test_of_a_long_conversation_the_newest_turns_show_and_the_rest_is_a_link_away(
    browser: httpx.AsyncClient,
) -> None:
    n_turns = TURNS_ON_PAGE + 3
    for number in range(n_turns):
        await browser.post("/api/jobs", json={"content": f"prompt {number};", "conversation_id": "a/b"})
    page = await browser.get("/chat/conversation?id=a/b")
    assert "prompt 2;" not in page.text.partition("<main")[2].partition("<ol")[2]
    (earlier,) = re.findall(r'href="([^"]*before=[^"]*)"', page.text)
    before = await browser.get(unescape(earlier))
    assert [f"prompt {number};" in before.text for number in range(4)] == [True, True, True, False]
    assert "<textarea" not in before.text
    (brought,) = re.findall(r'data-earlier="([^"]*)"', page.text)
    part = await browser.get(unescape(brought))
    assert [f"prompt {number};" in part.text for number in range(4)] == [True, True, True, False]
    assert "Earlier messages" not in part.text
    part = await browser.get("/chat/conversation/turns", params={"id": "a/b", "before": n_turns - 1})
    assert len(re.findall(r"<li id=", part.text)) == TURNS_ON_PAGE
    assert 'href="/chat/conversation?id=a%2Fb&amp;before=2&amp;last=2"' in part.text
    part = await browser.get("/chat/conversation/turns", params={"id": "a/b", "from": n_turns - 2})
    assert len(re.findall(r"<li id=", part.text)) == 2


async def test_of_turns_that_have_expired_nothing_shows_and_no_link_leads_to_them(
    browser: httpx.AsyncClient, database: Database
) -> None:
    n_turns = TURNS_ON_PAGE + 3
    for number in range(n_turns):
        await browser.post("/api/jobs", json={"content": f"prompt {number};", "conversation_id": "c"})
    now = datetime.now(UTC)
    for job_id in range(1, n_turns):
        await database.write(transitions.cancel, ADMIN_ID, job_id, now)
    await database.write(retention.delete_expired_jobs, now, 1000)
    page = await browser.get("/chat/conversations/c")
    assert re.findall(r"prompt \d+;", page.text.partition("<ol")[2]) == [f"prompt {n_turns - 1};"]
    assert len(re.findall(r"<li id=", page.text)) == 1
    assert "Earlier messages" not in page.text
    await database.write(transitions.cancel, ADMIN_ID, n_turns, now)
    await database.write(retention.delete_expired_jobs, now, 1000)
    assert (await browser.get("/chat/conversations/c")).status_code == 404
    assert "No conversations yet." in text(await browser.get("/chat/conversations"))


async def test_a_part_asks_for_the_turns_that_may_still_change(browser: httpx.AsyncClient, database: Database) -> None:
    for _ in range(2):
        await queue(browser, conversation_id="c")
    asked = []
    for _ in range(3):
        part = await browser.get("/chat/conversation/turns?id=c&from=0")
        asked.append(
            re.findall(r'data-live="[^"]*from=(\d+)&amp;known=2&amp;seen=2" data-part data-open="(\d)"', part.text)[0]
        )
        if len(asked) < 3:
            await finish(database, await claim(database))
    assert asked == [("0", "2"), ("1", "1"), ("2", "0")]
    later = await browser.get("/chat/conversation/turns?id=c&from=2")
    assert "<li" not in later.text
    await browser.post("/api/jobs", json={"content": "from n8n", "conversation_id": "c"})
    assert "from n8n" in (await browser.get("/chat/conversation/turns?id=c&from=2")).text


async def test_a_reply_that_is_held_to_json_is_shown_as_code(browser: httpx.AsyncClient, database: Database) -> None:
    worker = await database.write(register_worker)
    for wanted in (JsonObject(), None):
        await database.write(submission.submit, prompt(conversation_id="c", response_format=wanted), NOW)
        claimed = await database.write(transitions.claim, "m", 1, worker, NOW)
        assert claimed is not None
        await database.write(samples.finish, claimed, '{"a": "*b*"}')
    replies = (await browser.get("/chat/conversations/c")).text.split('<div class="text markdown">')[1:]
    assert ["<figcaption>json</figcaption>" in reply for reply in replies] == [True, False]
    assert ["<em>b</em>" in reply for reply in replies] == [False, True]


async def test_of_a_turn_that_the_page_has_only_what_changes_comes_again(
    browser: httpx.AsyncClient, database: Database
) -> None:
    long = "x" * 500_000
    for _ in range(3):
        await queue(browser, conversation_id="c", content=long)
    await finish(database, await claim(database))
    part = await browser.get("/chat/conversation/turns?id=c&from=0&known=2")
    assert part.text.count(long) == 2, "of the one that is done, and of the one that is new to the page"
    assert len(re.findall(r"data-brief", part.text)) == 1
    assert "Next in the queue" in text(part)


async def test_a_part_of_very_long_turns_begins_where_it_was_asked_to(
    browser: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "MAX_PAGE_CHARS", 100)
    for n in range(3):
        await queue(browser, conversation_id="c", content=f"{n} " + 70 * "x")
    part = (await browser.get("/chat/conversation/turns?id=c&from=0")).text
    assert re.findall(r'id="job-(\d+)"', part) == ["1", "2"]
    whole = (await browser.get("/chat/conversations/c")).text
    assert re.findall(r'id="job-(\d+)"', whole) == ["2", "3"]


async def test_a_part_is_no_longer_than_a_page(browser: httpx.AsyncClient) -> None:
    n_turns = TURNS_ON_PAGE + 5
    for _ in range(n_turns):
        await queue(browser, conversation_id="c", content="x")
    part = await browser.get("/chat/conversation/turns?id=c&from=0")
    assert len(re.findall(r"<li id=", part.text)) == TURNS_ON_PAGE


async def test_a_list_of_conversations_shows_what_each_is_busy_with(
    browser: httpx.AsyncClient, database: Database
) -> None:
    for _ in range(2):
        await queue(browser, conversation_id="c")

    async def rows() -> str:
        return (await browser.get("/chat/conversations")).text.partition('<ul class="rows"')[2]

    page_text = []
    for _ in range(2):
        page_text.append(await rows())
        claimed = await claim(database)
        page_text.append(await rows())
        await finish(database, claimed)
    page_text.append(await rows())
    found = [re.findall(r"\b(?:Queued|Running|Failed|Done)\b", one) for one in page_text]
    assert found == [["Queued"], ["Running"], ["Queued"], ["Running"], []]


@pytest.mark.parametrize("public_id", ["a/b", ".", "..", "a b", "ä?&=%23#", "'\"<>", "a%2Fb", "\\", "+", "/", "a/"])
async def test_every_conversation_has_a_page(browser: httpx.AsyncClient, public_id: str) -> None:
    await browser.post("/api/jobs", json={"content": "find me", "conversation_id": public_id})
    listed = await browser.get("/chat/conversations")
    (address,) = {unescape(one) for one in re.findall(r'href="(/chat/conversation[s/?][^"]+)#reply"', listed.text)}
    page = await browser.get(address)
    assert page.status_code == 200
    assert "find me" in page.text
    (live,) = re.findall(r'data-live="([^"]+)"', page.text)
    assert 'id="job-1"' in (await browser.get(unescape(live))).text
    answer = await queue(browser, conversation_id=public_id)
    assert answer.headers["location"] == f"{address}#job-2"


DISGUISED = "invoice-\u202egpj.exe"
SHOWN = "invoice-⟨U+202E⟩gpj.exe"


async def test_an_id_that_turns_its_letters_is_shown_as_it_is_and_turns_nothing_beside_it(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await queue(browser, content="a\u202eb 👩\u200d👧", conversation_id=DISGUISED)
    address = "/chat/conversations/invoice-%E2%80%AEgpj.exe"
    page = await browser.get(address)
    assert "<title>a⟨U+202E⟩b 👩\u200d👧 · Llamalith</title>" in page.text
    assert f"Conversation <code>{SHOWN}" in re.sub(r"</?bdi[^>]*>", "", page.text.partition("<main")[2])
    title = page.text.partition("<h1>")[2].partition("</h1>")[0]
    assert title == ('<span class="line" dir="auto">a<bdi class="mark" dir="ltr">⟨U+202E⟩</bdi>b 👩\u200d👧</span>'), (
        "what joins an emoji stays"
    )
    assert '<p class="text" dir="auto">a\u202eb 👩\u200d👧</p>' in page.text, "a message is not changed"
    draft = await queue(browser, conversation_id=DISGUISED, content=" ")
    for shown in (await browser.get("/chat/conversations"), draft):
        assert SHOWN in re.sub(r"</?bdi[^>]*>", "", shown.text)
    assert f'name="conversation_id" value="{DISGUISED}"' in draft.text
    refused = await queue(browser, model="m\u202e")
    assert "m⟨U+202E⟩" in re.sub(r"</?bdi[^>]*>", "", refused.text)
    missing = await browser.get("/chat/a%E2%80%AEb")
    assert "a⟨U+202E⟩b" in re.sub(r"</?bdi[^>]*>", "", missing.text)
    await finish(database, await claim(database))
    for path in ("/chat/", "/chat/jobs", "/chat/jobs/rows", "/chat/conversations", "/chat/conversation/list"):
        assert "\u202e" not in text(await browser.get(path)), path


async def test_a_model_s_name_and_the_reason_of_an_error_hide_nothing(config: Config, database: Database) -> None:
    named = msgspec.structs.replace(config.models[0], name="smollm2\u202e")
    async with serving(msgspec.structs.replace(config, models=(named,))) as browser:
        await log_in(browser)
        await queue(browser, model=named.name, conversation_id="c")
        worker = await database.write(register_worker)
        claimed = await database.write(transitions.claim, named.name, 0, worker, datetime.now(UTC))
        assert claimed is not None
        await database.write(
            transitions.fail,
            claimed.job_id,
            claimed.lease_token,
            datetime.now(UTC),
            outcome=Outcome.FAILED,
            kind="model_unavailable",
            reason="no \u202efile",
            pause=None,
        )
        for path in ("/chat/jobs", "/chat/conversations/c"):
            page = (await browser.get(path)).text
            assert "no ⟨U+202E⟩file" in re.sub(r"</?bdi[^>]*>", "", page)
            assert "\u202e" not in page.replace('value="smollm2\u202e"', "")


async def test_a_lone_system_prompt_and_a_context_show(browser: httpx.AsyncClient) -> None:
    await browser.post("/api/jobs", json={"system_prompt": "Be a pirate.", "conversation_id": "c"})
    page = text(await browser.get("/chat/conversations/c"))
    assert "No message" in page
    assert "Be a pirate." in page
    await browser.post("/api/jobs", json={"content": "x", "assistant_context": "Ahoy!", "conversation_id": "c"})
    assert "Put before the message Ahoy!" in text(await browser.get("/chat/conversations/c"))


# What is wrong is shown, and what was typed is kept


WRONG = {
    "nothing": ({"content": ""}, "The message is empty"),
    "only blanks": ({"content": " \r\n "}, "The message is empty"),
    "a model that is not there": ({"model": "gpt-5"}, '"gpt-5" is not offered here; these are: smollm2, other'),
    "too long": ({"content": "x" * 1_000_001}, "1000000"),
    "NUL": ({"content": "a\x00b"}, "not allowed here"),
    "a control character in an id": ({"conversation_id": "a\x07b"}, "without control characters"),
    "an id that is too long": ({"conversation_id": "x" * 201}, "200"),
}


@pytest.mark.parametrize(("fields", "why"), WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_form_comes_back_with_the_reason_and_with_what_was_typed(
    browser: httpx.AsyncClient, fields: dict[str, str], why: str
) -> None:
    answer = await queue(browser, **{"system_prompt": "Typed & kept.", **fields})
    assert answer.status_code == 400
    assert why in unescape(answer.text)
    assert "Typed &amp; kept.</textarea>" in answer.text
    assert (await browser.get("/api/jobs")).json() == {"jobs": []}


async def test_a_10_mb_form_is_answered_that_it_is_too_long(browser: httpx.AsyncClient) -> None:
    answer = await queue(browser, content="x" * 10_000_000)
    assert answer.status_code == 400
    assert "1000000" in answer.text
    assert (await queue(browser, content="x" * 17_000_000)).status_code == 413


async def test_what_was_typed_survives_the_end_of_the_session(config: Config) -> None:
    async with serving(config) as client:
        await log_in(client)
        await client.get("/chat/logout")
        fields = {
            "content": "Typed for <hours>.",
            "system_prompt": "Kept too.",
            "model": "other",
            "conversation_id": "c",
        }
        sent = await client.post("/chat/jobs", data=fields)
        assert sent.status_code == 401
        assert "Typed for &lt;hours&gt;." in sent.text
        kept = hidden_fields(sent.text)
        assert {name: kept[name] for name in fields} == fields
        wrong = await client.post("/chat/login", data=kept | {"password": "wrong"})
        assert wrong.status_code == 401
        again = await client.post("/chat/login", data=hidden_fields(wrong.text) | {"password": PASSWORD})
        assert again.status_code == 200
        assert "Nothing has been sent yet." in again.text
        assert "\nTyped for &lt;hours&gt;.</textarea>" in again.text
        assert (await client.get("/api/jobs")).json() == {"jobs": []}
        answer = await client.post("/chat/jobs", data=fields | hidden_fields(again.text))
        assert answer.headers["location"] == "/chat/conversations/c#job-1"


def hidden_fields(page: str) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page.partition("<main")[2])
    return {name: unescape(value) for name, value in found}


async def test_what_was_typed_survives_a_login_even_if_it_could_not_be_sent(config: Config) -> None:
    async with serving(config) as client:
        await log_in(client)
        await client.get("/chat/logout")
        sent = await client.post("/chat/jobs", data={"content": "kept", "conversation_id": "a\x07b"})
        assert sent.status_code == 401
        again = await client.post("/chat/login", data=hidden_fields(sent.text) | {"password": PASSWORD})
        assert again.status_code == 200
        assert "\nkept</textarea>" in again.text


@pytest.mark.parametrize("timings", [msgspec.structs.replace(PATIENT, lock_deadline_s=0.1)], ids=["impatient"])
async def test_what_was_typed_survives_a_locked_database(browser: httpx.AsyncClient, database_path: Path) -> None:
    with sqlite3.connect(database_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = await queue(browser, content="typed before the disk was full")
        other.execute("ROLLBACK")
    other.close()
    assert answer.status_code == 503
    assert "typed before the disk was full</textarea>" in answer.text
    assert "The database cannot be used now" in answer.text


@pytest.mark.parametrize("timings", [msgspec.structs.replace(PATIENT, lock_deadline_s=0.1)], ids=["impatient"])
async def test_a_login_that_cannot_be_stored_says_so_and_keeps_what_was_typed(
    browser: httpx.AsyncClient, database_path: Path
) -> None:
    with sqlite3.connect(database_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = await browser.post("/chat/login", data={"password": PASSWORD, "content": "typed & kept"})
        other.execute("ROLLBACK")
    other.close()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert hidden_fields(answer.text)["content"] == "typed & kept"


@pytest.mark.parametrize(
    "timings", [msgspec.structs.replace(PATIENT, lock_deadline_s=0.1, session_touch_s=0)], ids=["impatient"]
)
async def test_pages_are_read_while_the_database_cannot_be_written(
    browser: httpx.AsyncClient, database_path: Path
) -> None:
    """Although the session would note by now that it is used."""
    with sqlite3.connect(database_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = await browser.get("/chat/jobs")
        other.execute("ROLLBACK")
    other.close()
    assert answer.status_code == 200


async def test_two_tabs_share_a_session_and_a_new_login_in_one_leaves_the_other_working(
    browser: httpx.AsyncClient,
) -> None:
    other_tab = hidden_fields((await browser.get("/chat/")).text)
    await browser.post("/chat/login", data={"password": PASSWORD})
    answer = await browser.post("/chat/jobs", data=other_tab | {"content": "from the older tab"})
    assert answer.status_code == 303
    # A client that sends no origin has only its token, and that is of a session that ended.
    del browser.headers["Origin"]
    stale = await browser.post("/chat/jobs", data=other_tab | {"content": "again"})
    assert stale.status_code == 403
    assert "out of date" in stale.text
    fresh = hidden_fields(stale.text) | {"content": "again"}
    assert (await browser.post("/chat/jobs", data=fresh)).status_code == 303


async def test_errors_are_pages_for_people_and_problems_for_programs(browser: httpx.AsyncClient) -> None:
    for path, status in (
        ("/chat/nothing", 404),
        ("/chat/conversations/unknown", 404),
        ("/chat/conversation", 400),
        ("/chat/jobs?before=x", 400),
        ("/chat/jobs?before=0", 400),
        ("/chat/conversations?before=0", 400),
        ("/chat/conversations/c?before=30&last=x", 400),
        ("/chat/conversations/c?before=-1", 400),
        ("/chat/conversation/turns?id=unknown", 404),
    ):
        page = await browser.get(path)
        assert (page.status_code, page.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
        assert '<a class="button" href="/chat/">' in page.text
        problem = await browser.get(path, headers={"Accept": "application/json"})
        assert (problem.status_code, problem.headers["content-type"]) == (status, "application/problem+json"), path
    assert (await browser.delete("/chat/jobs")).status_code == 405


async def test_an_unknown_status_finds_nothing_and_breaks_nothing(browser: httpx.AsyncClient) -> None:
    answer = await browser.get("/chat/jobs", params={"status": "<script>"})
    assert answer.status_code == 400
    assert "<script>" not in answer.text.replace('<script type="module"', "")


# The scripts


async def test_every_module_comes_under_the_page_s_version_and_is_preloaded(browser: httpx.AsyncClient) -> None:
    page = (await browser.get("/chat/")).text
    preloaded = set(re.findall(r'<link rel="modulepreload" href="([^"]+)">', page))
    (entry,) = re.findall(r'<script type="module" src="([^"]+)">', page)
    imported: set[str] = set()
    unread = {entry}
    while unread:
        path = unread.pop()
        module = await browser.get(path)
        assert module.status_code == 200, path
        assert module.headers["content-type"].startswith("text/javascript")
        assert module.headers["cache-control"] == "public, max-age=31536000, immutable"
        found = {urljoin(path, name) for name in re.findall(r'^import .* from "([^"]+)"$', module.text, re.MULTILINE)}
        unread |= found - imported
        imported |= found
    assert len(imported) > 5
    assert imported == preloaded


def test_every_file_that_a_template_names_exists() -> None:
    named = {
        name for template in TEMPLATES.iterdir() for name in re.findall(r"static\('([^']+)'\)", template.read_text())
    }
    assert len(named) > 3
    assert named <= set(ASSETS)


# The API's reference and the queue's monitor


async def test_the_reference_shows_every_operation_and_the_document_lies_beside_it(browser: httpx.AsyncClient) -> None:
    page = text(await browser.get("/chat/docs"))
    document = (await browser.get("/chat/docs/openapi.json")).json()
    assert document["servers"] == [{"url": "/chat"}]
    assert len(document["paths"]) == 42
    for path, methods in document["paths"].items():
        assert path in page
        for operation in methods.values():
            assert operation["summary"] in page
    for words in ("assistant_context", "Only jobs in this state.", "integer from 1 to 500", "prompt_tokens_done"):
        assert words in page, words


async def test_the_monitor_shows_the_real_queues_and_their_tasks(browser: httpx.AsyncClient, redis_url: str) -> None:
    assert (await browser.get("/chat/queue")).headers["location"] == "/chat/queue/"
    shell = await browser.get("/chat/queue/")
    scripts = re.findall(r'(?:src|href)="(/chat/queue/static/[^"]+)"', shell.text)
    for path in scripts:
        asset = await browser.get(path, headers={"Accept-Encoding": "identity"})
        assert asset.status_code == 200, path
        assert asset.headers["content-type"].startswith(("text/javascript", "text/css"))
    assert len(scripts) == 3
    assert "This counts hints that wake the workers, not jobs: the jobs are here" in text(shell)
    assert 'aria-label="Pages"' in shell.text, "the frame stays around it"
    await queue(browser)
    await queue(browser, model="other")
    async with Redis.from_url(redis_url) as redis:
        for number, model in enumerate(("smollm2", "other"), start=1):
            await eventually(partial(redis.exists, f"saq:job:llamalith:{model}:j{number}.a1"))
    listed = (await browser.get("/chat/queue/api/queues")).json()["queues"]
    assert [one["name"] for one in listed] == ["llamalith:smollm2", "llamalith:other"]
    for number, name in enumerate(("llamalith:smollm2", "llamalith:other"), start=1):
        one = (await browser.get(f"/chat/queue/api/queues/{name}")).json()["queue"]
        assert one["queued"] == 1
        (task,) = one["jobs"]
        assert (task["key"], task["kwargs"]) == (f"j{number}.a1", f"{{'job_id': {number}}}")
        task = (await browser.get(f"/chat/queue/api/queues/{name}/jobs/j{number}.a1")).json()["job"]
        assert (task["function"], task["queue"]) == ("wake", name)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("action", ["", "/api/queues/llamalith:smollm2/jobs/j1.a1/retry", "/x/abort"])
async def test_the_monitor_only_shows(browser: httpx.AsyncClient, method: str, action: str) -> None:
    answer = await browser.request(method, f"/chat/queue{action}", headers={"Accept": "*/*"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert "/chat/jobs" in answer.json()["detail"]


async def test_the_monitor_s_script_learns_that_the_session_has_ended(browser: httpx.AsyncClient) -> None:
    await browser.get("/chat/logout")
    answer = await browser.get("/chat/queue/api/queues", headers={"Sec-Fetch-Mode": "cors"})
    assert (answer.status_code, answer.json()["error"][:22]) == (401, "Your session has ended")
    assert (await browser.get("/chat/queue/")).headers["location"] == "/chat/login"


@pytest.mark.parametrize("entry", [b"", b"garbage", b"[]", b"1", b'{"queue": "other"}', b"null"])
async def test_a_task_that_saq_cannot_read_is_no_error_of_ours(
    browser: httpx.AsyncClient, redis_url: str, entry: bytes
) -> None:
    await queue(browser)
    async with Redis.from_url(redis_url) as redis:
        await eventually(lambda: redis.exists("saq:job:llamalith:smollm2:j1.a1"))
        await redis.set("saq:job:llamalith:smollm2:j1.a1", entry)
    for path in ("", "/jobs/j1.a1"):
        answer = await browser.get(f"/chat/queue/api/queues/llamalith:smollm2{path}")
        assert answer.status_code == 200
        assert {"error", "queue"} & set(answer.json())


async def test_a_model_keeps_its_name_to_the_letter(config: Config) -> None:
    model = msgspec.structs.replace(config.models[0], name='a  "b"')
    async with serving(msgspec.structs.replace(config, models=(model,))) as client:
        await log_in(client)
        page = await client.get("/chat/")
        assert '<option value="a  &#34;b&#34;"' in page.text
        assert (await queue(client, model='a  "b"')).status_code == 303
        listed = (await client.get("/chat/queue/api/queues")).json()["queues"]
        assert [one["name"] for one in listed] == ["llamalith:a___b_"]


async def test_the_monitor_says_what_it_does_not_know(config: Config, absent_redis_url: str) -> None:
    async with serving(config) as client:
        await log_in(client)
        for path in ("queues/nothing", "queues/nothing/jobs/x", "queues/llamalith:smollm2/jobs/x"):
            assert "error" in (await client.get(f"/chat/queue/api/{path}")).json(), path
        assert (await client.get("/chat/queue/static/nothing.js")).status_code == 404


async def test_without_redis_the_monitor_says_so_and_every_other_page_works(
    config: Config, absent_redis_url: str
) -> None:
    async with serving(msgspec.structs.replace(config, redis_url=absent_redis_url)) as client:
        await log_in(client)
        assert (await queue(client, conversation_id="c")).status_code == 303
        for path in ("/chat/", "/chat/jobs", "/chat/conversations", "/chat/conversations/c", "/chat/queue/"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("queues", "queues/llamalith:smollm2", "queues/llamalith:smollm2/jobs/j1.a1"):
            assert "Redis does not answer" in (await client.get(f"/chat/queue/api/{path}")).json()["error"]


async def test_a_system_prompt_that_was_left_as_it_was_shown_turns_no_newer_one_back(
    browser: httpx.AsyncClient,
) -> None:
    await queue(browser, system_prompt="French.", conversation_id="c")
    shown = hidden_fields((await browser.get("/chat/conversations/c")).text)["system_prompt_was"]
    assert shown == "French."
    await queue(browser, content="In another window.", system_prompt="German.", conversation_id="c")
    await queue(
        browser, content="Here.", system_prompt="French.", system_prompt_was=shown, conversation_id="c", once="o"
    )
    await queue(browser, content="And so.", system_prompt="Latin.", system_prompt_was=shown, conversation_id="c")
    listed = (await browser.get("/chat/api/conversations/c/messages")).json()["messages"]
    assert [message["content"] for message in listed if message["role"] == "system"] == ["French.", "German.", "Latin."]


async def test_a_message_from_a_page_whose_conversation_has_expired_takes_the_shown_system_prompt_along(
    browser: httpx.AsyncClient, database: Database
) -> None:
    await queue(browser, system_prompt="Be brief.", conversation_id="c")
    shown = hidden_fields((await browser.get("/chat/conversations/c")).text)["system_prompt_was"]
    now = datetime.now(UTC)
    await database.write(transitions.cancel, ADMIN_ID, 1, now)
    await database.write(retention.delete_expired_jobs, now, 1000)
    assert (await browser.get("/chat/conversations/c")).status_code == 404
    await queue(browser, content="Go on.", system_prompt=shown, system_prompt_was=shown, conversation_id="c")
    listed = (await browser.get("/api/conversations/c/messages")).json()["messages"]
    assert [(message["role"], message["content"]) for message in listed] == [
        ("system", "Be brief."),
        ("user", "Go on."),
    ]
