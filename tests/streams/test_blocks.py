"""A conversation's page reads the same replies in blocks of HTML: whole, in order, no finished one twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from llamalith_app.contracts.events import Delta, Thinking
from llamalith_app.store.database import Database
from llamalith_app.web import markdown
from llamalith_app.web.markdown import JSON_BEGINS
from llamalith_app.web.markdown_stream import Block, More
from llamalith_app.web.reply_blocks import BlockCursor, ReplyBlocks
from llamalith_app.web.transcript import FINAL, Cursor, JobEvent
from tests.streams.conftest import submit
from tests.streams.sse import Event, reading
from tests.web.conftest import log_in
from tests.web.test_markdown_stream import Page
from tests.worker.conftest import Script, ended

THOUGHT = "Grüße? 🐉 <b>"
REPLY = """# Drachen 🐉

Ein **kleiner** Drache.

- eins
- zwei

| a | b |
|---|---|
| 1 | 2 |

```py
x = "<script>"
```

$x^2$ und Ende."""
PATH = "/chat/conversations/c/blocks"


class Reader(Page):
    """A page that keeps the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.thinking = ""
        self.last_id = ""
        self.end = ""
        self.n_restarts = 0

    def take(self, event: Event) -> None:
        self.last_id = event.id
        data: dict[str, Any] = event.data
        match event.kind:
            case "block":
                self.apply([Block(data["block"], data["within"], data["html"], data["finished"])])
            case "more":
                self.apply([More(data["block"], data["text"])])
            case "thinking":
                assert data["offset"] <= len(self.thinking)
                self.thinking = self.thinking[: data["offset"]] + data["text"]
            case "restart":
                self.blocks, self.thinking = [], ""
                self.n_restarts += 1
            case "done" | "error" | "cancelled":
                self.end = event.kind


async def read(client: httpx.AsyncClient, reader: Reader, after: str = "", *, path: str = PATH) -> list[Event]:
    """The events of the next job, to its end."""
    found = []
    async with asyncio.timeout(30), reading(client, path, after) as stream:
        async for event in stream.events():
            if event.kind != "progress":
                found.append(event)
                reader.take(event)
            if reader.end:
                return found
    raise AssertionError(f"the stream ended before its job: {found}")


@pytest.fixture
async def browser(worked: httpx.AsyncClient) -> httpx.AsyncClient:
    await log_in(worked)
    return worked


