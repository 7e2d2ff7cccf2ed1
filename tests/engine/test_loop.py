"""The engine's loop with the fake runner in this process, and what it does with a disk that is slow, hangs or lies."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamalith_app.engine.client.protocol import EngineDied
from llamalith_app.engine.loop import EngineLoop, Inbox, Prepared, Preparing
from llamalith_app.engine.messages import Advance, Cancel, End, FromEngine, Step
from llamalith_app.engine.prefill_budget import Chunk, PrefillBudget
from llamalith_app.engine.sequence import Sequence, SlotState
from llamalith_app.engine.states import SavedState, StateStore
from llamalith_app.engine.text import ReplyText
from tests.engine.conftest import load, run, sampling, started, submit
from tests.fake_engine import FakeRunner

ENOUGH = 1 << 30
REPLY = "r"


class SteadyBudget(PrefillBudget):
    """The budget of an engine whose speed is known: the fake's own speed decides nothing."""

    def __init__(self, token_s: float) -> None:
        super().__init__(512)
        self.token_s = token_s

    def next(self, n_decoding: int) -> Chunk:
        return Chunk(512, 0)

    def observe(self, n_read: int, n_decoding: int, seconds: float) -> None: ...


class RunningLoop:
    """An EngineLoop in a thread, and what its other threads and the worker do with it."""

    def __init__(self, folder: Path, *, n_slots: int = 1, token_s: float = 0.01, max_bytes: int = ENOUGH) -> None:
        self.runner = FakeRunner(lambda: [{"when": "", "reply": REPLY}], n_ctx=8192, n_slots=n_slots)
        self.preparing: Preparing = {}
        self._inbox: Inbox = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        settings = load(n_slots=n_slots, state_dir=str(folder), state_max_bytes=max_bytes)
        self._loop: Any = EngineLoop(self.runner, settings, self._inbox, self.preparing, self._sent.put)
        self._loop._budget = SteadyBudget(token_s)
        self._thread = threading.Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def submit(self, prompt: str) -> int:
        sequence_id = next(self._ids)
        tokens = self.runner.tokenize(prompt)
        self.preparing[sequence_id] = False
        self.runner.begin(sequence_id, sampling(), "", None, tokens, ())
        self._inbox.put(Prepared(Sequence(sequence_id, tokens, 1, ReplyText([])), []))
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        self._inbox.put(Cancel(sequence_id))

    def end_of(self, sequence_id: int) -> Advance:
        while True:
            message = self._sent.get(timeout=20)
            assert isinstance(message, Step)
            for advance in message.sequences:
                if advance.sequence_id == sequence_id and advance.finish is not None:
                    return advance

    def n_reused(self, prompt: str) -> int:
        return self.end_of(self.submit(prompt)).prompt_reused

    def wait_for_disk(self) -> None:
        """Returns when the disk thread has done everything that was submitted to it."""
        self._loop._disk.submit(lambda: None).result()

    def end(self) -> None:
        self._inbox.put(End())
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def start_loop(tmp_path: Path) -> Iterator[Callable[..., RunningLoop]]:
    loops: list[RunningLoop] = []

    def start(**changed: Any) -> RunningLoop:
        loops.append(RunningLoop(tmp_path, **changed))
        return loops[-1]

    yield start
    for loop in loops:
        loop.end()


def test_a_state_that_was_evicted_is_restored_from_disk(start_loop: Callable[..., RunningLoop]) -> None:
    loop = start_loop()
    assert loop.n_reused("A" * 1000) == 0
    assert loop.n_reused("B" * 1000) == 0
    loop.wait_for_disk()
    assert loop.n_reused("A" * 1000 + "2") == 1000


def test_a_disk_that_hangs_is_waited_for_no_longer_than_computing_takes(
    start_loop: Callable[..., RunningLoop], tmp_path: Path
) -> None:
    StateStore(tmp_path, FakeRunner.fingerprint, ENOUGH).write(SlotState(list(b"A" * 1000), b"[]"))
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait()

    loop = start_loop(token_s=0.0002)
    loop._loop._disk.submit(hang)
    assert hangs.wait(20)
    try:
        assert loop.n_reused("A" * 1000 + "1") == 0
        # Nothing more is asked of it until it answers.
        loop.runner.held[0].clear()
        loop._loop._scheduler.slots.slots[0].tokens.clear()
        assert loop.n_reused("A" * 1000 + "2") == 0
        assert len(loop._loop._reading) == 1
    finally:
        goes_on.set()


