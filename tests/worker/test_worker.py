"""The worker over the real record, the real Valkey and a real engine child whose runner is the fake one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.parameters import JsonSchema, Parameters
from llamalith_app.jobs.queue import Hints, Timings
from llamalith_app.jobs.schemas import Fit, ReplyValidator
from llamalith_app.jobs.worker.attempt import AttemptTimings
from llamalith_app.jobs.worker.process import TIMINGS, Worker, WorkerTimings, local_engines
from llamalith_app.jobs.worker.run import run
from llamalith_app.jobs.worker.running import RunningAttempt
from llamalith_app.jobs.worker.settle import AttemptResult, Settler
from llamalith_app.jobs.worker.sweep import SweepBatches, Sweeper, hold_lock
from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import ModelSettings
from llamalith_app.store import conversation_list, conversations, retention, search, turns, workers
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import leases, reads, submission, transitions
from llamalith_app.store.migrate import migrate
from llamalith_app.store.record import record_id
from llamalith_app.store.tables import ConversationRow, Outcome
from llamalith_app.store.users import ADMIN_ID
from llamalith_app.streams import publisher, resume
from llamalith_app.streams.resume import ResumePoint, resume_point
from llamalith_app.streams.subscriber import history
from llamalith_app.supervise import valkey
from tests import fake_engine
from tests.settle import eventually
from tests.store.samples import prompt, register_worker
from tests.worker.conftest import (
    NO_POLL,
    OFTEN,
    Script,
    Submit,
    at_phase,
    attempts,
    ended,
    engine_pid,
    slots,
    sweeping,
    working,
    working_in_process,
)


async def test_a_job_is_found_without_any_hint(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "hello", "reply": " <think>hm</think> Hello to you.\n"})
    async with working_in_process(config, script):
        job = await ended(database, await submit("hello", "c"))
    assert (job.status, job.result, job.attempt) == ("done", "Hello to you.\n", 1)
    assert job.prompt_tokens == len("<user>hello</user>")
    assert job.finish_reason == "stop"
    assert job.started_at is not None
    assert job.processed_at is not None
    assert job.created_at <= job.started_at <= job.processed_at


@pytest.mark.parametrize(
    ("reply", "valid", "problem"),
    [
        ("[1, 2]", True, None),
        ("[1, 1]", False, "at #: [1,1] has non-unique elements"),
        ("[1", False, "is no JSON: Expecting ',' delimiter: line 1 column 3 (char 2)"),
    ],
)
async def test_a_whole_reply_is_validated_against_what_it_could_not_be_held_to(
    config: Config, script: Script, submit: Submit, database: Database, reply: str, valid: bool, problem: str | None
) -> None:
    sets = Parameters(response_format=JsonSchema(schema={"type": "array", "uniqueItems": True}))
    script.write({"when": "sets", "reply": reply})
    async with working_in_process(config, script):
        job = await ended(database, await submit("sets", parameters=sets, unenforced=("#/uniqueItems",)))
        other = await ended(database, await submit("sets", parameters=sets))
    assert (job.status, job.result) == ("done", reply)
    assert (job.unenforced, job.reply_valid, job.reply_problem) == (["#/uniqueItems"], valid, problem)
    assert (other.unenforced, other.reply_valid, other.reply_problem) == ([], None, None)


async def test_a_drain_does_not_wait_for_the_validation_of_a_whole_reply_and_keeps_it(
    config: Config, script: Script, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    validates = asyncio.Event()

    async def validate(validator: ReplyValidator, schema: Any, reply: str) -> Fit:
        validates.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(ReplyValidator, "validate", validate)
    sets = Parameters(response_format=JsonSchema(schema={"type": "array", "uniqueItems": True}))
    script.write({"when": "sets", "reply": "[]"})
    async with working_in_process(config, script, grace_s=0):
        job_id = await submit("sets", parameters=sets, unenforced=("#/uniqueItems",))
        await validates.wait()
    job = await ended(database, job_id)
    assert (job.status, job.result, job.attempt, job.reply_valid) == ("done", "[]", 1, None)
    assert job.reply_problem == "could not be validated: its worker was ending"


async def test_a_hint_starts_a_job_long_before_the_worker_polls(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    hints = Hints(config.redis_url, ("m", "n"), timeout_s=20)
    async with working_in_process(config, script, timings=NO_POLL):
        job_id = await submit("hello")
        hints.send("m", job_id)
        assert (await ended(database, job_id)).status == "done"
    await hints.close()


async def test_a_prompt_sees_the_turns_before_it_and_none_behind_it(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "one", "reply": "R1"}, {"when": "two", "refuse": "no"})
    ids = [
        await submit(content, "c", system_prompt="S", context=context)
        for content, context in (("one", ""), ("two", "unsent"), ("three", "so far"), ("four", ""))
    ]
    async with working(config, script):
        done = [await ended(database, job_id) for job_id in ids]
    assert [job.status for job in done] == ["done", "error", "done", "done"]
    third = "<system>S</system><user>one</user><assistant>R1</assistant><assistant>so far</assistant><user>three</user>"
    assert done[2].result == hashlib.sha256(third.encode()).hexdigest()
    stored = [m.content for m in await database.read(conversations.messages, ADMIN_ID, "c")]
    assert stored == [
        "S",
        "one",
        "R1",
        "unsent",
        "two",
        "so far",
        "three",
        done[2].result,
        "four",
        done[3].result,
    ]


async def test_conversations_run_beside_each_other_and_each_in_order(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 40})
    ids = [await submit(f"long {n}", conversation_id) for n in range(3) for conversation_id in "abc"]
    async with working_in_process(slots(config, 3), script):
        done = [await ended(database, job_id) for job_id in ids]
    spans = {
        name: sorted(
            (job.started_at, job.processed_at)
            for job in done
            if job.conversation_id == name and job.started_at and job.processed_at
        )
        for name in "abc"
    }
    for span in spans.values():
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(span))
    assert spans["a"][0][1] > spans["b"][0][0]
    assert spans["b"][0][1] > spans["a"][0][0]


async def test_a_refused_prompt_is_an_error_with_its_reason_and_is_not_tried_again(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "bad", "refuse": "Model exploded"})
    async with working_in_process(config, script):
        job = await ended(database, await submit("bad"))
    assert (job.status, job.result, job.attempt) == ("error", "Model exploded", 1)
    assert job.error is not None
    assert job.error.kind == "internal"


async def test_a_job_whose_engine_is_killed_runs_again_at_once(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    # Only the first poll finds the job; its second attempt does not wait for another poll.
    script.write({"when": "die", "signal": 9, "once": str(tmp_path / "died"), "reply": "Alive."})
    job_id = await submit("die")
    async with working(config, script, timings=NO_POLL):
        job = await ended(database, job_id)
    assert (job.status, job.result, job.attempt) == ("done", "Alive.", 2)
    (first, second) = await attempts(database, job.id)
    assert first[:2] == (1, "failed")
    assert "SIGKILL" in first[2]
    assert second == (2, "done", None)


async def test_jobs_of_a_model_that_no_worker_serves_are_logged_once(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    gone = await submit("x", model="gone")
    with structlog.testing.capture_logs() as lines:
        async with working_in_process(config, script, timings=sweeping(sweep_s=0.05)):
            assert (await ended(database, await submit("x", "other"))).status == "done"

            async def is_told() -> bool:
                return any("no worker serves" in line["event"] for line in lines)

            await eventually(is_told)
            assert (await ended(database, await submit("x", "other"))).status == "done"
    assert [line["model"] for line in lines if "no worker serves" in line["event"]] == ["gone"]
    assert await database.write(transitions.cancel, ADMIN_ID, gone, datetime.now(UTC)) == "cancelled"


async def test_a_reply_that_was_only_thinking_stays_empty_also_after_an_engine_died(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    thought = "let me think aloud about it</think>"
    dies = {"after": 20, "signal": 9, "once": str(tmp_path / "died")}
    script.write({"when": "die", "opens_thinking": True, "reply": thought, **dies})
    async with working_in_process(config, script):
        job = await ended(database, await submit("die"))
    assert (job.status, job.attempt, job.result, job.completion_tokens) == ("done", 2, "", len(thought))
    assert job.thinking == "let me think aloud about it"


@pytest.mark.slow
async def test_a_job_that_kills_each_engine_ends_as_error_after_three_attempts_and_others_go_on(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "poison", "signal": 11})
    async with working(config, script):
        poison = await submit("poison", "p")
        other = await submit("fine", "q")
        job = await ended(database, poison)
        assert (await ended(database, other)).status == "done"
    assert (job.status, job.attempt) == ("error", 3)
    assert job.error is not None
    assert job.error.kind == "engine_died"
    assert "SIGSEGV" in job.error.reason


async def test_a_job_whose_prompt_was_lost_with_a_process_beside_the_engine_is_tried_again(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "lost", "refuse": "It was ended.", "kind": "engine_died"}, {"when": "no", "refuse": "No."})
    async with working(config, script):
        lost, refused = [await ended(database, await submit(one, one)) for one in ("lost", "no")]
    assert [(job.status, job.attempt) for job in (lost, refused)] == [("error", 3), ("error", 1)]
    assert lost.error is not None
    assert (lost.error.kind, lost.error.reason) == ("engine_died", "It was ended.")


@pytest.mark.parametrize("written", ["<think>abc", "<think>abc</think>", "abc</think>", " <think> </think> "])
async def test_what_a_grammar_holds_is_the_reply_whole_where_a_model_does_not_think(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path, written: str
) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "x"*')
    off = msgspec.structs.replace(config.models[1], settings=ModelSettings(thinking="off"))
    config = msgspec.structs.replace(config, models=(config.models[0], off))
    script.write(
        {"model": "m", "family": ""},
        {"when": "held", "reply": written},
        {"when": "opened", "reply": written, "opens_thinking": True},
    )
    async with working_in_process(config, script):
        jobs_ended = [
            await ended(database, await submit(one, grammar_name="g", model=model))
            for model in ("m", "n")
            for one in ("held", "opened")
        ]
    assert [job.result for job in jobs_ended] == [written] * 4


async def test_a_grammar_holds_the_reply_behind_the_thinking(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "x"*')
    script.write(
        {"when": "held", "reply": "<think>hm</think>xx"},
        {"when": "opened", "reply": "hm</think>xx", "opens_thinking": True},
    )
    async with working_in_process(config, script):
        jobs_ended = [await ended(database, await submit(one, grammar_name="g")) for one in ("held", "opened")]
    assert [(job.thinking, job.result) for job in jobs_ended] == [("hm", "xx"), ("hm", "xx")]


@pytest.mark.parametrize(("setting", "result"), [("off", "<think>hm</think>Hi"), ("on", "Hi"), ("auto", "Hi")])
async def test_a_models_setting_says_whether_thinking_is_looked_for(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    setting: Literal["off", "on", "auto"],
    result: str,
) -> None:
    models = [msgspec.structs.replace(model, settings=ModelSettings(thinking=setting)) for model in config.models]
    script.write(
        {"model": "m", "family": "" if setting == "on" else "think"}, {"when": "go", "reply": "<think>hm</think>Hi"}
    )
    async with working_in_process(msgspec.structs.replace(config, models=tuple(models)), script):
        assert (await ended(database, await submit("go"))).result == result


async def test_what_was_written_before_the_last_engine_died_is_kept_with_the_error(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "late", "after": 3, "signal": 9, "reply": "abcdefghijklmnop"})
    async with working_in_process(config, script):
        job = await ended(database, await submit("late"))
    assert job.error is not None
    assert (job.status, job.error.kind) == ("error", "engine_died")
    assert job.partial
    assert "abcdefghijklmnop".startswith(job.partial)
    assert job.completion_tokens == len(job.partial)


async def test_what_an_attempt_before_the_last_had_written_is_kept_too(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    script.write({"when": "late", "after": 3, "signal": 9, "once": str(tmp_path / "died"), "reply": "abcdefghijklmnop"})

    async def and_refuse_next(*of: Any) -> Any:
        found = await resume_point(*of)
        script.write({"when": "late", "refuse": "It is broken."})
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resume, "resume_point", and_refuse_next)
        async with working_in_process(config, script):
            job = await ended(database, await submit("late", max_attempts=2))
    assert [outcome for _, outcome, _ in await attempts(database, job.id)] == ["failed", "failed"]
    assert job.partial
    assert "abcdefghijklmnop".startswith(job.partial)
    assert job.completion_tokens == len(job.partial)


async def test_what_an_attempt_had_written_is_had_of_a_redis_that_answers_late(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redis_timeout_s = 0.2
    timings = WorkerTimings(attempt=AttemptTimings(resume_timeout_s=20))
    found: list[ResumePoint | None] = []
    gate = tmp_path / "gate"
    script.write({"when": "late", "after": 3, "gate": str(gate), "reply": "abcdefghijklmnop"})
    async with Redis.from_url(config.redis_url) as redis:

        async def late(*of: Any) -> Any:
            await redis.client_pause(int(3000 * redis_timeout_s))
            found.append(await resume_point(*of))
            return found[-1]

        monkeypatch.setattr(resume, "resume_point", late)
        async with working(config, script, timings=timings, redis_timeout_s=redis_timeout_s) as worker:
            job_id = await submit("late")
            await eventually(partial(history, redis, record_id(database.path), job_id))
            os.kill(engine_pid(worker), signal.SIGKILL)
            gate.touch()
            job = await ended(database, job_id)
    assert (job.result, job.attempt) == ("abcdefghijklmnop", 2)
    assert [one is not None and one.text for one in found] in (["a"], ["ab"], ["abc"])


@pytest.mark.parametrize("end", ["engine dies", "drain"])
async def test_what_an_attempt_wrote_is_published_before_its_job_is_given_back(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    # Only the first text is published at once; without an end, the rest would wait for an hour.
    timings = msgspec.structs.replace(
        OFTEN, stream=publisher.Timings(coalesce_s=3600), attempt=AttemptTimings(publish_rest_s=20)
    )
    rest: dict[str, Any] = {"gate": str(tmp_path / "gate")}
    if end == "engine dies":
        rest = {"signal": 9, "once": str(tmp_path / "died")}
    script.write({"when": "late", "after": 3, "reply": "abcdefgh", **rest})
    settle, published = Settler.settle, []

    async with Redis.from_url(redis_url) as redis:

        async def and_look(settler: Settler, running: RunningAttempt, result: AttemptResult) -> None:
            entries = await history(redis, record_id(database.path), running.claim.job_id)
            published.append("".join(msgspec.json.decode(entry.data)["text"] for entry in entries))
            await settle(settler, running, result)

        monkeypatch.setattr(Settler, "settle", and_look)
        async with working_in_process(config, script, timings=timings, grace_s=0) as worker:
            job_id = await submit("late")
            if end == "engine dies":
                await ended(database, job_id)
            else:
                running = await at_phase(worker, "decode")

                async def is_at_the_gate() -> bool:
                    return running.completion_tokens == 3

                await eventually(is_at_the_gate)
    assert published[0] == "abc"
    (_, outcome, _), *_ = await attempts(database, job_id)
    assert outcome == ("failed" if end == "engine dies" else "released")


@contextlib.asynccontextmanager
async def hanging_redis(redis_url: str) -> AsyncIterator[None]:
    """A Redis that answers to nothing that writes, until the end of the block."""
    async with Redis.from_url(redis_url) as redis, Redis.from_url(redis_url, socket_timeout=None) as other:
        await redis.client_pause(3_600_000, all=False)
        writing = asyncio.ensure_future(other.set("any", 1))
        try:
            yield
            assert not writing.done()
        finally:
            await redis.client_unpause()
            await writing


async def test_a_reply_is_stored_while_redis_answers_nothing(
    config: Config, script: Script, submit: Submit, database: Database, redis_url: str
) -> None:
    timings = msgspec.structs.replace(OFTEN, attempt=AttemptTimings(publish_rest_s=3600))
    script.write({"when": "go", "reply": "done"})
    async with working_in_process(config, script, timings=timings), hanging_redis(redis_url):
        job = await ended(database, await submit("go"))
    assert (job.status, job.result) == ("done", "done")


async def test_a_job_is_given_back_while_redis_answers_nothing(
    config: Config, script: Script, submit: Submit, database: Database, redis_url: str, tmp_path: Path
) -> None:
    timings = msgspec.structs.replace(OFTEN, attempt=AttemptTimings(publish_rest_s=0.01, resume_timeout_s=0.01))
    script.write({"when": "go", "after": 3, "signal": 9, "once": str(tmp_path / "died"), "reply": "abcdefgh"})
    async with working_in_process(config, script, timings=timings), hanging_redis(redis_url):
        job = await ended(database, await submit("go"))
    assert (job.status, job.result, job.attempt) == ("done", "abcdefgh", 2)


async def test_a_model_that_cannot_be_loaded_is_named_and_other_models_go_on(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"model": "m", "cannot_load": "The file of model m (/x.gguf) is damaged."})
    async with working_in_process(config, script):
        job = await ended(database, await submit("x", model="m"))
        assert (await ended(database, await submit("x", model="n"))).status == "done"
    assert (job.status, job.attempt) == ("error", 3)
    assert job.error == msgspec.convert(
        {"kind": "model_unavailable", "reason": "The file of model m (/x.gguf) is damaged."}, type(job.error)
    )


async def test_the_log_says_why_a_model_could_not_be_loaded_and_nothing_that_a_template_says_of_a_prompt(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write(
        {"model": "m", "cannot_load": "The file of model m (/x.gguf) is damaged."},
        {"when": "Secret", "kind": "template", "refuse": "Who says Secret is refused."},
    )
    with structlog.testing.capture_logs() as lines:
        async with working_in_process(config, script):
            for model in "mn":
                await ended(database, await submit("Secret", model, model=model))
    failed = [(line["kind"], line.get("reason")) for line in lines if line["event"] == "attempt failed"]
    assert set(failed) == {("model_unavailable", "The file of model m (/x.gguf) is damaged."), ("template", None)}
    assert "Secret" not in str(lines)


@pytest.mark.slow
async def test_an_engine_that_dies_in_loading_names_the_model_and_the_file(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"model": "m", "load_signal": 6})
    async with working(config, script):
        job = await ended(database, await submit("x"))
    assert job.error is not None
    assert job.error.kind == "model_unavailable"
    assert "Model m (" in job.error.reason
    assert "m.gguf" in job.error.reason
    assert "SIGABRT" in job.error.reason


async def test_models_that_fit_together_are_loaded_once_each(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with working_in_process(config, script):
            ids = [await submit(f"{n}", model=model) for n, model in enumerate(["m", "m", "n", "m", "n"])]
            for job_id in ids:
                assert (await ended(database, job_id)).status == "done"
    loads = [line["model"] for line in lines if line["event"] == "model loaded"]
    assert sorted(loads) == ["m", "n"]


async def test_a_grammar_that_the_worker_does_not_have_is_an_error_of_that_job(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    async with working_in_process(config, script):
        job = await ended(database, await submit("x", grammar_name="gone"))
    assert job.error is not None
    assert job.error.kind == "grammar"


async def nothing(_: Worker) -> None:
    """In place of the worker's own sweep and poll: jobs start by hints alone."""


