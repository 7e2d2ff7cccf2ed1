"""What an attempt tells by Redis, against a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from llamalith_app.contracts.jobs import Progress
from llamalith_app.jobs.queue import redis_without_retries
from llamalith_app.streams import streams
from llamalith_app.streams.progress import ProgressReader
from llamalith_app.streams.streams import Entry, StreamPublisher, StreamSubscriber, history
from tests.settle import eventually

JOB = 7
RECORD = "a-record"
NAME = f"llamalith:events:{RECORD}:{JOB}"


async def told(redis: Redis, record: str = RECORD) -> list[tuple[str, str, Any]]:
    return [
        (f"{entry.attempt}-{entry.n}", entry.kind, msgspec.json.decode(entry.data).get("text"))
        for entry in await history(redis, record, JOB)
    ]


def text_of(entries: list[tuple[str, str, Any]]) -> str:
    last_restart = max((at for at, entry in enumerate(entries) if entry[1] == "restart"), default=-1)
    return "".join(text for _, kind, text in entries[last_restart + 1 :] if kind == "delta")


async def until(redis: Redis, text: str, record: str = RECORD) -> None:
    async def is_told() -> bool:
        return text_of(await told(redis, record)) == text

    await eventually(is_told)


async def listening(redis: Redis, hear: Callable[[int, Entry], None]) -> StreamSubscriber:
    """Every later entry of JOB is heard."""
    ready = asyncio.Event()
    hearing = StreamSubscriber(redis, RECORD, hear, lambda _: ready.set())
    hearing.follow(JOB)
    await ready.wait()
    return hearing


async def test_the_first_text_goes_at_once_and_what_follows_is_joined(redis: Redis, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "COALESCE_S", 3600)
    writer = StreamPublisher(redis, RECORD).writer(JOB, 1)
    writer.write([("delta", "a")], [1])
    await until(redis, "a")
    for letter in "bcd":
        writer.write([("delta", letter)], [2])
    writer.write([("thinking", "hm")])
    writer.write([], [3, 4])
    await writer.close()
    assert await told(redis) == [
        ("1-1", "delta", "a"),
        ("1-2", "delta", "bcd"),
        ("1-3", "thinking", "hm"),
        ("1-4", "delta", ""),
    ], "an end waits for nothing"
    entries = [msgspec.json.decode(entry.data) for entry in await history(redis, RECORD, JOB)]
    assert [entry["tokens"] for entry in entries] == [[1], [2, 2, 2], [], [3, 4]]
    assert [entry.get("offset") for entry in entries] == [0, 1, None, 4]
    assert 0 < await redis.ttl(NAME) <= streams.STREAM_TTL_S


async def test_an_end_that_comes_while_something_is_told_waits_for_the_rest(redis: Redis) -> None:
    teller = StreamPublisher(redis, RECORD)
    writer = teller.writer(JOB, 1)
    writer.write([("delta", "one ")])
    await until(redis, "one ")
    await redis.client_pause(300, all=False)
    writer.write([("delta", "two ")])

    async def is_on_its_way() -> bool:
        return not teller._news

    await eventually(is_on_its_way)
    writer.write([("delta", "three")])
    await writer.close()
    assert not writer._untold, "Redis has answered to all of it"
    assert text_of(await told(redis)) == "one two three"


async def test_jobs_of_another_record_with_the_same_ids_are_other_jobs(redis: Redis) -> None:
    heard: list[Entry] = []
    hearing = await listening(redis, lambda _, entry: heard.append(entry))
    for record in ("another", RECORD):
        writer = StreamPublisher(redis, record).writer(JOB, 1)
        writer.progress(Progress(phase="decode", completion_tokens=len(record)))
        writer.write([("delta", record)], [1])
        await until(redis, record, record)

    async def is_heard() -> bool:
        return any(entry.kind == "delta" for entry in heard)

    await eventually(is_heard)
    await hearing.close()
    assert [entry.kind for entry in heard] == ["progress", "delta"], "the other record was told first"
    before = await streams.before(redis, RECORD, JOB, 2)
    assert before is not None
    assert before.text == RECORD
    told = await ProgressReader(redis, RECORD).read({JOB: 1})
    assert told[JOB].completion_tokens == len(RECORD)


async def test_a_later_attempt_starts_again_and_a_stale_one_is_refused_and_falls_silent(redis: Redis) -> None:
    heard: list[Entry] = []
    hearing = await listening(redis, lambda _, entry: heard.append(entry))
    stale = StreamPublisher(redis, RECORD).writer(JOB, 1)
    stale.write([("delta", "stale")])
    await until(redis, "stale")
    later = StreamPublisher(redis, RECORD).writer(JOB, 2)
    later.write([("delta", "later")])
    await until(redis, "later")
    for n in (2, 3, 4):
        stale.write([("delta", f" {n}")])

        async def is_tried(n: int = n) -> bool:
            return stale._n == n and not stale._untold

        await eventually(is_tried)
    await stale.close()
    later.write([("delta", " on")])
    await later.close()

    async def is_over() -> bool:
        return sum(entry.kind == "ended" for entry in heard) == 2

    await eventually(is_over)
    await hearing.close()
    assert [entry[:2] for entry in await told(redis)] == [("2-1", "restart"), ("2-2", "delta"), ("2-3", "delta")]
    assert text_of(await told(redis)) == "later on"
    assert [entry.n for entry in heard if entry.attempt == 1 and entry.n] == [1, 2]


REPLY: list[tuple[streams.Written, str]] = [
    ("thinking", "hm "),
    ("thinking", "hmm"),
    ("delta", "one "),
    ("delta", "two "),
    ("delta", "three"),
]


@pytest.mark.parametrize("n_told", range(1, 6))
async def test_a_later_attempt_counts_on_and_tells_only_what_was_not_told(redis: Redis, n_told: int) -> None:
    stale = StreamPublisher(redis, RECORD).writer(JOB, 1)
    for n, piece in enumerate(REPLY[:n_told]):
        stale.write([piece], [n])
        await eventually(partial(_has_told, redis, n + 1))
    before = await streams.before(redis, RECORD, JOB, 2)
    assert before is not None
    assert before.tokens == list(range(n_told))
    later = StreamPublisher(redis, RECORD).writer(JOB, 2, before)
    assert later.write(REPLY, list(range(len(REPLY))))
    stale.write([("delta", "of one that was given up")], [9])
    await asyncio.gather(stale.close(), later.close())
    entries = await history(redis, RECORD, JOB)
    assert [entry.n for entry in entries] == list(range(1, len(entries) + 1))
    assert {(entry.attempt, entry.since) for entry in entries if entry.n > n_told} <= {(2, 1)}
    assert "restart" not in [entry.kind for entry in entries]
    assert text_of(await told(redis)) == "one two three"
    assert [token for entry in entries for token in msgspec.json.decode(entry.data)["tokens"]] == [0, 1, 2, 3, 4]


async def _has_told(redis: Redis, n: int) -> bool:
    return len(await history(redis, RECORD, JOB)) == n


async def test_a_later_attempt_whose_text_is_another_takes_back_what_was_told(redis: Redis) -> None:
    first = StreamPublisher(redis, RECORD).writer(JOB, 1)
    first.write([("delta", "one")], [1])
    await first.close()
    before = await streams.before(redis, RECORD, JOB, 2)
    of_another_model = StreamPublisher(redis, RECORD).writer(JOB, 2, before)
    assert not of_another_model.write([("delta", "eins zwei")], [1, 2])
    assert of_another_model.write([("delta", "uno")], [7])
    await of_another_model.close()
    assert [entry[1:] for entry in await told(redis)] == [
        ("delta", "one"),
        ("restart", None),
        ("delta", "uno"),
    ]
    # And a third goes on behind that.
    third_before = await streams.before(redis, RECORD, JOB, 3)
    assert third_before is not None
    assert (third_before.tokens, third_before.since) == ([7], 1)


@pytest.mark.parametrize("lost", ["1-1", "1-2"])
async def test_there_is_no_going_on_behind_what_has_a_gap(redis: Redis, lost: str) -> None:
    for n in range(1, 4):
        await redis.xadd(NAME, {"delta": '{"text":"x","tokens":[1]}'}, id=f"1-{n}")
    assert await streams.before(redis, RECORD, JOB, 2) is not None
    await redis.xdel(NAME, lost)
    assert await streams.before(redis, RECORD, JOB, 3) is None
    assert await streams.before(redis, RECORD, JOB + 1, 2) is None, "there was never anything"


@pytest.mark.parametrize("entry", [{"delta": "no JSON"}, {"delta": '{"text":1}'}, {"delta": "{}", "other": "2"}])
async def test_there_is_no_going_on_behind_what_cannot_be_understood(redis: Redis, entry: dict[Any, Any]) -> None:
    await redis.xadd(NAME, entry, id="1-1")
    assert await streams.before(redis, RECORD, JOB, 2) is None
    await redis.set(f"{NAME}9", "not a stream")
    assert await streams.before(redis, RECORD, JOB * 10 + 9, 2) is None


async def test_a_stream_that_was_wiped_is_told_again_as_a_whole(redis: Redis) -> None:
    writer = StreamPublisher(redis, RECORD).writer(JOB, 1)
    writer.write([("thinking", "hm")])
    writer.write([("delta", "one ")])
    await until(redis, "one ")
    for text in ("two ", "three "):
        await redis.flushall()
        n = writer._n
        writer.write([("delta", text)])

        async def is_whole(n: int = n) -> bool:
            return "restart" in [kind for _, kind, _ in await told(redis)] and writer._n > n + 2

        await eventually(is_whole)
    await writer.close()
    entries = await told(redis)
    assert text_of(entries) == "one two three "
    last_restart = max(at for at, entry in enumerate(entries) if entry[1] == "restart")
    assert entries[last_restart + 1][1:] == ("thinking", "hm")


async def test_what_redis_did_not_take_is_told_when_it_is_back(redis: Redis, redis_url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "RETRY_S", 0.02)
    client = redis_without_retries(redis_url)
    writer = StreamPublisher(client, RECORD).writer(JOB, 1)
    writer.write([("delta", "one ")])
    await until(redis, "one ")
    # Answers nothing for longer than the writer waits; what was sent meanwhile is done afterwards, and tried again.
    await redis.client_pause(500, all=True)
    for text in ("two ", "three "):
        writer.write([("delta", text)])
        await asyncio.sleep(0)
    await until(redis, "one two three ")
    await writer.close()
    await client.aclose()
    assert "restart" not in [kind for _, kind, _ in await told(redis)]


async def test_without_redis_nothing_is_raised_and_the_end_waits_for_nothing(absent_redis_url: str) -> None:
    redis = redis_without_retries(absent_redis_url)
    writer = StreamPublisher(redis, RECORD).writer(JOB, 1)
    writer.write([("delta", "text")])
    writer.progress(Progress(phase="decode"))
    await asyncio.wait_for(writer.close(), 5)
    await streams.tell_ended(redis, RECORD, [JOB])
    await redis.aclose()


async def test_progress_is_told_and_kept_but_no_part_of_the_stream(redis: Redis) -> None:
    heard: list[Entry] = []
    hearing = await listening(redis, lambda _, entry: heard.append(entry))
    writer = StreamPublisher(redis, RECORD).writer(JOB, 3)
    writer.progress(Progress(phase="prefill", prompt_tokens=8))

    async def is_heard() -> bool:
        return "progress" in [entry.kind for entry in heard]

    await eventually(is_heard)
    (entry,) = [entry for entry in heard if entry.kind == "progress"]
    assert (entry.attempt, entry.n) == (3, 0)
    assert msgspec.json.decode(entry.data)["prompt_tokens"] == 8
    assert (await ProgressReader(redis, RECORD).read({JOB: 3}))[JOB].phase == "prefill"
    await writer.close()
    await hearing.close()
    assert [entry[1] for entry in await told(redis)] == ["restart"]


async def test_of_an_attempt_that_is_over_redis_keeps_its_stream_for_a_while_and_nothing_else(redis: Redis) -> None:
    writer = StreamPublisher(redis, RECORD).writer(JOB, 1)
    writer.progress(Progress(phase="prefill"))
    writer.write([("delta", "text")])
    await until(redis, "text")
    writer.progress(Progress(phase="decode"))
    await writer.close()
    assert await redis.keys() == [NAME.encode()]
    assert 0 < await redis.ttl(NAME) <= streams.STREAM_TTL_S


async def test_an_attempt_that_was_overtaken_leaves_the_progress_of_the_next_one_alone(redis: Redis) -> None:
    teller = StreamPublisher(redis, RECORD)
    overtaken, later = teller.writer(JOB, 1), teller.writer(JOB, 2)
    later.write([("delta", "later")])
    await until(redis, "later")
    later.progress(Progress(phase="decode"))
    overtaken.progress(Progress(phase="prefill"))
    await overtaken.close()
    reader = ProgressReader(redis, RECORD)

    async def is_told() -> bool:
        return JOB in await reader.read({JOB: 2})

    await eventually(is_told)
    assert (await reader.read({JOB: 2}))[JOB].phase == "decode"
    assert await reader.read({JOB: 1}) == {}
    await later.close()


@pytest.mark.parametrize("n_entries", [0, streams.PAGE, streams.PAGE + 1])
async def test_a_history_is_read_page_by_page(redis: Redis, n_entries: int) -> None:
    pipeline = redis.pipeline()
    for n in range(1, n_entries + 1):
        pipeline.xadd(NAME, {"delta": "{}"}, id=f"1-{n}")
    await pipeline.execute()
    assert [entry.n for entry in await history(redis, RECORD, JOB)] == list(range(1, n_entries + 1))
    assert [entry.n for entry in await history(redis, RECORD, JOB, (1, 3))] == list(range(4, n_entries + 1))


async def test_hearing_comes_back_with_redis_and_says_what_to_look_up(redis: Redis) -> None:
    ready: list[int] = []
    hearing = StreamSubscriber(redis, RECORD, lambda job_id, entry: None, ready.append)
    hearing.follow(JOB)
    hearing.follow(8)

    async def both(times: int) -> bool:
        return ready.count(JOB) == ready.count(8) == times

    await eventually(lambda: both(1))
    await redis.client_kill_filter(_type="pubsub")
    await eventually(lambda: both(2))
    hearing.leave(8)
    await redis.client_kill_filter(_type="pubsub")
    await eventually(lambda: _has(ready, JOB, 3))
    assert ready.count(8) == 2
    hearing.follow(9)
    assert ready[-1] == 9, "at once, for everything is heard"
    await hearing.close()


async def _has(ready: list[int], job_id: int, times: int) -> bool:
    return ready.count(job_id) == times


async def test_jobs_are_told_together_and_a_reader_hears_of_its_own(redis: Redis, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "COALESCE_S", 3600)
    heard: list[tuple[int, str]] = []
    hearing = await listening(redis, lambda job_id, entry: heard.append((job_id, entry.kind)))
    # What nobody understands disturbs nobody.
    await redis.publish(streams.channel(RECORD), b"of another version")
    teller = StreamPublisher(redis, RECORD)
    mine, other = teller.writer(JOB, 1), teller.writer(8, 1)
    mine.write([("delta", "a")])
    other.write([("delta", "b")])
    await asyncio.gather(mine.close(), other.close())

    async def is_over() -> bool:
        return (JOB, "ended") in heard

    await eventually(is_over)
    assert heard == [(JOB, "delta"), (JOB, "ended")]
    assert [entry.kind for entry in await history(redis, RECORD, 8)] == ["delta"]
    await hearing.close()


async def test_entries_that_redis_lost_from_the_end_are_noticed(redis: Redis, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "CHECK_S", 0)
    writer = StreamPublisher(redis, RECORD).writer(JOB, 1)
    for text in ("one ", "two ", "three "):
        writer.write([("delta", text)])
        await until(redis, "one two three "[: "one two three ".index(text) + len(text)])
    # As after a crash of Redis that had not written its last seconds to disk.
    await redis.xdel(NAME, "1-3")
    writer.write([("delta", "four")])

    async def is_whole() -> bool:
        return (await told(redis))[-1][1:] == ("delta", "one two three four")

    await eventually(is_whole)
    await writer.close()