async def test_the_blocks_are_the_reply_s_html_and_thinking_is_apart(
    browser: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": f"<think>{THOUGHT}</think>{REPLY}", "step_s": 0.01})
    job_id = await submit(browser, "go")
    page = Reader()
    events = await read(browser, page)
    assert page.html() == markdown.render((await ended(database, job_id)).result or "")
    assert page.thinking == THOUGHT
    assert all(block.finished for block in page.blocks)
    assert {event.data.get("job") for event in events} == {job_id}
    assert len(events) > 8, "piece by piece"


async def test_a_page_that_is_cut_off_after_every_event_misses_nothing_and_gets_no_finished_block_twice(
    browser: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": f"<think>{THOUGHT}</think>{REPLY}", "step_s": 0.02})
    job_id = await submit(browser, "go")
    page = Reader()
    n_connections = 0
    while not page.end:
        async with asyncio.timeout(30), reading(browser, PATH, page.last_id) as stream:
            n_connections += 1
            async for event in stream.events():
                if event.kind != "progress":
                    page.take(event)
                    break
    assert n_connections > 8
    assert page.html() == markdown.render((await ended(database, job_id)).result or "")
    assert page.thinking == THOUGHT
    assert page.n_restarts == 0


async def test_an_attempt_that_cannot_continue_clears_the_job_s_blocks(
    browser: httpx.AsyncClient, redis: Redis, script: Script, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "go", "reply": REPLY, "after": 40, "gate": str(gate), "signal": 9})
    job_id = await submit(browser, "go")
    page = Reader()
    async with asyncio.timeout(30), reading(browser, PATH) as stream:
        async for event in stream.events():
            if event.kind != "progress":
                page.take(event)
            if len(page.blocks) > 1 and not gate.exists():
                script.write({"when": "go", "reply": "Another *one*.", "goes_on": False})
                await redis.flushall()
                gate.touch()
            if page.end:
                break
    job = await ended(database, job_id)
    assert (job.attempt, page.n_restarts) == (2, 1)
    assert page.html() == markdown.render(job.result or "") == '<p dir="auto">Another <em>one</em>.</p>'


@pytest.mark.parametrize("conversation_id", ["a/b", "..", "a b"])
async def test_an_id_that_cannot_stand_in_a_path_has_its_blocks_by_query(
    browser: httpx.AsyncClient, script: Script, conversation_id: str
) -> None:
    script.write({"when": "go", "reply": "*Hello*", "step_s": 0.01})
    await submit(browser, "go", conversation_id)
    page = Reader()
    await read(browser, page, path=f"/chat/conversation/blocks?id={quote(conversation_id, safe='')}")
    assert page.html() == '<p dir="auto"><em>Hello</em></p>'


async def test_a_resume_point_that_is_none_is_refused_with_an_example(browser: httpx.AsyncClient) -> None:
    await browser.post("/api/jobs", json={"content": "x", "conversation_id": "c"})
    for bad in ("1.1-1", "x", "1.1-1.1.1", "9" * 40, "1.1-1.-1", "٣.1-1.1"):
        answer = await browser.get(PATH, params={"after": bad}, headers={"Accept": "text/event-stream"})
        assert answer.status_code == 400, bad
        assert answer.json()["detail"] == "after: expected the id of an event of this stream, such as 7.1-42.3"
    assert (await browser.get("/chat/conversations/nothing/blocks")).status_code == 404


# The pure part


def delta(n: int, text: str, attempt: int = 1) -> JobEvent:
    return JobEvent(attempt, n, "delta", _json(Delta(job_id=7, text=text, offset=0, tokens=[])))


def _json(event: Delta | Thinking) -> bytes:
    return msgspec.json.encode(event)


def ids(frames: bytes) -> list[str]:
    return [line.removeprefix("id: ") for line in frames.decode().splitlines() if line.startswith("id: ")]


def test_an_id_says_which_events_and_how_many_finished_blocks_its_reader_has() -> None:
    reply = ReplyBlocks(7, None)
    reply.add(delta(1, "one\n\ntwo\n\nthr"))
    assert ids(reply.frames(0)) == ["7.0-0.1", "7.0-0.2", "7.1-1.2"]
    reply.add(delta(2, "ee\n\nfour"))
    assert ids(reply.frames(0.05)) == []
    assert reply.is_behind
    assert ids(reply.frames(0.2)) == ["7.1-1.3", "7.1-2.3"]
    reply.add(JobEvent(1, FINAL, "done", b"{}"))
    assert ids(reply.frames(0.21)) == ["7.1-2.4", f"7.1-{FINAL}.4"]


def test_a_reply_that_is_json_is_code_from_its_first_event_and_after_a_restart() -> None:
    reply = ReplyBlocks(7, None, JSON_BEGINS)
    for attempt in (1, 2):
        if attempt == 2:
            reply.add(JobEvent(2, 0, "restart", b"{}"))
        reply.add(delta(1, '{"a": "*b*",\n', attempt))
        begin = reply.frames(attempt).decode()
        assert begin.count('<figure class=\\"code\\"><figcaption>json</figcaption>') == 1
        reply.add(delta(2, ' "c": "```"}', attempt))
        assert "event: more" in reply.frames(attempt + 0.5).decode()
    reply.add(JobEvent(2, FINAL, "done", b"{}"))
    end = reply.frames(9).decode()
    assert end.count("<figure") == end.count('"finished":true') == 1
    assert "<em>" not in begin + end


def test_a_page_whose_event_is_gone_begins_again() -> None:
    for cursor in (Cursor(1, 9), Cursor(3, 1)):
        reply = ReplyBlocks(7, BlockCursor(cursor, 2))
        reply.add(delta(1, "one\n\ntwo\n\nthree", attempt=2))
        frames = reply.frames(0).decode()
        assert frames.index("event: restart") < frames.index('"block":0')


def test_a_page_that_was_cut_off_between_two_blocks_gets_the_second_one_only() -> None:
    events = [delta(1, "one\n\ntwo\n\n"), delta(2, "three\n\n")]
    reply = ReplyBlocks(7, BlockCursor(Cursor(1, 1), 1))
    for event in events:
        reply.add(event)
    frames = reply.frames(0).decode()
    assert "restart" not in frames
    assert '"block":0' not in frames
    assert frames.index('"block":1') < frames.index('"block":2')