async def test_running_jobs_publish_their_progress_to_readers_and_to_saq(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Worker, "_sweep_and_poll", nothing)
    timings = WorkerTimings(queue=Timings(mirror_s=0.05), attempt=AttemptTimings(progress_s=0))
    gate, load_gate = tmp_path / "gate", tmp_path / "load_gate"
    script.write(
        {"model": "m", "load_gate": str(load_gate)},
        {"when": "long", "step_s": 0.01, "reply": "done", "gate": str(gate)},
    )
    hints = Hints(config.redis_url, ("m",), timeout_s=20)
    async with (
        Redis.from_url(config.redis_url) as redis,
        working_in_process(config, script, timings=timings),
    ):
        job_id = await submit("long" * 300)
        hints.send("m", job_id)

        async def told_progress() -> Progress | None:
            live = await redis.get(f"llamalith:progress:{record_id(database.path)}:{job_id}.1")
            return None if live is None else msgspec.json.decode(live, type=Progress)

        async def reads() -> bool:
            progress = await told_progress()
            return progress is not None and bool(progress.prompt_tokens_done)

        async def mirrored() -> bool:
            stored = await redis.get(f"saq:job:llamalith:m:j{job_id}.a1")
            if stored is None:
                return False
            job = msgspec.json.decode(stored)
            return (job.get("meta") or {}).get("job_id") == job_id and job["meta"]["phase"] == "prefill"

        loading = await eventually(told_progress)
        assert loading is not None
        assert loading.phase == "loading"
        load_gate.touch()
        await eventually(reads)
        await eventually(mirrored)
        gate.touch()
        assert (await ended(database, job_id)).status == "done"
    await hints.close()


