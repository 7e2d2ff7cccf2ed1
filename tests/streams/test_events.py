"""The two streams over HTTP: exact, whole, ended once, whatever happens between worker and reader."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, text

from llamalith_app.contracts.events import Delta
from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.models import EngineStatus
from llamalith_app.settings.config import Config
from llamalith_app.store import retention, workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.streams import wire
from llamalith_app.streams.subscriber import StreamSubscriber
from llamalith_app.web.follow import Followed, Timings
from tests.settle import eventually
from tests.store.samples import NOW, fail, prompt
from tests.streams.conftest import attempt, submit
from tests.streams.sse import FINAL, Event, Heard, heard, read_all, reading
from tests.web.conftest import PATIENT, TOKEN, log_in, serving
from tests.worker.conftest import Script, ended, working_in_process

REPLY = "<think>Grüße? 🐉</think>\n Grüße, kleiner Drache 🐉👩‍👩‍👧! S, ST and STO are no end.STOP and this is gone"
SAID = "Grüße, kleiner Drache 🐉👩‍👩‍👧! S, ST and STO are no end."


async def some(source: AsyncIterator[Event], kind: str, n: int = 1) -> list[Event]:
    """The next events up to the n-th of this kind."""
    found: list[Event] = []
    async with asyncio.timeout(30):
        async for event in source:
            found.append(event)
            if sum(event.kind == kind for event in found) == n:
                return found
    raise AssertionError(f"ended before {n} of {kind}: {found}")


# What a worker writes


async def test_the_deltas_are_the_stored_reply_and_thinking_is_apart(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": REPLY, "step_s": 0.01})
    job_id = await submit(worked, "go")
    got = heard(await read_all(worked, f"/api/jobs/{job_id}/events"))
    job = await ended(database, job_id)
    assert got.text == job.result == SAID
    assert got.thinking == job.thinking == "Grüße? 🐉"
    assert job.thinking_s
    times = [job.started_at, job.loaded_at, job.prompt_read_at, job.first_token_at, job.processed_at]
    known = [moment for moment in times if moment is not None]
    assert len(known) == len(times)
    assert known == sorted(known)
    assert job.thinking_s < (known[-1] - known[-2]).total_seconds()
    assert len(got.tokens) == job.completion_tokens
    assert got.final == (await worked.get(f"/api/jobs/{job_id}")).json()
    assert got.kinds.count("delta") > 3, "piece by piece"
    assert "\ufffd" not in got.text


@pytest.mark.slow
async def test_a_reader_that_is_cut_off_after_every_event_misses_and_repeats_nothing(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": REPLY, "step_s": 0.03})
    job_id = await submit(worked, "go")
    got = Heard()
    n_connections = 0
    while got.final is None:
        async with reading(worked, f"/api/jobs/{job_id}/events", got.last_id) as reader:
            n_connections += 1
            async for event in reader.events():
                if event.kind != "progress":
                    got.take(event)
                    break
    assert n_connections > 5
    assert got.text == (await ended(database, job_id)).result == SAID
    assert got.thinking == "Grüße? 🐉"
    assert "restart" not in got.kinds


async def test_a_late_reader_may_begin_after_any_event(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": REPLY, "step_s": 0.002})
    job_id = await submit(worked, "go")
    await ended(database, job_id)
    path = f"/api/jobs/{job_id}/events"
    whole = await read_all(worked, path)
    for kept in range(1, len(whole)):
        rest = await read_all(worked, path, after=whole[kept - 1].id)
        assert rest == whole[kept:]
    last = whole[-1].id
    assert (await worked.get(path, headers={"Last-Event-ID": last})).status_code == 204, "browsers stop then"
    by_query = (await worked.get(path, params={"after": last})).status_code
    assert by_query == 204


@pytest.mark.slow
async def test_each_attempt_continues_the_one_before_and_together_they_publish_what_one_alone_would(
    worked: httpx.AsyncClient, script: Script, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less than the product's, and long enough for what the attempt before has still to publish.
    monkeypatch.setattr("llamalith_app.jobs.order.retry_backoff", lambda _: timedelta(milliseconds=200))
    script.write({"when": "go", "reply": REPLY}, {"when": "fall", "reply": REPLY, "after": 9, "signal": 9})
    whole = heard(await read_all(worked, f"/api/jobs/{await submit(worked, 'go', 'one')}/events"))
    answer = await worked.post("/api/jobs", json={"content": "fall", "max_attempts": 20})
    job_id = answer.json()["job_id"]
    got = heard(await read_all(worked, f"/api/jobs/{job_id}/events"))
    job = await ended(database, job_id)
    assert job.attempt > 5
    assert (got.text, got.thinking, got.tokens) == (whole.text, whole.thinking, whole.tokens)
    assert got.text == job.result == SAID
    assert job.completion_tokens == len(whole.tokens)
    assert "restart" not in got.kinds
    late = heard(await read_all(worked, f"/api/jobs/{job_id}/events"))
    assert (late.text, late.tokens) == (got.text, got.tokens)
    assert "restart" not in late.kinds


@pytest.mark.parametrize("lost", ["the tokens", "the way back to them"])
async def test_an_attempt_that_cannot_continue_takes_back_the_text_and_restarts(
    worked: httpx.AsyncClient,
    redis: Redis,
    script: Script,
    database: Database,
    tmp_path: Path,
    lost: str,
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "go", "reply": "A reply of some length.", "after": 5, "gate": str(gate), "signal": 9})
    job_id = await submit(worked, "go")
    async with reading(worked, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        got = heard(await some(source, "delta", 1))
        script.write({"when": "go", "reply": "A reply of some length.", "goes_on": lost == "the tokens"})
        if lost == "the tokens":
            await redis.flushall()
        gate.touch()
        async for event in source:
            got.take(event)
    job = await ended(database, job_id)
    assert (got.text, job.attempt) == (job.result, 2)
    assert got.kinds.count("restart") == 1
    assert got.last_id.startswith("2-")


async def test_a_client_that_leaves_stops_nothing(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": "A reply of some length.", "step_s": 0.01})
    job_id = await submit(worked, "go")
    async with reading(worked, f"/api/jobs/{job_id}/events") as reader:
        await some(reader.events(), "delta")
    job = await ended(database, job_id)
    assert (job.status, job.attempt) == ("done", 1)


# The record may know the end before its last entries have come. Here the worker's message alone says it.
@pytest.mark.parametrize("timings", [Timings(history_s=20, poll_s=3600)])
async def test_a_cancelled_job_says_so_with_what_had_been_written(worked: httpx.AsyncClient, script: Script) -> None:
    script.write({"when": "go", "reply": "A reply of some length. " * 40, "step_s": 0.02})
    job_id = await submit(worked, "go")
    waiting_id = await submit(worked, "go")
    async with AsyncExitStack() as both:
        waiting = (await both.enter_async_context(reading(worked, f"/api/jobs/{waiting_id}/events"))).events()
        await some(waiting, "progress")
        source = (await both.enter_async_context(reading(worked, f"/api/jobs/{job_id}/events"))).events()
        got = heard(await some(source, "delta", 3))
        answer = await worked.post("/api/conversations/c/cancel")
        assert answer.json()["cancelled"] == 2
        async for event in source:
            got.take(event)
        assert heard([event async for event in waiting]).kinds[-1] == "cancelled"
    assert got.kinds[-1] == "cancelled"
    assert got.final is not None
    assert got.final["partial"] == got.text


@pytest.mark.slow
async def test_every_event_is_what_the_openapi_document_says_of_it(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    document = (await worked.get("/api/openapi.json")).json()
    documented = document["paths"]["/api/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"][
        "text/event-stream"
    ]
    script.write(
        {"when": "go", "reply": REPLY, "step_s": 0.03},
        {"when": "close", "reply": "<think>aside</think>the reply", "step_s": 0.03},
        {"when": "fail", "refuse": "Model exploded"},
    )
    seen = set()
    for content in ("go", "close", "fail", "wait"):
        job_id = await submit(worked, content, conversation_id=content)
        if content == "wait":
            await worked.delete(f"/api/jobs/{job_id}")
        for event in await read_all(worked, f"/api/jobs/{job_id}/events"):
            seen.add(event.kind)
            jsonschema.validate(event.data, {**document, **documented["x-events"][event.kind]})
    assert {"progress", "delta", "thinking", "done", "error", "cancelled"} <= seen <= set(documented["x-events"])


async def test_where_the_prompt_opened_the_thinking_the_reply_begins_inside(
    worked: httpx.AsyncClient, script: Script, database: Database
) -> None:
    script.write({"when": "go", "reply": "so, hm</think>The answer.", "opens_thinking": True})
    job_id = await submit(worked, "go")
    got = heard(await read_all(worked, f"/api/jobs/{job_id}/events"))
    assert (got.thinking, got.text) == ("so, hm", "The answer.")
    assert "restart" not in got.kinds
    assert (await ended(database, job_id)).result == "The answer."


@pytest.mark.parametrize(
    "reply",
    [
        "To strip it use re.sub(r'<think>.*?</think>', '', s). That is all.",
        "The `<think>` tag opens the reasoning. It is closed by its counterpart. More text follows.",
        "Models end their reasoning with `</think>`. Then the answer comes.",
        "<think>hm</think>",
        " \n\0 a\0 blank at each end \n\n",
    ],
)
async def test_the_reply_of_a_model_that_cannot_think_is_what_it_wrote(
    worked: httpx.AsyncClient, script: Script, database: Database, reply: str
) -> None:
    script.write({"model": "smollm2", "family": ""}, {"when": "go", "reply": reply})
    job_id = await submit(worked, "go")
    got = heard(await read_all(worked, f"/api/jobs/{job_id}/events"))
    assert (got.text, got.thinking) == (reply, "")
    assert (await ended(database, job_id)).result == reply
    assert (await worked.get(f"/api/jobs/{job_id}")).json()["result"] == reply


async def test_without_redis_the_whole_reply_and_the_last_event_still_come(
    config: Config, script: Script, absent_redis_url: str
) -> None:
    config = msgspec.structs.replace(config, redis_url=absent_redis_url)
    script.write({"when": "go", "reply": "A reply."})
    async with serving(config, follow_timings=Timings(history_s=0.1)) as api, working_in_process(config, script):
        job_id = await submit(api, "go")
        got = heard(await read_all(api, f"/api/jobs/{job_id}/events"))
        assert [kind for kind in got.kinds if kind != "progress"] == ["delta", "done"]
        assert got.text == "A reply."


# What happens between


async def test_an_entry_reaches_live_and_late_readers_byte_for_byte(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    path, record = f"/api/jobs/{job_id}/events", record_id(database.path)
    making = await attempt(database, redis)
    await making.write("one ")
    # The same as the worker's own encoder would write, but for its spelling.
    data = b'{ "tokens":[ 7 ],  "text":"tw\\u006f", "offset" : 4, "job_id":%d }' % job_id
    entry = wire.Entry(1, 2, "delta", data, 1)
    frame = b"id: 1-2\nevent: delta\ndata: %b\n\n" % data
    async with api.stream("GET", path) as live:
        source = live.aiter_bytes()
        received = b""
        while b"one " not in received:
            received += await anext(source)
        await redis.xadd(wire.stream_key(record, job_id), wire.entry_fields(entry), id=wire.entry_id(entry))
        await redis.publish(wire.channel_name(record), wire.encode_messages([wire.StreamMessage(job_id, entry)]))
        while frame not in received:
            received += await anext(source)
        await making.finish("one two")
        async for chunk in source:
            received += chunk
    late = (await api.get(path)).content
    for body in (received, late):
        assert body.count(frame) == 1
        assert b"event: done" in body
        assert b"event: restart" not in body


@pytest.mark.parametrize("timings", [Timings(history_s=20, poll_s=0.2)])
async def test_an_entry_that_an_attempt_publishes_too_late_shifts_no_later_one(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    """Redis refuses it for the stream, in which the next attempt has begun, and tells it to the subscribers."""
    job_id = await submit(api, "go")
    record = record_id(database.path)
    texts = ["one ", "two ", "three ", "four "]
    offsets = [sum(map(len, texts[:n])) for n in range(4)]

    def entry(attempt: int, n: int) -> wire.Entry:
        event = Delta(job_id=job_id, text=texts[n - 1], offset=offsets[n - 1], tokens=[n])
        return wire.Entry(attempt, n, "delta", msgspec.json.encode(event), 1)

    async def publish(*entries: wire.Entry, stored: bool) -> None:
        if stored:
            for one in entries:
                await redis.xadd(wire.stream_key(record, job_id), wire.entry_fields(one), id=wire.entry_id(one))
        messages = wire.encode_messages([wire.StreamMessage(job_id, one) for one in entries])
        await redis.publish(wire.channel_name(record), messages)

    # What the late entry says is shorter than what the next attempt publishes under its number.
    late = wire.Entry(1, 2, "delta", msgspec.json.encode(Delta(job_id=job_id, text="t", offset=4, tokens=[2])), 1)
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        await some(source, "progress")
        await publish(entry(1, 1), stored=True)
        got = [*await some(source, "delta")]
        await publish(late, stored=False)
        got += await some(source, "delta")
        await publish(entry(2, 2), entry(2, 3), entry(2, 4), stored=True)
        await database.write(transitions.cancel, ADMIN_ID, job_id, datetime.now(UTC))
        got += [event async for event in source]
    heard(got)  # It asserts that each offset is where the text before it ends.


async def test_a_stream_that_was_wiped_goes_on(api: httpx.AsyncClient, database: Database, redis: Redis) -> None:
    path = f"/api/jobs/{await submit(api, 'x')}/events"
    making = await attempt(database, redis)
    await making.write("one ", "two ")
    async with reading(api, path) as reader:
        source = reader.events()
        got = heard(await some(source, "delta", 2))
        await redis.flushall()
        await making.write("three ")
        for event in await some(source, "restart"):
            got.take(event)
        late = asyncio.create_task(read_all(api, path))
        await making.write("four")
        await making.finish()
        async for event in source:
            got.take(event)
    assert got.text == heard(await late).text == "one two three four"
    assert "restart" not in heard(await late).kinds


@pytest.mark.parametrize("timings", [Timings(history_s=0.1, poll_s=60)])
async def test_an_end_that_was_announced_before_the_subscription_stood_is_told_at_once(
    api: httpx.AsyncClient, database: Database, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe, is_ended = StreamSubscriber._receive, asyncio.Event()

    async def late(subscriber: StreamSubscriber) -> None:
        await is_ended.wait()
        await subscribe(subscriber)

    monkeypatch.setattr(StreamSubscriber, "_receive", late)
    path = f"/api/jobs/{await submit(api, 'x')}/events"
    async with reading(api, path) as reader, asyncio.timeout(30):
        source = reader.events()
        await some(source, "progress")
        making = await attempt(database, redis)
        await making.write("one ")
        await making.finish()
        is_ended.set()
        got = heard([event async for event in source])
    assert (got.text, got.kinds) == ("one ", ["delta", "done"])


@pytest.mark.parametrize("timings", [Timings(history_s=20, poll_s=0.2)])
async def test_deltas_that_were_lost_come_out_of_the_record(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    path = f"/api/jobs/{await submit(api, 'x')}/events"
    making = await attempt(database, redis)
    await making.write("one ", "two ")
    async with reading(api, path) as reader:
        source = reader.events()
        got = heard(await some(source, "delta", 2))
        await making.finish("one two three", and_publish=False)
        async for event in source:
            got.take(event)
    assert got.text == "one two three"
    assert got.kinds[-2:] == ["delta", "done"]
    assert "restart" not in got.kinds


async def test_an_expired_stream_is_the_stored_reply_as_one_event(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    path = f"/api/jobs/{await submit(api, 'x')}/events"
    making = await attempt(database, redis)
    await making.write("one ", "two")
    await making.finish()
    await redis.flushall()
    first, final = await read_all(api, path)
    assert (first.kind, first.data["text"], final.kind) == ("delta", "one two", "done")
    assert [event.kind for event in await read_all(api, path, after=first.id)] == ["done"]
    resumed = await read_all(api, path, after="1-1")
    assert [event.kind for event in resumed] == ["restart", "delta", "done"]
    assert [event.kind for event in await read_all(api, path, after=resumed[0].id)] == ["delta", "done"]


@pytest.mark.parametrize("timings", [Timings(history_s=20, partial_s=0.5)])
@pytest.mark.parametrize("kind", ["error", "cancelled"])
async def test_a_job_that_ends_otherwise_says_so_once(
    api: httpx.AsyncClient, database: Database, redis: Redis, kind: str
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    await making.write("one ")
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        got = heard(await some(source, "delta"))
        if kind == "error":
            await database.write(fail, making.claim, pause=None)
        else:
            await database.write(cancel, job_id)
        await making.stream.publish_end()
        async for event in source:
            got.take(event)
    assert got.kinds[-1] == kind
    assert got.final == (await api.get(f"/api/jobs/{job_id}")).json()
    assert got.text == "one "


def cancel(connection: Any, job_id: int) -> None:
    transitions.cancel(connection, ADMIN_ID, job_id, NOW)


async def test_a_redis_that_comes_back_is_subscribed_again(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    path = f"/api/jobs/{await submit(api, 'x')}/events"
    making = await attempt(database, redis)
    async with reading(api, path) as reader:
        source = reader.events()
        await making.write("one ")
        got = heard(await some(source, "delta"))
        await redis.client_kill_filter(_type="pubsub")
        await making.write("two ", "three ")
        for event in await some(source, "delta", 2):
            got.take(event)
        await making.finish()
        async for event in source:
            got.take(event)
    assert got.text == "one two three "
    assert "restart" not in got.kinds


async def test_a_queued_job_publishes_its_place_when_that_changes(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    for number in (1, 2, 3):
        await submit(api, "x", f"c{number}")
    async with reading(api, "/api/jobs/3/events") as reader:
        source = reader.events()
        (first,) = await some(source, "progress")
        assert (first.data["phase"], first.data["position"], first.data["job_id"]) == ("queued", 3, 3)
        await attempt(database, redis)
        (second,) = await some(source, "progress")
        assert second.data["position"] == 2


async def test_a_running_job_says_when_it_will_end(api: httpx.AsyncClient, database: Database, redis: Redis) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    engine = EngineStatus(model="smollm2", state="loaded", n_slots=1, tokens_per_s=10.0, completion_tokens=100.0)
    statuses = msgspec.json.encode([engine]).decode()
    await database.write(workers.heartbeat, 1, datetime.now(UTC), statuses)
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        making.stream.publish_progress(Progress(phase="decode", completion_tokens=40, tokens_per_s=20.0))
        (event,) = await some(source, "progress")
        assert event.data["eta_s"] == 3.0


# Whatever is polled meanwhile.
@pytest.mark.parametrize("timings", [Timings(history_s=20, poll_s=0.05, heartbeat_s=0.4)])
async def test_silence_is_broken_by_heartbeats(api: httpx.AsyncClient) -> None:
    job_id = await submit(api, "x")
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        lines = reader.answer.aiter_lines()
        while await anext(lines) != ": keep-alive":
            pass


async def test_the_partial_text_of_a_cancelled_job_reaches_also_a_reader_that_comes_before_it_is_stored(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    await making.write("some text")
    async with AsyncExitStack() as both:
        early = await both.enter_async_context(reading(api, f"/api/jobs/{job_id}/events"))
        early_events = early.events()
        assert (await some(early_events, "delta"))[0].data["text"] == "some text"
        assert (await api.post(f"/api/jobs/{job_id}/cancel")).status_code == 200
        late = await both.enter_async_context(reading(api, f"/api/jobs/{job_id}/events"))
        late_events = late.events()
        assert (await some(late_events, "delta"))[0].data["text"] == "some text"
        written = transitions.PartialReply("some text", 1, 2)
        assert await database.write(transitions.store_partial, job_id, making.claim.lease_token, NOW, written=written)
        for source in (early_events, late_events):
            (final,) = await some(source, "cancelled")
            assert final.data["partial"] == "some text"


async def test_a_stream_whose_job_expired_before_its_end_was_seen_ends_too(
    api: httpx.AsyncClient, database: Database
) -> None:
    job_id = await submit(api, "x")

    def cancel_and_expire(connection: Connection) -> int:
        transitions.cancel(connection, ADMIN_ID, job_id, datetime.now(UTC))
        return retention.delete_expired_jobs(connection, datetime.now(UTC), 100)

    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        assert (await anext(source)).kind == "progress"
        assert await database.write(cancel_and_expire) == 1
        assert [event.kind async for event in source if event.kind != "progress"] == []
    assert (await api.get(f"/api/jobs/{job_id}/events")).status_code == 404


async def test_a_message_of_another_version_ends_no_subscription(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    message = wire.StreamMessage(job_id, wire.Entry(1, 0, "progress", b'{"phase": "of the next version"}', 1))
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        source = reader.events()
        await making.write("a")
        assert (await some(source, "delta"))[0].data["text"] == "a"
        await redis.publish(wire.channel_name(record_id(database.path)), msgspec.msgpack.encode([message]))
        await making.write("b")
        assert (await some(source, "delta"))[0].data["text"] == "b"


async def test_a_logout_ends_the_streams_of_its_session_and_no_other(
    api: httpx.AsyncClient, config: Config, database: Database
) -> None:
    await submit(api, "x")
    async with AsyncExitStack() as open_ones:
        browsers = [
            await open_ones.enter_async_context(
                httpx.AsyncClient(base_url=api.base_url, headers={"Origin": str(api.base_url).rstrip("/")})
            )
            for _ in range(2)
        ]
        sources = []
        for client in (*browsers, api):
            if client is not api:
                await log_in(client)
            source = (await open_ones.enter_async_context(reading(client, "/api/conversations/c/events"))).events()
            assert (await anext(source)).kind == "progress"
            sources.append(source)
        assert (await browsers[0].post("/chat/logout")).status_code == 303
        assert [event.kind async for event in sources[0] if event.kind != "progress"] == []
        await api.post("/api/jobs/1/cancel")
        for source in sources[1:]:
            assert await some(source, "cancelled")


async def test_a_session_that_ended_elsewhere_ends_its_streams_soon(config: Config, database: Database) -> None:
    timings = msgspec.structs.replace(PATIENT, session_poll_s=0.05)
    async with serving(config, timings) as browser:
        await submit(browser, "x")
        await log_in(browser)
        async with reading(browser, "/api/conversations/c/events") as reader:
            source = reader.events()
            assert (await anext(source)).kind == "progress"
            await database.write(lambda connection: connection.execute(text("DELETE FROM sessions")))
            assert [event.kind async for event in source if event.kind != "progress"] == []


# Conversations


async def test_a_conversation_streams_its_jobs_one_after_another_and_continues(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    for _ in range(2):
        await submit(api, "x")
    seen: list[Event] = []
    async with reading(api, "/api/conversations/c/events") as reader:
        source = reader.events()
        for text in ("one", "two"):
            making = await attempt(database, redis)
            await making.write(text)
            await making.finish()
            seen += await some(source, "done")
        third = await submit(api, "x")
        making = await attempt(database, redis)
        await making.write("three")
        await making.finish()
        seen += await some(source, "done")
    ids = [(event.id, event.data.get("job_id", event.data.get("id"))) for event in seen if event.kind != "progress"]
    assert ids == [
        *(("1.1-1", 1), ("1.1-1000000001", 1)),
        *(("2.1-1", 2), ("2.1-1000000001", 2)),
        *((f"{third}.1-1", 3), (f"{third}.1-1000000001", 3)),
    ]
    kept = [event for event in seen if event.kind != "progress"]
    for at, event in enumerate(kept[:-1]):
        async with reading(api, "/api/conversations/c/events", event.id) as reader:
            source = reader.events()
            rest = [await anext(source) for _ in kept[at + 1 :]]
            assert rest == kept[at + 1 :]


async def test_a_conversation_without_open_jobs_begins_with_the_next_one(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    await submit(api, "x")
    await (await attempt(database, redis)).finish("old")
    async with reading(api, "/api/conversations/c/events") as reader:
        source = reader.events()
        await submit(api, "y")
        first = await anext(source)
        assert (first.kind, first.data["job_id"]) == ("progress", 2)


async def test_a_client_that_resumes_before_the_first_event_misses_no_job_that_ended_in_between(
    api: httpx.AsyncClient,
) -> None:
    for _ in range(2):
        await submit(api, "x")
    async with reading(api, "/api/conversations/c/events") as reader:
        await some(reader.events(), "progress")
    await api.delete("/api/jobs/2")
    third = await submit(api, "x")
    for job_id in (1, third):
        await api.delete(f"/api/jobs/{job_id}")
    async with reading(api, "/api/conversations/c/events", reader.last_id) as again:
        events = again.events()
        assert [(await some(events, "cancelled"))[-1].data["id"] for _ in range(2)] == [1, 2]
    async with reading(api, "/api/conversations/c/events", again.last_id) as once_more:
        assert (await anext(once_more.events())).data["id"] == third


async def test_a_client_that_resumes_in_a_quiet_conversation_gets_the_job_that_came_and_ended_in_between(
    api: httpx.AsyncClient,
) -> None:
    await submit(api, "x")
    await api.delete("/api/jobs/1")
    async with reading(api, "/api/conversations/c/events") as reader:
        lines = reader.answer.aiter_lines()
        while (last_id := (await anext(lines)).removeprefix("id: ")) != "2.0-0":
            pass
    await submit(api, "y")
    await api.delete("/api/jobs/2")
    async with reading(api, "/api/conversations/c/events", last_id) as again:
        assert (await some(again.events(), "cancelled"))[-1].data["id"] == 2


# Who may, and what is wrong

ANOTHER = "INSERT INTO users (id, name, role, created_at) SELECT 2, 'another', role, created_at FROM users"


@pytest.mark.parametrize("after", ["x", "1", "1-", "-1", "1-2-3", "1-99999999999", "1.1-1", "1-1\u0660", "1-1 "])
async def test_an_id_of_no_event_is_refused(api: httpx.AsyncClient, after: str) -> None:
    job_id = await submit(api, "x")
    answer = await api.get(f"/api/jobs/{job_id}/events", params={"after": after})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("after: expected the id of an event of this stream, such as 1-42")


@pytest.mark.parametrize("after", ["1-1", "x.1-1", "1.1", "9999999999999999999.1-1"])
async def test_an_id_of_no_event_of_a_conversation_is_refused(api: httpx.AsyncClient, after: str) -> None:
    await submit(api, "x")
    answer = await api.get("/api/conversations/c/events", headers={"Last-Event-ID": after})
    assert answer.status_code == 400
    assert "Last-Event-ID" in answer.json()["detail"]


async def test_what_is_not_there_or_of_somebody_else_is_not_found(
    api: httpx.AsyncClient, database: Database, config: Config
) -> None:
    def of_another(connection: Any) -> int | None:
        connection.exec_driver_sql(ANOTHER)
        return submission.submit(connection, prompt(conversation_id="c", owner_id=2), NOW).job_id

    job_id = await database.write(of_another)
    for path in (f"/api/jobs/{job_id}", "/api/jobs/99", "/api/conversations/c", "/api/conversations/none"):
        assert (await api.get(f"{path}/events")).status_code == 404, path


async def test_a_head_request_ends(api: httpx.AsyncClient) -> None:
    job_id = await submit(api, "x")
    for path in (f"/api/jobs/{job_id}/events", "/api/conversations/c/events"):
        answer = await api.head(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (await api.get("/healthz")).status_code == 200, "the connection is usable"


async def test_nothing_between_is_asked_to_buffer_or_keep_it(api: httpx.AsyncClient) -> None:
    async with reading(api, f"/chat/api/jobs/{await submit(api, 'x')}/events") as reader:
        assert reader.answer.headers["cache-control"] == "no-store"
        assert reader.answer.headers["x-accel-buffering"] == "no"


# Many readers


async def open_raw(api: httpx.AsyncClient, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    stream, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port, limit=2**20)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert b"200 OK" in await stream.readuntil(b"retry: 1000\n\n\r\n")
    return stream, writer


@pytest.mark.slow
async def test_a_thousand_readers_cost_one_connection_to_redis(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    await making.write("one ")
    await read_some(api, job_id)
    before = len(await redis.client_list())
    readers = [await open_raw(api, f"/api/jobs/{job_id}/events") for _ in range(1000)]
    await making.write("two ")
    assert len(await redis.client_list()) <= before + 1
    await making.finish()
    for stream, writer in readers:
        text = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", await asyncio.wait_for(stream.readuntil(b"\r\n0\r\n\r\n"), 60))
        assert text.count(b"event: done\n") == 1
        assert b'"one "' in text
        assert b'"two "' in text
        writer.close()


async def read_some(api: httpx.AsyncClient, job_id: int) -> None:
    async with reading(api, f"/api/jobs/{job_id}/events") as reader:
        await some(reader.events(), "delta")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
async def test_readers_that_never_read_cost_little_and_hold_up_nobody(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    path = f"/api/jobs/{job_id}/events"
    async with AsyncExitStack() as stack:
        for _ in range(100):
            _, writer = await open_raw(api, path)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            stack.callback(lambda writer=writer: writer.transport.abort())  # type: ignore[misc]
        attentive = asyncio.create_task(read_all(api, path))
        await making.write("begin")
        before = resident()
        for _ in range(50):
            await making.write("x" * 100_000)
        # Each reader that does not read lacks 5 MB by now: half a gigabyte together.
        assert resident() - before < 100_000_000
        await making.finish()
        got = heard(await attentive)
    assert got.text == making.reply
    assert got.kinds[-1] in FINAL


async def test_what_nobody_reads_any_more_is_forgotten(
    api: httpx.AsyncClient, database: Database, redis: Redis
) -> None:
    job_id = await submit(api, "x")
    making = await attempt(database, redis)
    await making.write("one ")
    for path in (f"/api/jobs/{job_id}/events", "/api/conversations/c/events"):
        async with reading(api, path) as reader:
            await some(reader.events(), "delta")

    async def is_forgotten() -> bool:
        gc.collect()
        return not any(isinstance(one, Followed) for one in gc.get_objects())

    await eventually(is_forgotten)
