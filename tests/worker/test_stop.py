"""Attempts that end before their reply is whole: cancelled, or out of time."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import os
import signal
import time
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy import Connection

from llamalith_app.contracts.jobs import Job
from llamalith_app.engine.client.local import LocalTimings
from llamalith_app.engine.messages import Advance
from llamalith_app.engine.reply import Piece
from llamalith_app.jobs.worker.attempt import AttemptTimings
from llamalith_app.jobs.worker.process import Worker, WorkerTimings, local_engines
from llamalith_app.jobs.worker.running import RunningAttempt, StopReason
from llamalith_app.settings.config import Config
from llamalith_app.store import check
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import leases, reads, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.tables import Status
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.streams import resume
from llamalith_app.streams.resume import ResumePoint, resume_point
from llamalith_app.streams.subscriber import history
from tests import fake_engine
from tests.settle import eventually
from tests.worker.conftest import (
    NO_POLL,
    Script,
    Submit,
    at_phase,
    attempts,
    ended,
    engine_pid,
    slots,
    sweeping,
    working,
)


async def cancel(database: Database, job_id: int) -> Status | None:
    return await database.write(transitions.cancel, ADMIN_ID, job_id, datetime.now(UTC))


async def idle(worker: Worker) -> None:
    async def look() -> bool:
        return not worker.dispatcher.running

    await eventually(look)


async def read(database: Database, job_id: int) -> Job:
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    return job


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["cancel", "timeout_s", "nothing"])
async def test_an_engine_that_hangs_is_killed_and_its_slot_serves_the_next(
    config: Config, script: Script, submit: Submit, database: Database, asked: str
) -> None:
    timings = LocalTimings(silent_after_cancel_s=0.1)
    engines = local_engines(config, fake_engine.argv(script.path), timings)
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 1900})
    async with working(slots(config, 1), script, engines=engines) as worker:
        job_id = await submit("long", timeout_s=600 if asked == "timeout_s" else None, max_attempts=1)
        next_id = await submit("next")
        running = await at_phase(worker, "decode")
        os.kill(engine_pid(worker), signal.SIGSTOP)
        if asked == "nothing":
            # As after half an hour in which the worker's timer saw nothing of it.
            worker._pool.watch(timings.silent_s)
        if asked == "timeout_s":
            # As its timer does when its time is over.
            running.stop(StopReason.TIMEOUT)
        if asked == "cancel":
            await cancel(database, job_id)
        job = await ended(database, job_id)
        assert (await ended(database, next_id)).status == "done"
    if asked == "cancel":
        assert job.status == "cancelled"
    else:
        assert job.error is not None
        assert job.error.kind == ("timeout" if asked == "timeout_s" else "engine_died")
        assert asked == "timeout_s" or "sent nothing for" in job.error.reason


async def test_a_cancel_while_the_attempt_before_is_read_ends_the_wait_for_the_model(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    script.write({"when": "die", "signal": 9})
    reads, goes_on = asyncio.Event(), asyncio.Event()

    async def slow(*of: Any) -> ResumePoint | None:
        reads.set()
        await goes_on.wait()
        return await resume_point(*of)

    monkeypatch.setattr(resume, "resume_point", slow)
    async with working(config, script) as worker:
        job_id = await submit("die")
        await reads.wait()
        script.write({"model": "m", "load_gate": str(tmp_path / "gate")})
        (running,) = worker.dispatcher.running.values()
        await cancel(database, job_id)

        async def is_heard() -> bool:
            return running.stop_reason is not None

        await eventually(is_heard)
        goes_on.set()
        await idle(worker)
        (tmp_path / "gate").touch()


async def test_a_reply_that_was_whole_when_the_drain_stopped_it_keeps_its_last_characters(
    config: Config, script: Script, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write({"when": "long", "reply": "if a <"})
    take = RunningAttempt.take

    def take_and_stop(running: RunningAttempt, step: Advance) -> list[Piece]:
        if step.finish == "stop":
            running.stop_reason = StopReason.DRAIN
        return take(running, step)

    monkeypatch.setattr(RunningAttempt, "take", take_and_stop)
    async with working(config, script):
        job = await ended(database, await submit("long"))
    assert (job.status, job.result) == ("done", "if a <")


async def test_what_an_attempt_before_had_written_is_kept_of_a_job_that_is_cancelled_before_it_goes_on(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "late", "after": 3, "signal": 9, "reply": "abcdefghijklmnop"})

    async def then_slow(*of: Any) -> ResumePoint | None:
        found = await resume_point(*of)
        script.write({"when": "late", "step_s": 0.3, "reply": "abcdefghijklmnop"})
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resume, "resume_point", then_slow)
        async with working(config, script) as worker:
            job_id = await submit("late" + 400 * ".")

            async def reads_again() -> RunningAttempt | None:
                running = worker.dispatcher.running.values()
                return next(
                    (one for one in running if one.resume_point is not None and one.last_step is not None), None
                )

            assert await eventually(reads_again)
            await cancel(database, job_id)
            await idle(worker)
    job = await ended(database, job_id)
    assert job.status == "cancelled"
    assert job.partial
    assert "abcdefghijklmnop".startswith(job.partial)


async def test_a_cancelled_job_keeps_what_was_written_and_the_next_of_its_conversation_runs_without_it(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "<think>hm</think> " + "x" * 1900})
    with structlog.testing.capture_logs() as lines:
        async with working(config, script) as worker:
            job_id, next_id = await submit("long", "c"), await submit("next", "c")
            running = await at_phase(worker, "decode")

            async def written() -> bool:
                return "x" in running.written().text

            await eventually(written)
            assert await cancel(database, job_id) is Status.CANCELLED
            following = await ended(database, next_id)
    job = await ended(database, job_id)
    assert following.result == hashlib.sha256(b"<user>next</user>").hexdigest()
    assert (job.status, job.result, job.error) == ("cancelled", None, None)
    assert job.partial is not None
    assert set(job.partial) == {"x"}
    assert len(job.partial) < 1900
    assert job.prompt_tokens == len("<user>long</user>")
    assert job.completion_tokens is not None
    assert job.completion_tokens > len(job.partial)
    assert await attempts(database, job_id) == [(1, "cancelled", None)]
    assert "attempt cancelled" in [line["event"] for line in lines]
    assert "lease lost" not in [line["event"] for line in lines]


async def test_a_worker_that_ends_hands_over_a_reply_in_its_middle(
    config: Config, script: Script, submit: Submit, database: Database, redis_url: str, tmp_path: Path
) -> None:
    # What could become a tag is held back, and is no text of the reply because a worker ends.
    kept = "four" + " and more" * 100
    reply = f"one <two <thi three</think> {kept}"
    gate = tmp_path / "gate"
    # Long enough that the engine hears that it is to stop before the reply is whole.
    rule = {"when": "long", "reply": reply, "opens_thinking": True}
    script.write({**rule, "after": 13, "gate": str(gate), "step_s": 0.01})
    worker = Worker(config, local_engines(config, fake_engine.argv(script.path)))
    await worker.start()
    job_id = await submit("long")
    running = await at_phase(worker, "decode")

    async def is_at_the_gate() -> bool:
        return running.completion_tokens == 13

    async def is_told_to_stop() -> bool:
        return running.stop_reason is StopReason.DRAIN

    await eventually(is_at_the_gate)
    draining = asyncio.create_task(worker.drain(0))
    await eventually(is_told_to_stop)
    gate.touch()
    await draining
    script.write(rule)
    async with working(config, script):
        job = await ended(database, job_id)
    assert (job.result, job.attempt, job.completion_tokens) == (kept, 2, len(reply))
    assert (job.thinking, job.thinking_s) == ("one <two <thi three", None), "whole and once; how long is not known"
    assert [outcome for _, outcome, _ in await attempts(database, job_id)] == ["released", "done"]
    async with Redis.from_url(redis_url) as redis:
        entries = await history(redis, record_id(database.path), job_id)
    assert [entry.n for entry in entries] == list(range(1, len(entries) + 1)), "nothing was restarted"
    assert {(entry.attempt, entry.first_attempt) for entry in entries} == {(1, 1), (2, 1)}


N_DRAINS = 10
MOST_OPEN = 30


@pytest.mark.slow
async def test_of_many_drains_under_load_none_runs_a_job_twice(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "short", "step_s": 0.02, "reply": "and done"})
    loaded = slots(config, 4)

    async def load() -> None:
        for number in itertools.count():
            if await database.read(n_open) < MOST_OPEN:
                await submit("short", f"c{number % 20}")
            await asyncio.sleep(0.1)

    def n_open(connection: Connection) -> int:
        return len(connection.exec_driver_sql("SELECT id FROM jobs WHERE processed_at IS NULL").all())

    def statuses(connection: Connection) -> dict[int, str]:
        return dict(connection.exec_driver_sql("SELECT id, status FROM jobs").all())

    async def all_ended() -> bool:
        return await database.read(n_open) == 0

    n_interrupted = 0
    with structlog.testing.capture_logs() as lines:
        loading = asyncio.create_task(load())
        for _ in range(N_DRAINS):
            worker = Worker(loaded, local_engines(loaded, fake_engine.argv(script.path)))
            await worker.start()
            await eventually(partial(has_some, worker))
            n_interrupted += len(worker.dispatcher.running)
            await worker.drain(10)
        loading.cancel()
        async with working(loaded, script):
            await eventually(all_ended, within_s=120)
    assert await database.read(check.violations) == []
    assert n_interrupted >= N_DRAINS
    starts = Counter(line["job_id"] for line in lines if line["event"] == "attempt started")
    # From the record and not from the answers: the load ends where it stands, maybe between a commit and its answer.
    submitted = await database.read(statuses)
    assert starts == dict.fromkeys(submitted, 1), "a claim that came too late was given back before it ran"
    assert set(submitted.values()) == {"done"}


async def has_some(worker: Worker) -> bool:
    return bool(worker.dispatcher.running)


async def test_a_prompt_that_is_being_read_is_cancelled_as_well(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    # Steps of few tokens: reading takes half a minute, of which the cancel needs one step.
    script.write({"when": "long", "step_s": 0.3})
    async with working(config, script) as worker:
        job_id = await submit("long " * 400)
        await at_phase(worker, "prefill")
        assert await cancel(database, job_id) is Status.CANCELLED
        await idle(worker)
        assert (await ended(database, await submit("other"))).status == "done"
    job = await read(database, job_id)
    assert (job.status, job.partial, job.completion_tokens) == ("cancelled", None, 0)


async def test_a_cancel_is_heard_without_redis(
    config: Config, script: Script, submit: Submit, database: Database, absent_redis_url: str
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 1900})
    async with working(msgspec.structs.replace(config, redis_url=absent_redis_url), script) as worker:
        job_id = await submit("long")
        await at_phase(worker, "decode")
        await cancel(database, job_id)
        await idle(worker)
    assert (await read(database, job_id)).status == "cancelled"


async def test_a_job_is_cancelled_while_its_model_loads_and_the_load_serves_the_next(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"model": "m", "load_gate": str(gate)})
    with structlog.testing.capture_logs() as lines:
        async with working(config, script) as worker:
            job_id, next_id = await submit("x"), await submit("y")
            await at_phase(worker, "loading")
            await cancel(database, job_id)

            async def next_runs() -> bool:
                return (await read(database, next_id)).status == "processing"

            await eventually(next_runs)
            gate.touch()
            assert (await ended(database, next_id)).status == "done"
    assert (await read(database, job_id)).status == "cancelled"
    assert len([line for line in lines if line["event"] == "model loaded"]) == 1


async def test_a_load_that_fails_once_its_job_was_cancelled_is_no_unexpected_error(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"model": "m", "load_gate": str(gate), "cannot_load": "It is broken."})
    unexpected: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, details: unexpected.append(details))
    async with working(config, script) as worker:
        job_id = await submit("x")
        await at_phase(worker, "loading")
        await cancel(database, job_id)
        await idle(worker)
        gate.touch()

        async def has_failed() -> bool:
            return "m" in worker._pool.failures

        await eventually(has_failed)
    # A task that nobody asked for its end complains when it is thrown away.
    gc.collect()
    assert unexpected == []
    assert (await read(database, job_id)).status == "cancelled"


async def test_nothing_is_read_while_nothing_runs(
    config: Config, script: Script, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sweeper reads by itself, of all workers.
    looks: list[tuple[Any, ...]] = []
    held = leases.active_leases

    def counted(*args: Any) -> list[leases.ActiveLease]:
        looks.append(args[1:])
        return held(*args)

    monkeypatch.setattr("llamalith_app.store.jobs.leases.active_leases", counted)
    async with working(config, script, timings=msgspec.structs.replace(NO_POLL, lease_check_s=0.001)) as worker:
        ticks = 0
        pause = worker._pause

        async def tick(seconds: float) -> None:
            nonlocal ticks
            ticks += 1
            await pause(seconds)

        monkeypatch.setattr(worker, "_pause", tick)

        async def some_ticks() -> bool:
            return ticks > 20

        await eventually(some_ticks)
    assert [look for look in looks if look] == []


# Out of time


@pytest.mark.slow
async def test_a_job_that_runs_too_long_ends_as_timeout_keeps_what_was_written_and_is_not_tried_again(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 2000})
    async with working(config, script) as worker:
        await ended(database, await submit("warm up"))
        job = await ended(database, await submit("long", timeout_s=4))
        await idle(worker)
        assert (await ended(database, await submit("other", timeout_s=600))).status == "done"
    assert job.error is not None
    assert (job.status, job.error.kind, job.attempt, job.timeout_s) == ("error", "timeout", 1, 4)
    assert job.error.reason.startswith("It ran for ")
    assert job.error.reason.endswith(" s; timeout_s allowed 4.")
    assert job.partial is not None
    assert set(job.partial) == {"x"}
    assert [attempt[:2] for attempt in await attempts(database, job.id)] == [(1, "failed")]


async def test_the_time_of_loading_counts(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"model": "m", "load_gate": str(gate)})
    async with working(config, script):
        job = await ended(database, await submit("x", timeout_s=0.2))
        gate.touch()
    assert job.error is not None
    assert (job.error.kind, job.partial) == ("timeout", None)


async def test_a_worker_that_was_frozen_does_not_find_the_time_of_its_jobs_over(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "reply": "x"})
    async with working(config, script, timings=WorkerTimings(attempt=AttemptTimings(tick_s=0.05))) as worker:
        job_id = await submit("wait", timeout_s=1.5)
        await at_phase(worker, "loading")
        time.sleep(1.8)  # noqa: ASYNC251 - the loop stands still, as that of a stopped process does
        gate.touch()
        job = await ended(database, job_id)
    assert (job.status, job.result) == ("done", "x")


async def test_a_job_that_waits_too_long_ends_as_timeout_and_says_that_it_waited(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "wait", "gate": str(gate), "reply": "x"})
    async with working(config, script, timings=sweeping(sweep_s=0.05)) as worker:
        first = await submit("wait", "c")
        await at_phase(worker, "loading")
        late, last = await submit("late", "c", queue_timeout_s=0.1), await submit("last", "c")
        job = await ended(database, late)
        assert len(worker.dispatcher.running) == 1
        gate.touch()
        for job_id in (first, last):
            assert (await ended(database, job_id)).status == "done"
    assert job.error is not None
    assert (job.error.kind, job.attempt) == ("timeout", 0)
    assert job.error.reason.startswith("It waited ")
    assert job.error.reason.endswith(" s in the queue; queue_timeout_s allowed 0.1.")


# Races


@pytest.mark.slow
async def test_a_cancel_that_races_with_the_end_is_answered_with_what_the_record_says_for_ever(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_jobs = 300
    script.write({"when": "race", "reply": "abc"})
    answers: dict[int, Status | None] = {}
    cancels: list[asyncio.Task[None]] = []

    async def cancel_it(job_id: int) -> None:
        # A quarter each: in the first step, at the last one, some turns of the loop later, when it is over.
        if job_id % 4 == 2:
            for _ in range(job_id % 23):
                await asyncio.sleep(0)
        if job_id % 4 == 3:
            await ended_somehow(database, job_id)
        answers[job_id] = await cancel(database, job_id)

    take = RunningAttempt.take

    def take_and_race(running: RunningAttempt, step: Advance) -> list[Piece]:
        is_first = running.last_step is None
        pieces = take(running, step)
        job_id = running.claim.job_id
        if step.finish is not None if job_id % 4 else is_first:
            cancels.append(asyncio.create_task(cancel_it(job_id)))
        return pieces

    monkeypatch.setattr(RunningAttempt, "take", take_and_race)
    script.write({"when": "race", "reply": "abc" * 3})
    ids = [await submit("race " + "x" * 200, f"c{number % 50}") for number in range(n_jobs)]
    async with working(slots(config, 4), script):
        for job_id in ids:
            await ended_somehow(database, job_id)
        await asyncio.gather(*cancels)
    assert await database.read(check.violations) == []
    final = {job_id: await read(database, job_id) for job_id in ids}
    for job_id, answer in answers.items():
        assert final[job_id].status == answer
        assert (final[job_id].result is None) is (answer is Status.CANCELLED)
    assert set(answers.values()) == {Status.CANCELLED, Status.DONE}
    assert len(answers) == n_jobs


async def ended_somehow(database: Database, job_id: int) -> None:
    async def look() -> bool:
        return (await read(database, job_id)).status in ("done", "cancelled")

    await eventually(look, within_s=120)
