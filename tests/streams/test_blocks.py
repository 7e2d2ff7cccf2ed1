"""A conversation's page reads the same replies in blocks of HTML: whole, in order, no finished one twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from llamalith_app.contracts.events import Delta, Thinking
from llamalith_app.store.database import Database
from llamalith_app.web import markdown
from llamalith_app.web.follow import Timings
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
BESIDE = ("progress", "to", "chats")
"""Events that belong to no reply's blocks."""


def path_to(*positions: str, chats: str = "") -> str:
    """Of a stream of the conversations 1, 2, …, each behind the event with this id."""
    followed = "".join(f"&follow={n}:{position}" for n, position in enumerate(positions, 1))
    return f"/chat/stream?chats={chats}{followed}"


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


async def read(client: httpx.AsyncClient, reader: Reader) -> list[Event]:
    """The events of the next job of the first conversation, to its end."""
    found = []
    async with asyncio.timeout(30), reading(client, path_to(reader.last_id)) as stream:
        async for event in stream.events():
            if event.kind not in BESIDE:
                found.append(event)
                reader.take(event)
            if reader.end:
                return found
    raise AssertionError(f"the stream ended before its job: {found}")


@pytest.fixture
async def browser(worked: httpx.AsyncClient) -> httpx.AsyncClient:
    await log_in(worked)
    return worked


@pytest.mark.slow
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


@pytest.mark.slow
async def test_a_page_that_is_cut_off_after_every_event_misses_nothing_and_gets_no_finished_block_twice(
    browser: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": f"<think>{THOUGHT}</think>{REPLY}", "step_s": 0.02})
    job_id = await submit(browser, "go")
    page = Reader()
    n_connections = 0
    while not page.end:
        async with asyncio.timeout(30), reading(browser, path_to(page.last_id)) as stream:
            n_connections += 1
            async for event in stream.events():
                if event.kind not in BESIDE:
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
    async with asyncio.timeout(30), reading(browser, path_to("")) as stream:
        async for event in stream.events():
            if event.kind not in BESIDE:
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


async def test_conversations_of_any_id_share_a_stream_and_each_window_of_one_has_its_own_place_in_it(
    browser: httpx.AsyncClient, script: Script, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    half = {"after": 40, "gate": str(gate)}
    script.write({"when": "go", "reply": REPLY, **half}, {"when": "", "reply": "*Hello*" + " and more" * 20, **half})
    await submit(browser, "go", "a/b")
    await submit(browser, "short", "..")
    first = Reader()
    async with asyncio.timeout(30), reading(browser, path_to("")) as stream:
        async for event in stream.events():
            if event.kind not in BESIDE:
                first.take(event)
                break
    begun = len(first.blocks)
    # The second window of the first conversation has nothing yet; nobody has a conversation 99.
    windows = [first, Reader(), Reader()]
    path = path_to(first.last_id, "") + "&follow=1:&follow=99:"
    by_place = {0: windows[0], 1: windows[1], 2: windows[2]}
    to: Reader | None = None
    async with asyncio.timeout(30), reading(browser, path) as stream:
        async for event in stream.events():
            if event.kind == "to":
                to = by_place[event.data]
            elif event.kind not in BESIDE:
                assert to is not None
                to.take(event)
                if to is windows[2]:
                    gate.touch()
            if all(window.end for window in windows):
                break
    assert begun > 0
    assert windows[1].html() == markdown.render((await ended(database, 2)).result or "")
    assert windows[0].html() == windows[2].html() == markdown.render((await ended(database, 1)).result or "")
    assert [window.n_restarts for window in windows] == [0, 0, 0]


async def test_a_session_that_ends_in_mid_stream_ends_it_and_the_next_session_goes_on_there(
    browser: httpx.AsyncClient, script: Script, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "go", "reply": REPLY, "after": 40, "gate": str(gate)})
    job_id = await submit(browser, "go")
    page = Reader()
    async with asyncio.timeout(30), reading(browser, path_to("")) as stream:
        async for event in stream.events():
            if event.kind not in BESIDE:
                if not page.blocks:
                    assert (await browser.post("/chat/logout")).status_code == 303
                page.take(event)
    assert not page.end
    assert (await browser.get(path_to(page.last_id))).status_code == 401, "a script is led nowhere"
    gate.touch()
    await log_in(browser)
    await read(browser, page)
    assert page.html() == markdown.render((await ended(database, job_id)).result or "")
    assert page.n_restarts == 0


@pytest.mark.parametrize("timings", [Timings(history_s=20, chats_s=0.1)])
async def test_a_stream_tells_how_the_chats_stand_whenever_that_is_not_what_the_page_shows(
    browser: httpx.AsyncClient, script: Script, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "go", "reply": "Hello", "after": 1, "gate": str(gate)})
    first = (await browser.get("/chat/")).text
    version = first.partition('data-version="')[2].partition('"')[0]
    await submit(browser, "go <b>", "a/b")
    states = []
    async with asyncio.timeout(30), reading(browser, path_to(chats=version)) as stream:
        async for event in stream.events():
            assert event.kind == "chats"
            assert event.data["version"] != version
            version = event.data["version"]
            assert "go &lt;b&gt;" in event.data["html"]
            states.append(event.data["html"].partition('data-status="')[2].partition('"')[0])
            if states[-1] == "processing":
                gate.touch()
            if states[-1] == "done":
                break
    assert states in (["queued", "processing", "done"], ["processing", "done"])
    assert f'data-version="{version}"' in (await browser.get("/chat/")).text, "a page has no need of it again"


async def test_a_place_to_go_on_from_that_is_none_is_refused_with_an_example(browser: httpx.AsyncClient) -> None:
    as_script = {"Accept": "*/*"}
    for bad in ("1", "1:1.1-1", "x:", "1:" + "9" * 40, "1:1.1-1.-1", "٣:1.1-1.1", "", "1:1.1-1.1.1"):
        answer = await browser.get("/chat/stream", params={"follow": bad}, headers=as_script)
        assert answer.status_code == 400, bad
        assert answer.json()["detail"] == (
            "follow: expected a conversation with the id of its last event, such as 7: or 7:12.1-42.3"
        )
    answer = await browser.get(path_to(*[""] * 17), headers=as_script)
    assert (answer.status_code, answer.json()["detail"]) == (400, "follow: 17 conversations, at most 16 in one stream")


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
    assert ids(reply.frames(0)) == ["7.1-0.1", "7.1-0.2", "7.1-1.2"]
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
    for cursor in (Cursor(1, 9), Cursor(3, 1), Cursor(1, 0)):
        reply = ReplyBlocks(7, BlockCursor(cursor, 2))
        reply.add(delta(1, "one\n\ntwo\n\nthree", attempt=2))
        frames = reply.frames(0).decode()
        assert frames.index("event: restart") < frames.index('"block":0')


def test_a_page_that_was_cut_off_between_two_blocks_gets_the_second_one_only() -> None:
    events = [delta(1, "one\n\ntwo\n\n"), delta(2, "three\n\n")]
    # In the midst of what came second, and of what came first.
    for cursor in (Cursor(1, 1), Cursor(1, 0)):
        reply = ReplyBlocks(7, BlockCursor(cursor, 1))
        for event in events:
            reply.add(event)
        frames = reply.frames(0).decode()
        assert "restart" not in frames
        assert '"block":0' not in frames
        assert frames.index('"block":1') < frames.index('"block":2')