async def test_a_task_of_saq_shows_the_job_that_others_run_already(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "long", "step_s": 0.01, "reply": "done", "gate": str(gate)})
    timings = msgspec.structs.replace(OFTEN, queue=Timings(mirror_s=0.05))
    hints = Hints(config.redis_url, ("m",), timeout_s=20)
    async with Redis.from_url(config.redis_url) as redis, working_in_process(config, script, timings=timings) as worker:
        first = await submit("long" * 300)
        await at_phase(worker, "prefill")
        waiting = await submit("hello", "other")

        async def mirrored() -> bool:
            hints.send("m", waiting)
            stored = await redis.get(f"saq:job:llamalith:m:j{waiting}.a1")
            return stored is not None and (msgspec.json.decode(stored).get("meta") or {}).get("job_id") == first

        await eventually(mirrored)
        gate.touch()
        assert (await ended(database, waiting)).status == "done"
    await hints.close()


@pytest.mark.slow
async def test_redis_may_be_wiped_at_any_moment(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 20})
    hints = Hints(config.redis_url, ("m",), timeout_s=20)
    async with Redis.from_url(config.redis_url) as redis, working(config, script):
        ids = []
        for number in range(5):
            ids.append(await submit(f"long {number}"))
            hints.send("m", ids[-1])
            await redis.flushall()
        wiping = asyncio.create_task(wipe(redis))
        done = [await ended(database, job_id) for job_id in ids]
        wiping.cancel()
    await hints.close()
    assert {job.status for job in done} == {"done"}
    assert {job.attempt for job in done} == {1}


