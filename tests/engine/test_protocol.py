"""What the worker may expect of every engine: the same tests on the child with the fake runner, and on the engine that
is no process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llamalith_app.engine.client.factory import LocalEngines
from llamalith_app.engine.client.protocol import (
    Engine,
    EngineDied,
    EngineFactory,
    EngineLimits,
    EngineLoadFailed,
    EngineRefused,
)
from llamalith_app.engine.messages import PromptFormat
from llamalith_app.settings.config import ModelConfig
from llamalith_app.settings.declaration import ModelSettings
from tests import fake_engine
from tests.engine.conftest import run, submit
from tests.gguf import write
from tests.in_process_engine import InProcessEngines

BUDGET = 2**40
LONG = "long " * 200


class Kind(NamedTuple):
    factory: EngineFactory
    model: ModelConfig
    set_script: Callable[..., None]


@pytest.fixture(params=["child", "in this process"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    script = tmp_path / "script.json"

    def set_script(*rules: dict[str, Any]) -> None:
        script.write_text(json.dumps(rules))

    set_script()
    argv = fake_engine.argv(script)
    factory: EngineFactory = LocalEngines(argv=argv) if request.param == "child" else InProcessEngines(script)
    settings = ModelSettings(n_ctx=2048, n_slots=2)
    return Kind(factory, ModelConfig(name="m", path=write(tmp_path / "m.gguf"), settings=settings), set_script)


async def start(kind: Kind, progress: Callable[[float], None] = lambda _: None) -> Engine:
    return await kind.factory.start(kind.model, kind.factory.plan(kind.model, BUDGET), progress)


@pytest.fixture
async def engine(kind: Kind) -> AsyncIterator[Engine]:
    engine = await start(kind)
    yield engine
    await engine.stop()


async def test_a_load_reports_its_progress_and_what_the_model_can_hold(kind: Kind) -> None:
    seen: list[float] = []
    engine = await start(kind, seen.append)
    assert seen[-1] == 1.0
    assert engine.limits == EngineLimits(
        n_ctx=2048, n_slots=2, family="think", format=PromptFormat(source="file", system="own")
    )
    assert engine.load_s >= 0
    assert not engine.died.is_set()
    await engine.stop()


async def test_a_file_that_is_none_is_a_problem_of_the_plan(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF damaged")
    plan = kind.factory.plan(kind.model, BUDGET)
    assert plan.problem.startswith(f"The model file {tmp_path / 'm.gguf'} is a GGUF of version")
    assert (plan.n_slots, plan.is_refused) == (1, True)


async def test_a_model_that_is_no_file_is_refused_with_the_reason(kind: Kind) -> None:
    plan = kind.factory.plan(ModelConfig(name="elsewhere"), BUDGET)
    assert (plan.problem, plan.is_refused) == ("It has no file.", True)


@pytest.mark.parametrize("rule", [{"cannot_load": "It is broken."}, {"load_signal": 6}])
async def test_a_load_that_fails_says_why(kind: Kind, rule: dict[str, Any]) -> None:
    kind.set_script({"model": "m", **rule})
    reason = r"^Model m \(.*m.gguf\) could not be loaded. The engine was ended by SIGABRT"
    with pytest.raises(EngineLoadFailed, match=rule.get("cannot_load", reason)):
        await start(kind)


async def test_a_load_that_is_cancelled_leaves_nothing_behind_and_another_succeeds(kind: Kind, tmp_path: Path) -> None:
    kind.set_script({"model": "m", "load_gate": str(tmp_path / "never")})
    loading = asyncio.create_task(start(kind))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    kind.set_script()
    await (await start(kind)).stop()


async def test_the_steps_of_a_run_come_to_the_reply_and_the_last_has_its_finish(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "hello", "reply": "Grüße 🐉"})
    reply = await run(engine, submit("hello", max_tokens=100))
    assert (reply.text, bytes(reply.tokens).decode(), reply.finish) == ("Grüße 🐉", "Grüße 🐉", "stop")
    assert {step.finish for step in reply.advances[:-1]} == {None}
    assert {step.prompt_tokens for step in reply.advances} == {len("<user>hello</user>")}


async def test_the_progress_of_a_long_prompt_rises_to_its_end(kind: Kind, engine: Engine) -> None:
    done = [step.prompt_done for step in (await run(engine, submit(LONG, max_tokens=1))).advances]
    assert len(set(done)) >= 3
    assert done == sorted(done)
    assert done[-1] == len(f"<user>{LONG}</user>")


async def test_where_the_script_says_nothing_the_reply_is_made_of_the_whole_prompt(kind: Kind, engine: Engine) -> None:
    reply = await run(engine, submit("Hi", max_tokens=100))
    assert reply.text == hashlib.sha256(b"<user>Hi</user>").hexdigest()


async def test_a_reply_ends_at_its_bounds(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "hello", "reply": "one two three"})
    shortened = await run(engine, submit("hello", max_tokens=5))
    assert (shortened.text, shortened.finish, len(shortened.tokens)) == ("one t", "length", 5)
    stopped = await run(engine, submit("hello", stop=["never", "wo th"], max_tokens=100))
    assert (stopped.text, stopped.finish) == ("one t", "stop")


async def test_a_reply_continues_what_was_written_and_reports_that_with_its_first_tokens(
    kind: Kind, engine: Engine
) -> None:
    kind.set_script({"when": "hello", "reply": "one two"}, {"when": "new", "reply": "one two", "goes_on": False})
    for prompt in ("hello", "new"):
        request = submit(prompt, max_tokens=100)
        request.written.extend(b"one")
        reply = await run(engine, request)
        assert (reply.text, bytes(reply.tokens)) == ("one two", b"one two")
        first = next(step for step in reply.advances if step.tokens)
        assert bytes(first.tokens) == (b"one " if prompt == "hello" else b"o")
        assert reply.advances[-1].prompt_tokens == len(f"<user>{prompt}</user>")


async def test_a_refusal_ends_its_run_only(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "bad", "refuse": "No.", "kind": "grammar"})
    with pytest.raises(EngineRefused, match=r"^No\.$") as refused:
        await run(engine, submit("bad"))
    assert refused.value.kind == "grammar"
    assert (await run(engine, submit("good"))).text


async def test_a_cancel_ends_a_run_in_prefill_and_in_decode_and_is_nothing_for_one_that_has_ended(
    kind: Kind, engine: Engine
) -> None:
    kind.set_script({"when": "count", "reply": "0123456789" * 150, "step_s": 0.001})
    for prompt, is_reached in (
        ("count", lambda step: bool(step.tokens)),
        (f"{LONG} count", lambda step: 0 < step.prompt_done < step.prompt_tokens),
    ):
        request = submit(prompt, max_tokens=2000)
        steps = []
        async for step in engine.run(request):
            steps.append(step)
            if is_reached(step):
                engine.cancel(request.sequence_id)
        assert steps[-1].finish == "cancelled"
        assert len(steps) < 1000
        engine.cancel(request.sequence_id)
    assert (await run(engine, submit("other"))).finish == "length"


async def test_a_run_that_nobody_reads_any_more_gives_its_slot_to_the_next(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "count", "reply": "0123456789" * 150, "step_s": 0.001})
    for _ in range(3):
        async with aclosing(engine.run(submit("count", max_tokens=2000))) as steps:
            await anext(steps)
    assert (await run(engine, submit("other"))).text


async def test_a_cancel_goes_past_a_prompt_that_is_hard_to_prepare(kind: Kind, engine: Engine, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    kind.set_script({"when": "hard", "prepare_gate": str(gate)})
    request = submit("hard")
    waiting = asyncio.create_task(run(engine, request))
    await asyncio.sleep(0)
    engine.cancel(request.sequence_id)
    assert (await waiting).finish == "cancelled"
    gate.touch()
    assert (await run(engine, submit("other"))).text


async def test_as_many_runs_as_slots_go_on_side_by_side(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "count", "reply": "0123456789" * 150, "step_s": 0.001})
    endless = [submit("count", max_tokens=2000) for _ in range(2)]
    async with aclosing(engine.run(endless[0])) as first, aclosing(engine.run(endless[1])) as second:
        steps = [await anext(first), await anext(second)]
        third = asyncio.create_task(run(engine, submit("other")))
        steps += [step for _ in range(50) for step in (await anext(first), await anext(second))]
        assert all(step.finish is None for step in steps)
        assert not third.done()
    assert (await third).text


async def test_a_death_ends_every_run_at_once_and_refuses_the_next(kind: Kind, engine: Engine) -> None:
    kind.set_script(
        {"when": "die", "after": 1, "signal": signal.SIGSEGV.value},
        {"when": "other", "reply": "x" * 1900, "step_s": 0.01},
    )
    other = asyncio.create_task(run(engine, submit("other", max_tokens=2000)))
    for request in (submit("die"), submit("more")):
        with pytest.raises(EngineDied, match="SIGSEGV"):
            await run(engine, request)
    with pytest.raises(EngineDied, match="SIGSEGV"):
        await other
    assert engine.died.is_set()
    engine.cancel(1)
    engine.watch(1e9)


async def test_a_stop_ends_what_still_runs(kind: Kind, engine: Engine) -> None:
    kind.set_script({"when": "other", "reply": "x" * 1900, "step_s": 0.01})
    other = asyncio.create_task(run(engine, submit("other", max_tokens=2000)))
    await asyncio.sleep(0)
    await engine.stop()
    assert engine.died.is_set()
    with pytest.raises(EngineDied):
        await other
