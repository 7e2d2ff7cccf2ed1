"""What every engine does: the same tests on the fake runner's child and on the real one with its model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llamalith_app.engine.client.local import LocalEngine
from llamalith_app.engine.client.protocol import EngineRefused
from llamalith_app.engine.messages import ChatMessage, Submit
from tests.engine.conftest import LAZY_DOG, Script, run, started, submit
from tests.settle import eventually

Start = Callable[..., AbstractAsyncContextManager[LocalEngine]]

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about a fox.",
    "List three fruits.",
    "How do planes fly? " * 20,
    "Name a colour.",
]
DROWSY_DOG = "The slow brown fox walks around the drowsy dog. "
COUNT = "Count for ever."
FAKE_RULES: list[dict[str, Any]] = [
    {"when": COUNT, "reply": "0123456789" * 400, "step_s": 0.002},
    {"when": "lazy dog", "step_s": 0.002},
    {"when": "drowsy dog", "step_s": 0.05},
]


class Kind(NamedTuple):
    start: Start
    n_chars_a_token: int
    """Of LAZY_DOG, about."""


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest, script: Script) -> Kind:
    argv = script(*FAKE_RULES) if request.param == "fake" else None

    def start(**changed: Any) -> AbstractAsyncContextManager[LocalEngine]:
        return started(argv, **changed)

    return Kind(start, 1 if request.param == "fake" else 4)


@pytest.fixture
def start(kind: Kind) -> Start:
    return kind.start


def turn(prompt: str, reply: str) -> list[ChatMessage]:
    return [ChatMessage("user", prompt), ChatMessage("assistant", reply)]


def counting(max_tokens: int = 100_000) -> Submit:
    """Does not end by itself: the real model is bound by the grammar, the fake one by its rule."""
    return submit(COUNT, max_tokens=max_tokens, grammar="root ::= [0-9] root")


async def test_a_sequence_gets_the_same_reply_alone_and_beside_others(start: Start) -> None:
    async with start(n_slots=4) as engine:
        alone = [(await run(engine, submit(prompt))).text for prompt in PROMPTS]
    async with start(n_slots=4) as engine:
        together = await asyncio.gather(*(run(engine, submit(prompt)) for prompt in PROMPTS))
    assert all(alone)
    assert [reply.text for reply in together] == alone


async def test_what_stands_in_a_slot_is_not_read_again(start: Start) -> None:
    async with start() as engine:
        cold = await run(engine, submit(PROMPTS[3]))
        warm = await run(engine, submit(PROMPTS[3]))
    n_prompt = cold.advances[-1].prompt_tokens
    assert {advance.prompt_reused for advance in cold.advances} == {0}
    assert {advance.prompt_reused for advance in warm.advances} == {n_prompt - 1}
    assert warm.advances[0].prompt_done == n_prompt


async def test_a_prefix_that_another_sequence_reads_just_now_is_read_once(start: Start) -> None:
    head = LAZY_DOG * 20
    async with start(n_slots=4) as engine:
        replies = await asyncio.gather(*(run(engine, submit(f"{head}{number}")) for number in range(4)))
    # Prompts are prepared side by side: any of them may come first.
    first, *others = sorted((reply.advances[-1] for reply in replies), key=lambda advance: advance.prompt_reused)
    assert first.prompt_reused == 0
    assert all(one.prompt_tokens - one.prompt_reused < first.prompt_tokens / 4 for one in others)


@pytest.mark.slow
async def test_a_state_comes_back_from_disk_after_the_engine_was_ended(start: Start, tmp_path: Path) -> None:
    kept = {"state_dir": str(tmp_path / "states"), "state_max_bytes": 1 << 30, "n_ctx": 8192}
    prompt = DROWSY_DOG * 80
    async with start(**kept) as engine:
        first = await run(engine, submit(prompt))
    async with start(**kept) as engine:
        # So that it knows its speed: else it waits for the disk no longer than a fixed second.
        await run(engine, submit(DROWSY_DOG, max_tokens=1))
        second = await run(engine, submit([*turn(prompt, first.text), ChatMessage("user", "And now?")]))
    assert second.text
    assert second.advances[-1].prompt_reused > 0.9 * first.advances[-1].prompt_tokens


@pytest.mark.slow
async def test_a_state_is_kept_when_another_conversation_takes_the_slot(start: Start, tmp_path: Path) -> None:
    states = tmp_path / "states"
    kept = {"state_dir": str(states), "state_max_bytes": 1 << 30, "n_ctx": 8192, "n_chunk": 64}

    async def kept_state() -> Path | None:
        return next(states.glob("*.state"), None)

    # Both are slow to read: what computing takes is how long the disk is waited for.
    prompt, other = DROWSY_DOG * 80, "Something else. " * 60 + DROWSY_DOG
    async with start(**kept) as engine:
        first = await run(engine, submit(prompt, max_tokens=1))
        await run(engine, submit(other, max_tokens=1))
        await eventually(kept_state)
        again = await run(engine, submit([*turn(prompt, first.text), ChatMessage("user", "And now?")], max_tokens=1))
    assert again.advances[-1].prompt_reused > 0.9 * first.advances[-1].prompt_tokens


async def test_a_cancelled_run_ends_with_that_finish_and_gives_its_slot_to_the_next(start: Start) -> None:
    async with start() as engine:
        endless = counting()
        steps = engine.run(endless)
        await anext(steps)
        waiting = asyncio.create_task(run(engine, submit(PROMPTS[0])))
        engine.cancel(endless.sequence_id)
        rest = [advance.finish async for advance in steps]
        assert rest[-1] == "cancelled"
        assert (await waiting).text


async def test_a_cancel_in_prefill_takes_effect_before_the_prompt_is_read(kind: Kind) -> None:
    async with kind.start(n_ctx=8192, n_chunk=16) as engine:
        # Some ten seconds of reading, of which only the first step is waited for.
        long = submit(DROWSY_DOG * (7000 * kind.n_chars_a_token // len(DROWSY_DOG)))
        advances = []
        async for advance in engine.run(long):
            advances.append(advance)
            engine.cancel(long.sequence_id)
        assert advances[-1].finish == "cancelled"
        assert advances[-1].prompt_done < advances[-1].prompt_tokens


async def test_a_cancel_of_what_has_ended_does_nothing(start: Start) -> None:
    async with start() as engine:
        ended = submit(PROMPTS[0], max_tokens=1)
        await run(engine, ended)
        engine.cancel(ended.sequence_id)
        engine.cancel(10_000_000)
        assert (await run(engine, submit(PROMPTS[0]))).text


async def test_a_run_that_nobody_reads_any_more_leaves_its_slot(start: Start) -> None:
    async with start() as engine:
        async with aclosing(engine.run(counting())) as steps:
            await anext(steps)
        assert (await run(engine, submit(PROMPTS[0]))).text


async def test_a_stop_string_ends_the_reply_and_is_no_part_of_it(start: Start) -> None:
    async with start() as engine:
        whole = (await run(engine, submit(PROMPTS[1]))).text
        stop = whole[8:14]
        reply = await run(engine, submit(PROMPTS[1], stop=["never comes", stop]))
    assert reply.text == whole[: whole.index(stop)]
    assert reply.finish == "stop"


async def test_max_tokens_ends_the_reply(start: Start) -> None:
    async with start() as engine:
        reply = await run(engine, counting(max_tokens=7))
    assert len(reply.tokens) == 7
    assert reply.finish == "length"


async def test_a_full_context_ends_the_reply(start: Start) -> None:
    async with start(n_ctx=256) as engine:
        reply = await run(engine, counting())
        assert reply.finish == "length"
        assert reply.advances[-1].prompt_tokens + len(reply.tokens) == engine.limits.n_ctx == 256


async def test_the_progress_of_a_long_prompt_is_reported_as_it_rises(kind: Kind) -> None:
    async with kind.start(n_ctx=4096) as engine:
        long = LAZY_DOG * (1000 * kind.n_chars_a_token // len(LAZY_DOG))
        reply = await run(engine, submit(long, max_tokens=1))
    done = [advance.prompt_done for advance in reply.advances]
    assert reply.advances[0].prompt_tokens > 700
    assert len(set(done)) >= 5
    assert done == sorted(done)
    assert done[-1] == reply.advances[-1].prompt_tokens


async def test_old_turns_that_do_not_fit_are_left_out_and_counted(start: Start) -> None:
    history = [
        message
        for number in range(40)
        for message in (ChatMessage("user", f"Question {number}?"), ChatMessage("assistant", "Answer."))
    ]
    async with start(n_ctx=256) as engine:
        last = (await run(engine, submit([*history, ChatMessage("user", "Now?")]))).advances[-1]
    assert 0 < last.omitted_messages < len(history)
    assert last.omitted_messages % 2 == 0
    assert last.prompt_tokens <= 256 - 16


async def test_a_prompt_that_cannot_fit_is_refused_and_the_engine_goes_on(start: Start) -> None:
    async with start(n_ctx=256) as engine:
        with pytest.raises(EngineRefused, match=r"has \d+ tokens; 240 fit \(context of 256") as refused:
            await run(engine, submit("word " * 5000))
        assert refused.value.kind == "context_overflow"
        assert (await run(engine, submit("Hi"))).text