async def wipe(redis: Redis) -> None:
    while True:
        await redis.flushall()
        await asyncio.sleep(0.05)


async def test_without_redis_a_job_starts_within_the_time_of_the_workers_own_poll(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    absent_redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    polled_at: list[datetime] = []
    poll = Worker._sweep_and_poll

    async def note_and_poll(worker: Worker) -> None:
        polled_at.append(datetime.now(UTC))
        await poll(worker)

    monkeypatch.setattr(Worker, "_sweep_and_poll", note_and_poll)
    without_redis = msgspec.structs.replace(config, redis_url=absent_redis_url)
    async with working_in_process(without_redis, script, timings=TIMINGS):
        await ended(database, await submit("warm up"))
        job_id = await submit("x")
        submitted_at = datetime.now(UTC)
        job = await ended(database, job_id)
    assert job.started_at is not None
    assert sum(submitted_at < at < job.started_at for at in polled_at) <= 1, "the first poll finds it"


async def test_a_drain_lets_a_short_job_end(config: Config, script: Script, submit: Submit, database: Database) -> None:
    script.write({"when": "short", "step_s": 0.01, "reply": "x" * 30})
    async with working_in_process(config, script) as worker:
        job_id = await submit("short")
        waiting = await submit("later")
        await eventually(lambda: running(worker))
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    assert (job.status, job.attempt) == ("done", 1)
    left = await database.read(reads.job_by_id, ADMIN_ID, waiting)
    assert left is not None
    assert (left.status, left.attempt) == ("queued", 0)


async def running(worker: object) -> bool:
    return bool(worker.dispatcher.running)  # type: ignore[attr-defined]


async def test_a_drain_gives_back_a_job_that_does_not_fit_without_spending_an_attempt(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.02, "reply": "x" * 2000})
    async with working(config, script, grace_s=0.1) as worker:
        job_id = await submit("long", max_attempts=1)
        await eventually(lambda: running(worker))
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    assert job.status == "queued"
    script.write()
    async with working(config, script):
        assert (await ended(database, job_id)).status == "done"
    assert [attempt[1] for attempt in await attempts(database, job_id)] == ["released", "done"]


