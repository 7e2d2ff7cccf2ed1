"""Hints and the SAQ workers that receive them: with an old Redis, an absent one, and one that answers with errors."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from llamalith_app.errors import ConfigError
from llamalith_app.jobs.queue import (
    PENDING_HINTS,
    Hint,
    Hints,
    TaskProgress,
    Timings,
    Wakers,
    enqueue,
    refuse_old_redis,
    saq_queue,
)
from tests.settle import eventually

PATIENT_S = 20.0
"""A server that is there may need longer on a slow machine than a hint may take."""


async def server_that_says(version: str, path: Path) -> asyncio.Server:
    """Answers INFO as a server of that version would; no old one can be installed here."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = f"# Server\r\nredis_version:{version}\r\n".encode()
        while command := await reader.readline():
            if command.upper().strip() == b"INFO":
                writer.write(b"$%d\r\n%s\r\n" % (len(info), info))
            elif command.upper().strip() in (b"CLIENT", b"HELLO"):
                writer.write(b"+OK\r\n")
        writer.close()

    return await asyncio.start_unix_server(answer, path)


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.16"])
async def test_an_old_redis_is_refused_by_its_version(tmp_path: Path, version: str) -> None:
    server = await server_that_says(version, tmp_path / "old")
    with pytest.raises(ConfigError, match=f"this server is Redis {version}; 6.2 or newer is needed"):
        await refuse_old_redis(f"unix://{tmp_path}/old?protocol=2", PATIENT_S)
    server.close()


@pytest.mark.parametrize("version", ["6.2.0", "7.0.15", "10.1"])
async def test_a_newer_redis_is_accepted(tmp_path: Path, version: str) -> None:
    server = await server_that_says(version, tmp_path / "new")
    await refuse_old_redis(f"unix://{tmp_path}/new?protocol=2", PATIENT_S)
    server.close()


async def test_the_embedded_valkey_is_new_enough_and_an_absent_redis_is_not_refused(
    redis_url: str, absent_redis_url: str
) -> None:
    await refuse_old_redis(redis_url, PATIENT_S)
    await refuse_old_redis(absent_redis_url, PATIENT_S)


async def test_of_a_crowd_of_hints_only_the_newest_are_sent(redis_url: str) -> None:
    hints = Hints(redis_url, ("m",), timeout_s=PATIENT_S)
    for job_id in range(1000):
        hints.send("m", job_id)
    async with Redis.from_url(redis_url) as redis:

        async def last_is_there() -> bool:
            return bool(await redis.exists("saq:job:llamalith:m:j999.a1"))

        await eventually(last_is_there)
        assert await redis.llen("saq:llamalith:m:queued") <= PENDING_HINTS + 1
    await hints.close()


async def test_a_task_that_a_dead_worker_left_is_swept_at_once_and_by_no_subscription(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        queue = saq_queue(redis, "m")
        await enqueue(queue, Hint(1, 1))
        job = await queue.dequeue(5)
        assert job is not None
        swept = asyncio.create_task(queue.sweep())

        async def is_swept() -> bool:
            assert await redis.pubsub_numpat() == 0
            return swept.done()

        await eventually(is_swept)
        assert await swept == [job.id]
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("state", ["just started", "idle", "at work", "frozen"])
async def test_a_stop_leaves_no_task_behind(redis_url: str, state: str) -> None:
    woken, ends = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        woken.set()
        await ends.wait()

    # A stop that finds the tasks of what was just started waits for none of them.
    timings = Timings(stop_s=3600 if state == "just started" else 0.3)
    wakers = Wakers(redis_url, {"m": 2, "n": 1}, lambda _model, _report: asyncio.create_task(work()), timings)
    wakers.start()
    hints = Hints(redis_url, ("m",), timeout_s=PATIENT_S)

    async def waits() -> bool:
        return all(worker.tasks for worker in wakers._workers)

    if state != "just started":
        await eventually(waits)
    if state in ("at work", "frozen"):
        hints.send("m", 1)
        await woken.wait()
    async with Redis.from_url(redis_url) as redis:
        if state == "frozen":
            await redis.client_pause(2000)
        async with asyncio.timeout(20):
            await wakers.stop()
    ends.set()
    await hints.close()
    # Work that was started goes on, and ends by itself.
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert [task for task in left if "work" not in repr(task.get_coro())] == []
    await asyncio.wait([*left]) if left else None


async def test_a_stop_leaves_no_connection_that_was_being_opened(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cancels are lost on the way, as `asyncio.wait_for` loses them before Python 3.12."""
    opened: list[asyncio.StreamWriter] = []
    connecting: Counter[asyncio.Task[Any] | None] = Counter()
    open_connection = asyncio.open_unix_connection

    async def open_late(*args: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connecting[task := asyncio.current_task()] += 1
        if connecting[task] <= 2:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if connecting[task] == 1:
            raise ConnectionRefusedError
        reader, writer = await open_connection(*args, **kwargs)
        opened.append(writer)
        return reader, writer

    monkeypatch.setattr(asyncio, "open_unix_connection", open_late)
    wakers = Wakers(redis_url, {"m": 1}, never_woken, Timings(stop_s=2))
    wakers.start()

    async def connects() -> bool:
        return bool(connecting)

    await eventually(connects)
    await wakers.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert opened
    assert all(writer.is_closing() for writer in opened)


def never_woken(_model: str, _report: Callable[[TaskProgress], None]) -> asyncio.Task[None]:
    raise AssertionError("nobody could have woken it")


WAIT_FOR_NOBODY = """
import asyncio, sys, time
from llamalith_app.jobs.queue import Wakers

def never(model, report):
    raise AssertionError("nobody could have woken it")

async def main(url, seconds):
    wakers = Wakers(url, {"m": 2, "n": 2}, never)
    wakers.start()
    before = time.process_time()
    await asyncio.sleep(seconds)
    print((time.process_time() - before) / seconds)
    await wakers.stop()

asyncio.run(main(sys.argv[1], 5.0))
"""


async def share_of_a_core(redis_url: str) -> float:
    # The work of a span of time: there is no event to wait for. In a process of its own, since what other tests left in
    # this one is not what is measured.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WAIT_FOR_NOBODY, redis_url, stdout=subprocess.PIPE
    )
    output, _ = await process.communicate()
    return float(output.splitlines()[-1])


@pytest.mark.slow
async def test_waiting_for_an_absent_redis_takes_hardly_any_of_a_core(absent_redis_url: str) -> None:
    assert await share_of_a_core(absent_redis_url) < 0.05


@pytest.mark.slow
async def test_a_redis_that_refuses_takes_hardly_any_of_a_core(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        for model in ("m", "n"):
            await redis.set(f"saq:llamalith:{model}:queued", "no list")
    assert await share_of_a_core(redis_url) < 0.05


async def test_a_hint_for_a_model_that_is_no_longer_configured_is_dropped(redis_url: str) -> None:
    hints = Hints(redis_url, ("m",), timeout_s=PATIENT_S)
    hints.send("gone", 1)
    await hints.close()
    async with Redis.from_url(redis_url) as redis:
        assert await redis.keys("*") == []
