"""What an attempt publishes by Redis, and what a subscriber gets of it, against a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from llamalith_app.contracts.jobs import Progress
from llamalith_app.jobs.queue import redis_without_retries
from llamalith_app.streams import resume
from llamalith_app.streams.progress import ProgressReader
from llamalith_app.streams.publisher import StreamPublisher, Timings, publish_ended
from llamalith_app.streams.resume import RESUME_TIMEOUT_S, ResumePoint
from llamalith_app.streams.subscriber import PAGE, StreamSubscriber, history
from llamalith_app.streams.wire import Entry, TextKind, channel_name
from tests.settle import eventually

JOB = 7
RECORD = "a-record"
NAME = f"llamalith:events:{RECORD}:{JOB}"


async def published(redis: Redis, record: str = RECORD) -> list[tuple[str, str, Any]]:
    return [
        (f"{entry.attempt}-{entry.n}", entry.kind, msgspec.json.decode(entry.data).get("text"))
        for entry in await history(redis, record, JOB)
    ]


async def resumable(redis: Redis, attempt: int, job_id: int = JOB) -> ResumePoint | None:
    return await resume.resume_point(redis, RECORD, job_id, attempt, RESUME_TIMEOUT_S)


def text_of(entries: list[tuple[str, str, Any]]) -> str:
    last_restart = max((at for at, entry in enumerate(entries) if entry[1] == "restart"), default=-1)
    return "".join(text for _, kind, text in entries[last_restart + 1 :] if kind == "delta")


async def until(redis: Redis, text: str, record: str = RECORD) -> None:
    async def is_published() -> bool:
        return text_of(await published(redis, record)) == text

    await eventually(is_published)


async def subscribed(redis: Redis, on_entry: Callable[[int, Entry], None]) -> StreamSubscriber:
    """Every later entry of JOB is received."""
    ready = asyncio.Event()
    subscriber = StreamSubscriber(redis, RECORD, on_entry, lambda _: ready.set())
    subscriber.follow(JOB)
    await ready.wait()
    return subscriber


async def test_the_first_text_goes_at_once_and_what_follows_is_joined(redis: Redis) -> None:
    stream = StreamPublisher(redis, RECORD, Timings(coalesce_s=3600)).open_attempt(JOB, 1)
    stream.append([("delta", "a")], [1])
    await until(redis, "a")
    for letter in "bcd":
        stream.append([("delta", letter)], [2])
    stream.append([("thinking", "hm")])
    stream.append([], [3, 4])
    await stream.publish_end()
    assert await published(redis) == [
        ("1-1", "delta", "a"),
        ("1-2", "delta", "bcd"),
        ("1-3", "thinking", "hm"),
        ("1-4", "delta", ""),
    ], "an end waits for nothing"
    entries = [msgspec.json.decode(entry.data) for entry in await history(redis, RECORD, JOB)]
    assert [entry["tokens"] for entry in entries] == [[1], [2, 2, 2], [], [3, 4]]
    assert [entry.get("offset") for entry in entries] == [0, 1, None, 4]
    assert 0 < await redis.ttl(NAME) <= Timings().stream_ttl_s


async def test_an_end_that_comes_while_something_is_published_waits_for_the_rest(redis: Redis) -> None:
    publisher = StreamPublisher(redis, RECORD)
    stream = publisher.open_attempt(JOB, 1)
    stream.append([("delta", "one ")])
    await until(redis, "one ")
    await redis.client_pause(300, all=False)
    stream.append([("delta", "two ")])

    async def is_on_its_way() -> bool:
        return not publisher._pending

    await eventually(is_on_its_way)
    stream.append([("delta", "three")])
    await stream.publish_end()
    assert not stream._unconfirmed, "Redis has answered to all of it"
    assert text_of(await published(redis)) == "one two three"


async def test_an_attempt_that_gives_its_job_back_waits_for_the_rest_and_only_so_long(redis: Redis) -> None:
    received: list[Entry] = []
    subscriber = await subscribed(redis, lambda _, entry: received.append(entry))
    stream = StreamPublisher(redis, RECORD, Timings(coalesce_s=3600)).open_attempt(JOB, 1)
    stream.append([("delta", "one ")], [1])
    await until(redis, "one ")
    stream.append([("delta", "two ")], [2])
    stream.append([], [3])
    await stream.publish_rest(3600)
    before = await resumable(redis, 2)
    assert before is not None
    assert (before.text, before.tokens) == ("one two ", [1, 2, 3])
    publisher = StreamPublisher(redis, RECORD)
    hung = publisher.open_attempt(JOB, 2, before)
    await redis.client_pause(3_600_000, all=False)
    hung.append([("delta", "one two three ")], [1, 2, 3, 4])

    async def is_on_its_way() -> bool:
        return not publisher._pending

    await eventually(is_on_its_way)
    hung.append([("delta", "four")], [5])
    await hung.publish_rest(0.01)
    await redis.client_unpause()
    await asyncio.gather(stream.publish_end(), hung.publish_end())

    async def is_over() -> bool:
        return sum(entry.kind == "ended" for entry in received) == 2

    await eventually(is_over)
    await subscriber.close()
    assert text_of(await published(redis)) == "one two three ", "what came too late is dropped"
    assert b"four" not in b"".join(entry.data for entry in received)


async def test_jobs_of_another_record_with_the_same_ids_are_other_jobs(redis: Redis) -> None:
    received: list[Entry] = []
    subscriber = await subscribed(redis, lambda _, entry: received.append(entry))
    for record in ("another", RECORD):
        stream = StreamPublisher(redis, record).open_attempt(JOB, 1)
        stream.publish_progress(Progress(phase="decode", completion_tokens=len(record)))
        stream.append([("delta", record)], [1])
        await until(redis, record, record)

    async def is_received() -> bool:
        return any(entry.kind == "delta" for entry in received)

    await eventually(is_received)
    await subscriber.close()
    assert [entry.kind for entry in received] == ["progress", "delta"], "the other record was published first"
    before = await resumable(redis, 2)
    assert before is not None
    assert before.text == RECORD
    progress = await ProgressReader(redis, RECORD).read({JOB: 1})
    assert progress[JOB].completion_tokens == len(RECORD)


async def test_a_later_attempt_starts_again_and_a_stale_one_is_refused_and_falls_silent(redis: Redis) -> None:
    received: list[Entry] = []
    subscriber = await subscribed(redis, lambda _, entry: received.append(entry))
    stale = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    stale.append([("delta", "stale")])
    await until(redis, "stale")
    later = StreamPublisher(redis, RECORD).open_attempt(JOB, 2)
    later.append([("delta", "later")])
    await until(redis, "later")
    for n in (2, 3, 4):
        stale.append([("delta", f" {n}")])

        async def is_tried(n: int = n) -> bool:
            return stale._n == n and not stale._unconfirmed

        await eventually(is_tried)
    await stale.publish_end()
    later.append([("delta", " on")])
    await later.publish_end()

    async def is_over() -> bool:
        return sum(entry.kind == "ended" for entry in received) == 2

    await eventually(is_over)
    await subscriber.close()
    assert [entry[:2] for entry in await published(redis)] == [("2-1", "restart"), ("2-2", "delta"), ("2-3", "delta")]
    assert text_of(await published(redis)) == "later on"
    assert [entry.n for entry in received if entry.attempt == 1 and entry.n] == [1, 2]


REPLY: list[tuple[TextKind, str]] = [
    ("thinking", "hm "),
    ("thinking", "hmm"),
    ("delta", "one "),
    ("delta", "two "),
    ("delta", "three"),
]


@pytest.mark.parametrize("n_published", range(1, 6))
async def test_a_later_attempt_counts_on_and_publishes_only_what_is_new(redis: Redis, n_published: int) -> None:
    stale = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    for n, piece in enumerate(REPLY[:n_published]):
        stale.append([piece], [n])
        await eventually(partial(_has_published, redis, n + 1))
    before = await resumable(redis, 2)
    assert before is not None
    assert before.tokens == list(range(n_published))
    later = StreamPublisher(redis, RECORD).open_attempt(JOB, 2, before)
    assert later.append(REPLY, list(range(len(REPLY))))
    stale.append([("delta", "of one that was given up")], [9])
    await asyncio.gather(stale.publish_end(), later.publish_end())
    entries = await history(redis, RECORD, JOB)
    assert [entry.n for entry in entries] == list(range(1, len(entries) + 1))
    assert {(entry.attempt, entry.first_attempt) for entry in entries if entry.n > n_published} <= {(2, 1)}
    assert "restart" not in [entry.kind for entry in entries]
    assert text_of(await published(redis)) == "one two three"
    assert [token for entry in entries for token in msgspec.json.decode(entry.data)["tokens"]] == [0, 1, 2, 3, 4]


async def _has_published(redis: Redis, n: int) -> bool:
    return len(await history(redis, RECORD, JOB)) == n


async def test_a_later_attempt_with_another_text_takes_back_the_earlier_one(redis: Redis) -> None:
    first = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    first.append([("delta", "one")], [1])
    await first.publish_end()
    before = await resumable(redis, 2)
    of_another_model = StreamPublisher(redis, RECORD).open_attempt(JOB, 2, before)
    assert not of_another_model.append([("delta", "eins zwei")], [1, 2])
    assert of_another_model.append([("delta", "uno")], [7])
    await of_another_model.publish_end()
    assert [entry[1:] for entry in await published(redis)] == [
        ("delta", "one"),
        ("restart", None),
        ("delta", "uno"),
    ]
    # And a third goes on behind that.
    third_before = await resumable(redis, 3)
    assert third_before is not None
    assert (third_before.tokens, third_before.first_attempt) == ([7], 1)


@pytest.mark.parametrize("lost", ["1-1", "1-2"])
async def test_there_is_no_going_on_behind_what_has_a_gap(redis: Redis, lost: str) -> None:
    for n in range(1, 4):
        await redis.xadd(NAME, {"delta": '{"text":"x","tokens":[1]}'}, id=f"1-{n}")
    assert await resumable(redis, 2) is not None
    await redis.xdel(NAME, lost)
    assert await resumable(redis, 3) is None
    assert await resumable(redis, 2, JOB + 1) is None, "there was never anything"


@pytest.mark.parametrize("entry", [{"delta": "no JSON"}, {"delta": '{"text":1}'}, {"delta": "{}", "other": "2"}])
async def test_there_is_no_going_on_behind_what_cannot_be_understood(redis: Redis, entry: dict[Any, Any]) -> None:
    await redis.xadd(NAME, entry, id="1-1")
    assert await resumable(redis, 2) is None
    await redis.set(f"{NAME}9", "not a stream")
    assert await resumable(redis, 2, JOB * 10 + 9) is None


async def test_a_stream_that_was_wiped_is_published_again_as_a_whole(redis: Redis) -> None:
    stream = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    stream.append([("thinking", "hm")])
    stream.append([("delta", "one ")])
    await until(redis, "one ")
    for text in ("two ", "three "):
        await redis.flushall()
        n = stream._n
        stream.append([("delta", text)])

        async def is_whole(n: int = n) -> bool:
            return "restart" in [kind for _, kind, _ in await published(redis)] and stream._n > n + 2

        await eventually(is_whole)
    await stream.publish_end()
    entries = await published(redis)
    assert text_of(entries) == "one two three "
    last_restart = max(at for at, entry in enumerate(entries) if entry[1] == "restart")
    assert entries[last_restart + 1][1:] == ("thinking", "hm")


async def test_what_redis_did_not_take_is_sent_again_when_it_is_back(redis: Redis, redis_url: str) -> None:
    client = redis_without_retries(redis_url)
    stream = StreamPublisher(client, RECORD, Timings(retry_s=0.02)).open_attempt(JOB, 1)
    stream.append([("delta", "one ")])
    await until(redis, "one ")
    # Answers nothing for longer than the stream waits; what was sent meanwhile is done afterwards, and tried again.
    await redis.client_pause(500, all=True)
    for text in ("two ", "three "):
        stream.append([("delta", text)])
        await asyncio.sleep(0)
    await until(redis, "one two three ")
    await stream.publish_end()
    await client.aclose()
    assert "restart" not in [kind for _, kind, _ in await published(redis)]


async def test_without_redis_nothing_is_raised_and_the_end_waits_for_nothing(absent_redis_url: str) -> None:
    redis = redis_without_retries(absent_redis_url)
    stream = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    stream.append([("delta", "text")])
    stream.publish_progress(Progress(phase="decode"))
    await asyncio.wait_for(stream.publish_end(), 5)
    await publish_ended(redis, RECORD, [JOB])
    await redis.aclose()


async def test_progress_is_published_and_kept_but_no_part_of_the_stream(redis: Redis) -> None:
    received: list[Entry] = []
    subscriber = await subscribed(redis, lambda _, entry: received.append(entry))
    stream = StreamPublisher(redis, RECORD).open_attempt(JOB, 3)
    stream.publish_progress(Progress(phase="prefill", prompt_tokens=8))

    async def is_received() -> bool:
        return "progress" in [entry.kind for entry in received]

    await eventually(is_received)
    (entry,) = [entry for entry in received if entry.kind == "progress"]
    assert (entry.attempt, entry.n) == (3, 0)
    assert msgspec.json.decode(entry.data)["prompt_tokens"] == 8
    assert (await ProgressReader(redis, RECORD).read({JOB: 3}))[JOB].phase == "prefill"
    await stream.publish_end()
    await subscriber.close()
    assert [entry[1] for entry in await published(redis)] == ["restart"]


async def test_of_an_attempt_that_is_over_redis_keeps_its_stream_for_a_while_and_nothing_else(redis: Redis) -> None:
    stream = StreamPublisher(redis, RECORD).open_attempt(JOB, 1)
    stream.publish_progress(Progress(phase="prefill"))
    stream.append([("delta", "text")])
    await until(redis, "text")
    stream.publish_progress(Progress(phase="decode"))
    await stream.publish_end()
    assert await redis.keys() == [NAME.encode()]
    assert 0 < await redis.ttl(NAME) <= Timings().stream_ttl_s


async def test_an_attempt_that_was_overtaken_leaves_the_progress_of_the_next_one_alone(redis: Redis) -> None:
    publisher = StreamPublisher(redis, RECORD)
    overtaken, later = publisher.open_attempt(JOB, 1), publisher.open_attempt(JOB, 2)
    later.append([("delta", "later")])
    await until(redis, "later")
    later.publish_progress(Progress(phase="decode"))
    overtaken.publish_progress(Progress(phase="prefill"))
    await overtaken.publish_end()
    reader = ProgressReader(redis, RECORD)

    async def is_published() -> bool:
        return JOB in await reader.read({JOB: 2})

    await eventually(is_published)
    assert (await reader.read({JOB: 2}))[JOB].phase == "decode"
    assert await reader.read({JOB: 1}) == {}
    await later.publish_end()


@pytest.mark.parametrize("n_entries", [0, PAGE, PAGE + 1])
async def test_a_history_is_read_page_by_page(redis: Redis, n_entries: int) -> None:
    pipeline = redis.pipeline()
    for n in range(1, n_entries + 1):
        pipeline.xadd(NAME, {"delta": "{}"}, id=f"1-{n}")
    await pipeline.execute()
    assert [entry.n for entry in await history(redis, RECORD, JOB)] == list(range(1, n_entries + 1))
    assert [entry.n for entry in await history(redis, RECORD, JOB, (1, 3))] == list(range(4, n_entries + 1))


async def test_a_subscription_comes_back_with_redis_and_says_which_histories_to_read(redis: Redis) -> None:
    ready: list[int] = []
    subscriber = StreamSubscriber(redis, RECORD, lambda job_id, entry: None, ready.append)
    subscriber.follow(JOB)
    subscriber.follow(8)

    async def both(times: int) -> bool:
        return ready.count(JOB) == ready.count(8) == times

    await eventually(lambda: both(1))
    await redis.client_kill_filter(_type="pubsub")
    await eventually(lambda: both(2))
    subscriber.unfollow(8)
    await redis.client_kill_filter(_type="pubsub")
    await eventually(lambda: _has(ready, JOB, 3))
    assert ready.count(8) == 2
    subscriber.follow(9)
    assert ready[-1] == 9, "at once, for everything is received"
    await subscriber.close()


async def test_a_close_ends_a_subscription_that_loses_a_cancel(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `asyncio.wait_for` loses one before Python 3.12, when SUBSCRIBE was just sent."""
    subscribes, received_nothing = asyncio.Event(), asyncio.Event().wait

    class Losing:
        async def subscribe(self, _channel: str) -> None:
            subscribes.set()
            with contextlib.suppress(asyncio.CancelledError):
                await received_nothing()

        async def get_message(self, timeout: float) -> None:  # noqa: ASYNC109 - as redis-py has it
            await received_nothing()

        async def aclose(self) -> None:
            return

    monkeypatch.setattr(redis, "pubsub", Losing)
    subscriber = StreamSubscriber(redis, RECORD, lambda job_id, entry: None, lambda _: None)
    subscriber.follow(JOB)
    await subscribes.wait()
    async with asyncio.timeout(20):
        await subscriber.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _has(ready: list[int], job_id: int, times: int) -> bool:
    return ready.count(job_id) == times