async def test_a_lease_that_another_took_stops_the_run_and_writes_nothing(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.02, "reply": "x" * 2000})
    async with working_in_process(config, script, timings=WorkerTimings(lease_check_s=0.02)) as worker:
        job_id = await submit("long")
        await eventually(lambda: running(worker))
        (lease,) = await database.read(leases.active_leases)
        await database.write(
            transitions.fail,
            job_id,
            lease.lease_token,
            datetime.now(UTC),
            outcome=Outcome.LOST,
            kind="worker_lost",
            reason="Taken away.",
            pause=None,
        )

        async def stopped() -> bool:
            return not worker.dispatcher.running

        await eventually(stopped)
        assert (await ended(database, await submit("next"))).status == "done"
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    assert (job.status, job.result, job.partial) == ("error", "Taken away.", None)


async def test_the_jobs_of_a_worker_that_is_gone_from_this_machine_run_again_at_once(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    lock_path = tmp_path / "gone.lock"
    hold_lock(lock_path).close()
    gone = await database.write(register_worker, str(lock_path))
    job_id = await submit("left behind")
    assert await database.write(transitions.claim, "m", 1, gone, datetime.now(UTC))
    async with working_in_process(config, script):
        job = await ended(database, job_id)
    assert (job.status, job.attempt) == ("done", 2)
    assert [sibling.id for sibling in await database.read(workers.not_ended)] == []
    assert (await attempts(database, job_id))[0][:2] == (1, "lost")


@pytest.mark.slow
async def test_the_jobs_of_a_worker_whose_heartbeat_does_not_move_run_again(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    frozen = await database.write(register_worker, str(tmp_path / "on another machine"))
    job_id = await submit("left behind")
    claim = await database.write(transitions.claim, "m", 1, frozen, datetime.now(UTC))
    assert claim is not None
    async with working_in_process(config, script, timings=sweeping(sweep_s=0.02, stale_s=0.3)):
        job = await ended(database, job_id)
    assert (job.status, job.attempt) == ("done", 2)
    assert claim.lease_token not in {lease.lease_token for lease in await database.read(leases.active_leases)}


async def test_a_worker_that_was_frozen_itself_takes_no_lease_for_the_time_it_was_away(
    submit: Submit, database: Database, tmp_path: Path
) -> None:
    clock = 0.0
    with hold_lock(tmp_path / "others"), hold_lock(tmp_path / "mine"):
        other = await database.write(register_worker, str(tmp_path / "others"))
        mine = await database.write(register_worker, str(tmp_path / "mine"))
        job_id = await submit("runs on")
        claim = await database.write(transitions.claim, "m", 1, other, datetime.now(UTC))
        assert claim is not None
        sweeper = Sweeper(database, mine, set, lambda _: None, lambda: "[]", clock=lambda: clock)

        async def status_after(seconds: float) -> str:
            nonlocal clock
            clock += seconds
            await sweeper.sweep()
            job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
            assert job is not None
            return job.status

        assert [await status_after(s) for s in (2, 2, 600)] == ["processing"] * 3
        await database.write(leases.heartbeat, [claim.lease_token])
        assert [await status_after(2) for _ in range(6)] == ["processing"] * 5 + ["queued"]


async def test_a_sweep_indexes_the_words_of_new_messages(submit: Submit, database: Database, tmp_path: Path) -> None:
    with hold_lock(tmp_path / "mine"):
        mine = await database.write(register_worker, str(tmp_path / "mine"))
        await submit("new words")
        assert await database.read(search.is_behind)
        await Sweeper(database, mine, set, lambda _: None, lambda: "[]").sweep()
        assert not await database.read(search.is_behind)


async def test_a_conversation_that_cannot_be_read_now_costs_its_job_no_attempt(
    config: Config, script: Script, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, n_read = turns.read_turn, 0

    def once_unreadable(*of: Any) -> turns.Turn:
        nonlocal n_read
        n_read += 1
        if n_read == 1:
            raise OperationalError("SELECT", None, sqlite3.OperationalError("unable to open database file"))
        return turn(*of)

    monkeypatch.setattr(turns, "read_turn", once_unreadable)
    async with working_in_process(config, script):
        job = await ended(database, await submit("x", max_attempts=1))
    assert (job.status, n_read) == ("done", 2)


async def test_a_folder_for_states_that_cannot_be_made_costs_no_job(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    (config.data_dir / "states").write_text("a file")
    async with working(config, script):
        assert (await ended(database, await submit("x", max_attempts=1))).status == "done"


async def test_what_ended_longer_ago_than_it_is_kept_goes_step_by_step(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    before = datetime.now(UTC) - timedelta(days=3)
    for conversation in ("a", "b"):
        await database.write(transitions.cancel, ADMIN_ID, await submit("old", conversation), before)
    await database.write(lambda connection: connection.execute(update(ConversationRow).values(created_at=before)))
    alone = prompt("", "alone", system_prompt="be kind")
    for public_id, at in (("left", before), ("alone", datetime.now(UTC))):
        await database.write(submission.submit, alone._replace(conversation_id=public_id), at)
    config = msgspec.structs.replace(config, retention_days=2.5)

    async def are_gone() -> bool:
        found = await database.read(conversation_list.listed, ADMIN_ID, Filter(), limit=9)
        return [conversation.public_id for conversation in found] == ["alone"]

    with structlog.testing.capture_logs() as lines:
        async with working_in_process(
            config, script, timings=sweeping(sweep_s=0.02), batches=SweepBatches(expired_jobs=1, conversations=1)
        ):
            await eventually(are_gone)
            young = await submit("young", "a")
            assert (await ended(database, young)).status == "done"
    assert [line["n_jobs"] for line in lines if line["event"] == "jobs expired"] == [1, 1]
    assert [job.id for job in await database.read(reads.newest, ADMIN_ID, limit=9)] == [young]


async def test_nothing_expires_where_nothing_says_so(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    old = await submit("old")
    await database.write(transitions.cancel, ADMIN_ID, old, datetime(1999, 1, 1, tzinfo=UTC))
    async with working_in_process(config, script, timings=sweeping(sweep_s=0.02)):
        await ended(database, await submit("young"))
    assert await database.read(retention.has_expired_jobs, datetime(2000, 1, 1, tzinfo=UTC))


@pytest.mark.slow
async def test_a_worker_with_a_heartbeat_keeps_its_lease_however_long_its_job_takes(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"when": "long", "step_s": 0.02, "reply": "x" * 60})
    timings = sweeping(sweep_s=0.02, heartbeat_s=0.05, stale_s=0.4)
    async with working_in_process(config, script, timings=timings), working_in_process(config, script, timings=timings):
        job = await ended(database, await submit("long"))
    assert (job.status, job.attempt) == ("done", 1)


async def test_an_idle_engine_that_dies_costs_no_job_an_attempt(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    async with working(config, script) as worker:
        await ended(database, await submit("first"))
        engine = worker._pool.pooled["m"].engine
        assert engine is not None
        os.kill(engine_pid(worker), signal.SIGKILL)
        await engine.died.wait()
        job = await ended(database, await submit("second"))
    assert (job.status, job.attempt) == ("done", 1)


@pytest.mark.slow
async def test_nothing_that_people_or_models_wrote_is_logged(
    config: Config, script: Script, submit: Submit, database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    script.write(
        {"when": "canary-good", "reply": "canary-reply"},
        {"when": "canary-bad", "refuse": "canary-refusal"},
        {"when": "canary-die", "signal": 9},
    )
    with structlog.testing.capture_logs() as lines:
        async with working(config, script):
            for content in ("canary-good", "canary-bad", "canary-die"):
                await ended(database, await submit(content, f"canary-id-{content}", system_prompt="canary-s"))
    assert len(lines) > 8
    assert "canary" not in repr(lines) + "".join(capfd.readouterr())
    assert {line["request_id"] for line in lines if line["event"] == "attempt started"} == {"r"}


async def test_a_claim_that_nobody_runs_is_given_back_by_the_worker_that_made_it(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    async with working_in_process(config, script, timings=sweeping(sweep_s=0.02, stale_s=0.3)) as worker:
        worker.dispatcher.draining.set()
        job_id = await submit("claimed and dropped")
        assert await database.write(transitions.claim, "m", 1, worker.id, datetime.now(UTC))
        worker.dispatcher.draining.clear()
        job = await ended(database, job_id)
    assert (job.status, job.attempt) == ("done", 2)


async def test_a_drain_ends_also_while_redis_is_away_in_the_middle_of_a_hinted_job(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    valkey_process = await asyncio.create_subprocess_exec(
        *valkey.argv(valkey.find_binary(), folder=folder, socket=folder / "s"), stdout=asyncio.subprocess.DEVNULL
    )
    await eventually(lambda: valkey.answers(folder / "s"))
    script.write({"when": "short", "step_s": 0.02, "reply": "x" * 40})
    hints = Hints(f"unix://{folder}/s", ("m",), timeout_s=20)
    own = msgspec.structs.replace(config, redis_url=f"unix://{folder}/s")
    async with working_in_process(own, script) as worker:
        job_id = await submit("short")
        hints.send("m", job_id)
        await eventually(lambda: running(worker))
        valkey_process.kill()
        await valkey_process.wait()
    await hints.close()
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    assert (job.status, job.attempt) == ("done", 1)


@pytest.mark.slow
async def test_a_drain_gives_back_a_job_whose_engine_is_still_loading(
    config: Config, script: Script, submit: Submit, database: Database
) -> None:
    script.write({"model": "m", "load_gate": "/nonexistent/never"})
    async with working(config, script, grace_s=0.1) as worker:
        job_id = await submit("x", max_attempts=1)
        await eventually(lambda: running(worker))
    job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
    assert job is not None
    assert job.status == "queued"
    assert [attempt[1] for attempt in await attempts(database, job_id)] == ["released"]
    assert await database.read(workers.not_ended) == []


async def waits_for_the_database(lines: Sequence[Mapping[str, Any]]) -> bool:
    return "a worker waits for the database" in [line["event"] for line in lines]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As by one that was stopped in the middle of a write, and lives."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


async def test_a_worker_that_starts_while_the_database_takes_no_writes_waits(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    database_path: Path,
) -> None:
    job_id = await submit("x")
    worker = Worker(
        config, local_engines(config, fake_engine.argv(script.path)), timings=WorkerTimings(lock_deadline_s=0.05)
    )
    with structlog.testing.capture_logs() as lines, locked(database_path):
        assert not migrate(database_path)
        starting = asyncio.create_task(worker.start())
        await eventually(partial(waits_for_the_database, lines))
    await starting
    assert (await ended(database, job_id)).status == "done"
    await worker.drain(5)


async def test_a_worker_under_up_takes_every_sigterm_for_the_same_one(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    script.write({"when": "wait", "gate": str(tmp_path / "gate"), "reply": "whole"})
    job_id = await submit("wait")
    engines = local_engines(config, fake_engine.argv(script.path))
    with structlog.testing.capture_logs() as lines:

        async def logs(event: str) -> bool:
            return any(line["event"] == event for line in lines)

        running = asyncio.create_task(run(config, grace_s=20, engines=engines, supervised=True))
        await eventually(partial(logs, "attempt started"))
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(partial(logs, "draining"))
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "gate").touch()
        await running
    assert (await ended(database, job_id)).result == "whole"


async def test_a_worker_whose_up_has_died_gives_its_jobs_back_when_the_next_up_asks_for_its_place(
    config: Config, script: Script, submit: Submit, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write({"when": "long", "step_s": 0.01, "reply": "x" * 100_000})
    job_id = await submit("long")
    engines = local_engines(config, fake_engine.argv(script.path))
    with structlog.testing.capture_logs() as lines:

        async def logs(event: str) -> bool:
            return any(line["event"] == event for line in lines)

        running = asyncio.create_task(run(config, grace_s=600, engines=engines, supervised=True))
        await eventually(partial(logs, "attempt started"))
        os.kill(os.getpid(), signal.SIGTERM)
        await eventually(partial(logs, "draining"))
        monkeypatch.setattr(os, "getppid", lambda: 0)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 20)
    assert [outcome for _, outcome, _ in await attempts(database, job_id)] == ["released"]


async def test_a_hangup_drains_a_worker_and_is_no_second_signal(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    script.write({"when": "wait", "gate": str(tmp_path / "gate"), "reply": "whole"})
    job_id = await submit("wait")
    with structlog.testing.capture_logs() as lines:

        async def logs(event: str) -> bool:
            return any(line["event"] == event for line in lines)

        running = asyncio.create_task(
            run(config, grace_s=20, engines=local_engines(config, fake_engine.argv(script.path)))
        )
        await eventually(partial(logs, "attempt started"))
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(partial(logs, "draining"))
        # As systemd sends them with SendSIGHUP, in either order.
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        (tmp_path / "gate").touch()
        await running
    assert (await ended(database, job_id)).result == "whole"


async def test_a_worker_that_waits_for_the_database_ends_when_it_is_stopped(
    config: Config, script: Script, database_path: Path
) -> None:
    with structlog.testing.capture_logs() as lines, locked(database_path):
        running = asyncio.create_task(
            run(
                config,
                grace_s=5,
                engines=local_engines(config, fake_engine.argv(script.path)),
                timings=WorkerTimings(lock_deadline_s=0.05),
            )
        )
        await eventually(partial(waits_for_the_database, lines))
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 5)
    assert lines[-1]["event"] == "worker ended before it was ready"


async def test_a_drain_ends_while_the_database_takes_no_writes_and_the_next_worker_goes_on(
    config: Config,
    script: Script,
    submit: Submit,
    database: Database,
    database_path: Path,
) -> None:
    script.write({"when": "long", "step_s": 0.02, "reply": "x" * 2000})
    # Before the worker writes too: this one waits no longer for the lock than it does.
    job_id = await submit("long", max_attempts=1)
    with ExitStack() as until_it_has_ended:
        async with working(
            config, script, grace_s=0.1, timings=WorkerTimings(give_back_s=0.2, lock_deadline_s=0.05)
        ) as worker:
            await eventually(lambda: running(worker))
            until_it_has_ended.enter_context(locked(database_path))
    script.write()
    async with working(config, script):

        async def open_again() -> bool:
            job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
            return job is not None and job.status != "processing"

        await eventually(open_again)


async def test_the_record_knows_how_far_an_attempt_came_while_it_still_runs(
    config: Config, script: Script, submit: Submit, database: Database, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script.write({"when": "held", "after": 3, "gate": str(gate), "reply": "abcdefgh"})
    async with working_in_process(config, script, timings=sweeping(heartbeat_s=0.02)):
        job_id = await submit("held")

        async def is_known() -> bool:
            job = await database.read(reads.job_by_id, ADMIN_ID, job_id)
            return job is not None and job.status == "processing" and job.first_token_at is not None

        await eventually(is_known)
        gate.touch()
        job = await ended(database, job_id)
    assert job.loaded_at is not None
    assert job.prompt_read_at is not None
    assert job.loaded_at <= job.prompt_read_at
