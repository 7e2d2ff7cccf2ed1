"""Conversations as files: what an export has, and what an import makes of it or refuses."""

from __future__ import annotations

import json
import random
import re
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, Engine

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.export import MAX_TURNS
from llamalith_app.store import check, turns
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import finish, prompt, register_worker

TEXT = "tables | and\n```python\ncode\n```\n<script>alert(1)</script> מימין לשמאל 👩‍👧"


def exported(*turns_of_it: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"format": "llamalith-conversation-1", "turns": list(turns_of_it), **fields}


def turn(number: int, parent: int | None, *said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return {"id": number, "parent": parent, "messages": messages}


async def answered(
    database: Database, new: submission.NewJob, reply: str, beside: int | None = None, **more: Any
) -> int:
    """The id of its turn."""

    def store(connection: Connection) -> int:
        now = datetime.now(UTC)
        register_worker(connection)
        if beside is None:
            submission.submit(connection, new, now)
        else:
            assert submission.submit_sibling(connection, new, beside, now) is not None
        claimed = transitions.claim(connection, "m", 1, 1, now)
        assert claimed is not None
        assert finish(connection, claimed, reply, **more)
        return claimed.turn_id

    return await database.write(store)


async def messages(client: httpx.AsyncClient, public_id: str) -> list[tuple[str, str]]:
    found = await client.get(f"/api/conversations/{public_id}/messages")
    return [(message["role"], message["content"]) for message in found.json()["messages"]]


async def test_what_was_exported_is_the_same_conversation_after_an_import(
    api: httpx.AsyncClient, database: Database, engine: Engine
) -> None:
    first = await answered(database, prompt(TEXT, "a", system_prompt="be\nkind", context="so far"), "reply one")
    other = await answered(database, prompt("another branch", "a"), "reply two", thinking="hm", thinking_s=2)
    await answered(database, prompt("seen branch", "a"), "reply three", beside=other)
    await api.post("/api/conversations/a/reply", json={"content": "still waits"})
    await api.patch("/api/conversations/a", json={"title": "Ein „Titel“: ½", "tags": ["x"]})
    saved = await api.get("/api/conversations/a/export")
    assert saved.headers["content-disposition"] == (
        "attachment; filename=\"Ein Titel _.json\"; filename*=UTF-8''Ein%20Titel%20%C2%BD.json"
    )
    file = saved.json()
    assert [(one["id"], one["parent"], one.get("status")) for one in file["turns"]] == [
        (first, None, "done"),
        (other, first, "done"),
        (other + 1, first, "done"),
        (other + 2, other + 1, "queued"),
    ]
    made = await api.post("/api/conversations/import", json=file)
    assert made.json() == made.json() | {"ok": True, "n_turns": 3, "n_left_out": 1}
    new_id = made.json()["conversation_id"]
    assert await messages(api, new_id) == (await messages(api, "a"))[:-1]
    brief = (await api.get(f"/api/conversations/{new_id}")).json()
    assert (brief["title"], brief["tags"], brief["source"], brief["status"]) == (
        "Ein „Titel“: ½",
        ["x"],
        "import",
        None,
    )
    found = await api.get("/api/conversations", params={"q": "another branch"})
    assert {one["conversation_id"] for one in found.json()["conversations"]} == {"a", new_id}
    again = (await api.get(f"/api/conversations/{new_id}/export")).json()
    kept = ("content", "thinking", "thinking_s")
    before, after = (
        [[{name: message.get(name) for name in kept} for message in one["messages"]] for one in saved["turns"][:3]]
        for saved in (file, again)
    )
    assert before == after
    assert after[1][-1] == {"content": "reply two", "thinking": "hm", "thinking_s": 2}
    reply = await api.post(f"/api/conversations/{new_id}/reply", json={"content": "goes on"})

    def read(connection: Connection) -> list[Message]:
        (newest,) = connection.exec_driver_sql("SELECT max(id) FROM turns").scalars()
        assert check.violations(connection) == []
        return turns.read_turn(connection, newest, 10**6).messages

    assert reply.status_code == 200
    assert [message.content for message in await database.read(read)] == [
        *("be\nkind", "so far", TEXT, "reply one", "seen branch", "reply three", "goes on"),
    ]


async def test_an_imported_conversation_looks_and_works_like_any_other(browser: httpx.AsyncClient) -> None:
    """Its turns have no jobs: what its page does with jobs' replies it does with theirs."""
    file = exported(
        turn(1, None, "first", "**loud**\n\n<b>raw</b>"),
        turn(2, 1, "context", "said sooner", "second", "left"),
        turn(3, 1, "second", "right"),
    )
    page = await browser.get("/chat/conversations")
    token = re.findall(r'name="csrf_token" value="([^"]+)"', page.text)[0]
    data, files = {"csrf_token": token, "once": "k"}, {"file": ("c.json", json.dumps(file), "application/json")}
    made = await browser.post("/chat/conversation/import", data=data, files=files)
    text = (await browser.get(made.headers["location"])).text
    assert "<strong>loud</strong>" in text
    assert "<b>raw" not in text
    assert 'data-source="**loud**\n\n&lt;b&gt;raw&lt;/b&gt;"' in text, "what Copy copies"
    assert text.count('class="bubble"') == 2
    assert "2/2" in text, "its branches can be paged through"
    actions = {f"/chat/conversation/{what}" for what in ("head", "fork", "turns/delete")}
    assert set(re.findall(r'formaction="([^"]+)"', text)) - {"/chat/attachments"} == actions
    before = re.findall(r'name="turn_id" value="(\d+)" aria-label="Version before"', text)
    form = {"csrf_token": token, "conversation_id": made.headers["location"].rpartition("/")[2], "turn_id": before[0]}
    other = await browser.post("/chat/conversation/head", data=form)
    text = (await browser.get(other.headers["location"])).text
    assert text.count("data-edit") == 2, "not what is only context"
    forked = await browser.post("/chat/conversation/fork", data=form | {"once": "f"})
    assert forked.status_code == 303
    deleted = await browser.post("/chat/conversation/turns/delete", data=form)
    assert deleted.status_code == 303
    assert "sooner" not in (await browser.get(deleted.headers["location"])).text


async def test_an_export_to_read_has_the_branch_that_people_see(api: httpx.AsyncClient, database: Database) -> None:
    await answered(database, prompt("hello\nthere", "a", system_prompt="be\n\nkind"), "**hi**", thinking="hm")
    saved = await api.get("/api/conversations/a/export", params={"format": "md"})
    assert saved.headers["content-type"] == "text/markdown; charset=utf-8"
    assert saved.headers["content-disposition"].startswith('attachment; filename="hello there.md"')
    assert saved.text == (
        "# hello there\n\n> System prompt:\n>\n> be\n>\n> kind\n\n## You\n\nhello\nthere\n\n"
        "## m\n\n> Thinking:\n>\n> hm\n\n**hi**\n"
    )


async def test_a_fork_is_exported_with_the_turns_that_it_continues(api: httpx.AsyncClient, database: Database) -> None:
    first = await answered(database, prompt("the beginning", "a"), "reply")

    def fork(connection: Connection) -> None:
        now = datetime.now(UTC)
        submission.fork(connection, ADMIN_ID, "a", first, "f", now)
        submission.submit(connection, prompt("the fork", "f"), now)

    await database.write(fork)
    await api.delete("/api/conversations/a")
    file = (await api.get("/api/conversations/f/export")).json()
    assert [one["messages"][0]["content"] for one in file["turns"]] == ["the beginning", "the fork"]
    assert file["turns"][1]["parent"] == first
    assert (await api.get("/api/conversations/a/export")).status_code == 404


@pytest.mark.parametrize(
    ("file", "detail"),
    [
        ({}, "format: missing"),
        (exported(), "turns: "),
        (exported(turn(1, None, "a", "b")) | {"format": "other"}, "format: "),
        (exported(turn(1, None, "a")), "turns: none of them has a reply"),
        (exported(turn(1, 1, "a", "b")), "turns[0].parent: no turn before this one has that id"),
        (exported(turn(1, 2, "a", "b"), turn(2, None, "a", "b")), "turns[0].parent: no turn before"),
        (exported(turn(1, None, "a", "b"), turn(1, None, "a", "b")), "turns[1].id: another turn of this file has it"),
        (exported(turn(1, None, "a", "b"), head=2), "head: no turn of this file has that id"),
        (exported(turn(1, None, "a", "b"), title="x" * 201), "title: "),
        (exported(turn(1, None, "a", "b"), tags=["x"] * 21), "tags: "),
        (exported(turn(1, None, "a", "b"), tags=[f"t{n}" for n in range(20)] + [" "]), "tags"),
        (exported(turn(-1, None, "a", "b")), "turns[0].id: "),
        (exported(turn(1, None)), "turns[0].messages: "),
        (exported(turn(1, None, "a\0", "b")), "turns[0].messages[0].content: has characters"),
        (exported(*[turn(n, None, "a", "b") for n in range(MAX_TURNS + 1)]), "turns: "),
        (exported({"id": 1, "parent": None, "messages": [{"role": "king", "content": ""}]}), "messages[0].role: "),
        ([], "expected an object"),
    ],
)
async def test_a_file_that_is_wrong_is_refused_and_nothing_is_stored(
    api: httpx.AsyncClient, engine: Engine, file: Any, detail: str
) -> None:
    refused = await api.post("/api/conversations/import", json=file)
    assert refused.status_code == 400, refused.text
    assert detail in refused.json()["detail"]
    with engine.connect() as connection:
        assert check.row_counts(connection)["conversations"] == 0


async def test_an_import_that_is_sent_twice_under_a_key_makes_one_conversation(api: httpx.AsyncClient) -> None:
    file, key = exported(turn(1, None, "a", "b")), {"Idempotency-Key": "k"}
    first = await api.post("/api/conversations/import", json=file, headers=key)
    second = await api.post("/api/conversations/import", json=file, headers=key)
    assert first.json() == second.json()
    assert len((await api.get("/api/conversations")).json()["conversations"]) == 1


async def test_a_person_exports_and_imports_on_the_page(browser: httpx.AsyncClient) -> None:
    file = exported(turn(7, None, "<i>asked</i>", TEXT), title="<b>it</b>")
    sent = {"file": ("it.json", b"\xef\xbb\xbf" + json.dumps(file).encode(), "application/json")}
    made = await browser.post("/chat/conversation/import", files=sent)
    assert made.status_code == 303, made.text
    page = await browser.get(made.headers["location"])
    assert "&lt;i&gt;asked&lt;/i&gt;" in page.text
    assert "&lt;script&gt;alert(1)" in page.text
    public_id = made.headers["location"].rpartition("/")[2]
    saved = await browser.get("/chat/conversation/export", params={"id": public_id, "format": "json"})
    assert saved.json()["turns"][0]["messages"][0]["content"] == "<i>asked</i>"
    assert saved.headers["content-disposition"].startswith("attachment; ")
    assert (await browser.get("/chat/conversation/export", params={"id": "x", "format": "md"})).status_code == 404


def part(headers: str, content: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="file"{headers}\r\n\r\n'
    return head.encode() + content + b"\r\n--b--"


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/x-www-form-urlencoded", b"file=x", 415),
        ("multipart/form-data", b"x", 400),
        (FORM, b"", 400),
        (FORM, b"--b\r\nnonsense", 400),
        (FORM, part("", b"{}"), 400),
        (FORM, part("\r\nContent-Type: text/plain; charset=none", b"{}"), 400),
        (FORM, part('; filename="../x"', b"[" * 100_000), 400),
        (FORM, part('; filename="x"', b"\xff\xfe{"), 400),
        (FORM, part('; filename="x"', b"x" * 16 * 1024 * 1024), 413),
    ],
    ids=range(9),
)
async def test_what_is_no_file_is_refused_with_a_page(
    browser: httpx.AsyncClient, content_type: str, body: bytes, status: int
) -> None:
    answer = await browser.post("/chat/conversation/import", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text


async def test_random_damage_to_a_file_is_a_400_or_a_conversation(api: httpx.AsyncClient, engine: Engine) -> None:
    whole = json.dumps(exported(turn(1, None, "a", "b"), turn(2, 1, "c", "d"), head=2, title="t")).encode()
    chance = random.Random(19)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        answer = await api.post(
            "/api/conversations/import", content=bytes(damaged), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (200, 400), (bytes(damaged), answer.text)
    with engine.connect() as connection:
        assert check.violations(connection) == []