async def test_jobs_are_published_together_and_a_subscriber_gets_its_own(redis: Redis) -> None:
    received: list[tuple[int, str]] = []
    subscriber = await subscribed(redis, lambda job_id, entry: received.append((job_id, entry.kind)))
    # What nobody understands disturbs nobody.
    await redis.publish(channel_name(RECORD), b"of another version")
    publisher = StreamPublisher(redis, RECORD, Timings(coalesce_s=3600))
    mine, other = publisher.open_attempt(JOB, 1), publisher.open_attempt(8, 1)
    mine.append([("delta", "a")])
    other.append([("delta", "b")])
    await asyncio.gather(mine.publish_end(), other.publish_end())

    async def is_over() -> bool:
        return (JOB, "ended") in received

    await eventually(is_over)
    assert received == [(JOB, "delta"), (JOB, "ended")]
    assert [entry.kind for entry in await history(redis, RECORD, 8)] == ["delta"]
    await subscriber.close()


async def test_entries_that_redis_lost_from_the_end_are_noticed(redis: Redis) -> None:
    stream = StreamPublisher(redis, RECORD, Timings(check_s=0)).open_attempt(JOB, 1)
    for text in ("one ", "two ", "three "):
        stream.append([("delta", text)])
        await until(redis, "one two three "[: "one two three ".index(text) + len(text)])
    # As after a crash of Redis that had not written its last seconds to disk.
    await redis.xdel(NAME, "1-3")
    stream.append([("delta", "four")])

    async def is_whole() -> bool:
        return (await published(redis))[-1][1:] == ("delta", "one two three four")

    await eventually(is_whole)
    await stream.publish_end()