def test_a_sequence_that_was_cancelled_has_nothing_read_for_it(
    start_loop: Callable[..., RunningLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [*b"A" * 1000]
    StateStore(tmp_path, FakeRunner.fingerprint, ENOUGH).write(SlotState(held, str(held).encode()))
    asked, goes_on = threading.Event(), threading.Event()
    n_read = 0
    real = StateStore.read

    def read(self: StateStore, saved: SavedState) -> SlotState | None:
        nonlocal n_read
        n_read += 1
        asked.set()
        goes_on.wait()
        return real(self, saved)

    monkeypatch.setattr(StateStore, "read", read)
    loop = start_loop(n_slots=4, token_s=1.0)
    first = loop.submit("A" * 1000 + "1")
    assert asked.wait(20)
    gone = [loop.submit("A" * 1000 + "xyz"[n]) for n in range(3)]
    for sequence_id in gone:
        loop.cancel(sequence_id)
    for sequence_id in gone:
        loop.end_of(sequence_id)
    goes_on.set()
    assert loop.end_of(first).prompt_reused == 1000
    loop.wait_for_disk()
    assert n_read == 1


def test_a_state_whose_file_was_replaced_meanwhile_is_looked_for_again(
    start_loop: Callable[..., RunningLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = StateStore(tmp_path, FakeRunner.fingerprint, ENOUGH)
    short, long = [*b"A" * 1000], [*b"A" * 1500]
    there.write(SlotState(short, str(short).encode()))
    real = StateStore.read

    def read(self: StateStore, saved: SavedState) -> SlotState | None:
        if len(saved.tokens) == len(short):
            assert there.best([*short, 0]) is not None
            there.write(SlotState(long, str(long).encode()))
            assert not saved.path.exists()
        return real(self, saved)

    monkeypatch.setattr(StateStore, "read", read)
    assert start_loop().n_reused("A" * 1600) == 1500


def test_a_state_that_the_model_does_not_take_is_forgotten_and_another_one_written(
    start_loop: Callable[..., RunningLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = start_loop()
    assert loop.n_reused("A" * 1000) == 0
    assert loop.n_reused("B" * 1000) == 0
    loop.wait_for_disk()
    with monkeypatch.context() as patched:

        def refuse(slot: int, data: bytes) -> bool:
            loop.runner.held[slot].clear()
            return False

        patched.setattr(loop.runner, "restore", refuse)
        assert loop.n_reused("A" * 1000 + "1") == 0
        loop.wait_for_disk()
    assert loop.n_reused("B" * 1000 + "1") == 1000
    loop.wait_for_disk()
    assert loop.n_reused("A" * 1000 + "2") == 1000


def test_at_the_end_what_was_used_last_is_kept(
    start_loop: Callable[..., RunningLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = start_loop(n_slots=4, max_bytes=12_000)
    for letter in "ABCD":
        loop.n_reused(letter * 1000)
    # However long each takes to be written.
    monkeypatch.setattr(time, "time", partial(next, itertools.count(int(time.time()), 10)))
    loop.end()
    states = StateStore(tmp_path, FakeRunner.fingerprint, ENOUGH)
    kept = [letter for letter in "ABCD" if states.best([*letter.encode() * 1000, 0]) is not None]
    assert kept
    assert kept == [*"ABCD"][-len(kept) :]
    assert len(kept) < 4


def test_nothing_is_kept_of_sequences_that_ended_or_were_cancelled(start_loop: Callable[..., RunningLoop]) -> None:
    loop = start_loop()
    for sequence_id in range(100, 1100):
        loop.cancel(sequence_id)
    loop._ids = itertools.count(1100)
    loop.n_reused("a")
    assert loop.preparing == {}


def test_a_sequence_that_is_cancelled_while_it_is_prepared_ends_once_and_does_not_run(
    start_loop: Callable[..., RunningLoop],
) -> None:
    loop = start_loop()
    loop.preparing[7] = False
    loop.cancel(7)
    loop.cancel(7)
    assert loop.end_of(7).finish == "cancelled"
    loop._ids = itertools.count(7)
    assert loop.submit("gone") == 7
    loop.preparing[7] = True
    assert loop.end_of(loop.submit("next")).finish == "length"
    assert loop.preparing == {}


async def test_a_failure_is_reported_before_the_disk_has_done_its_work(tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(
        """
import sys, threading
from llamalith_app.engine import child, states
from llamalith_app.engine.loop import Timings
from tests.fake_engine import FakeRunner

class Failing(FakeRunner):
    def evaluate(self, plan):
        if any(len(work.tokens) > 1 and bytes(work.tokens[-8:]).startswith(b"d") for work in plan):
            raise RuntimeError("what the runner raised")
        return super().evaluate(plan)

states.StateStore.write = lambda *_: threading.Event().wait()
child.serve(int(sys.argv[-1]), lambda load, report: Failing(lambda: [], n_ctx=load.n_ctx), Timings(worth_writing_s=0.0))
"""
    )
    # As the fake engine is: from the folder of the project.
    argv = [sys.executable, "-c", f"exec(open({str(program)!r}).read())"]
    async with started(argv, state_dir=str(tmp_path / "states"), state_max_bytes=ENOUGH) as engine:
        for prompt in ("a" * 500, "b" * 500):
            assert (await run(engine, submit(prompt))).finish
        with pytest.raises(EngineDied) as died:
            await run(engine, submit("d"))
    assert "SIG" not in str(died.value)
