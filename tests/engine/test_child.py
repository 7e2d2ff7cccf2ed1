"""The child's loop with the fake runner in this process, and what it does with a disk that is slow, hangs or lies."""

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

from llamalith_app.engine.child import Begun, Coming, Inbox, _Loop
from llamalith_app.engine.client.local import EngineDied
from llamalith_app.engine.messages import Advance, Cancel, End, FromEngine, Step
from llamalith_app.engine.prefill_budget import Chunk, PrefillBudget
from llamalith_app.engine.sequence import Sequence, State
from llamalith_app.engine.states import Saved, States
from llamalith_app.engine.text import ReplyText
from tests.engine.conftest import load, run, sampling, started, submit
from tests.fake_engine import FakeRunner

ENOUGH = 1 << 30
REPLY = "r"


class SteadyBudget(PrefillBudget):
    """Of an engine whose speed is known, so that the fake's own does not decide."""

    def __init__(self, token_s: float) -> None:
        super().__init__(512)
        self.token_s = token_s

    def next(self, n_decoding: int) -> Chunk:
        return Chunk(512, 0)

    def observe(self, n_read: int, n_decoding: int, seconds: float) -> None: ...


class Child:
    def __init__(self, folder: Path, *, n_slots: int = 1, token_s: float = 0.01, max_bytes: int = ENOUGH) -> None:
        self.runner = FakeRunner(lambda: [{"when": "", "reply": REPLY}], n_ctx=8192, n_slots=n_slots)
        self.coming: Coming = {}
        self._inbox: Inbox = queue.SimpleQueue()
        self._told: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._ids = itertools.count(1)
        settings = load(n_slots=n_slots, state_dir=str(folder), state_max_bytes=max_bytes)
        self._loop: Any = _Loop(self.runner, settings, self._inbox, self.coming, self._told.put)
        self._loop._budget = SteadyBudget(token_s)
        self._thread = threading.Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def submit(self, prompt: str) -> int:
        sequence_id = next(self._ids)
        tokens = self.runner.tokenize(prompt)
        self.coming[sequence_id] = False
        self.runner.begin(sequence_id, sampling(), "", tokens, ())
        self._inbox.put(Begun(Sequence(sequence_id, tokens, 1, ReplyText([])), []))
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        self._inbox.put(Cancel(sequence_id))

    def end_of(self, sequence_id: int) -> Advance:
        while True:
            told = self._told.get(timeout=20)
            assert isinstance(told, Step)
            for advance in told.sequences:
                if advance.sequence_id == sequence_id and advance.finish is not None:
                    return advance

    def n_reused(self, prompt: str) -> int:
        return self.end_of(self.submit(prompt)).prompt_reused

    def written(self) -> None:
        """Returns when the disk has done all that it was told."""
        self._loop._disk.submit(lambda: None).result()

    def end(self) -> None:
        self._inbox.put(End())
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(**changed: Any) -> Child:
        children.append(Child(tmp_path, **changed))
        return children[-1]

    yield start
    for one in children:
        one.end()


def test_what_a_slot_lost_is_had_again_from_disk(child: Callable[..., Child]) -> None:
    one = child()
    assert one.n_reused("A" * 1000) == 0
    assert one.n_reused("B" * 1000) == 0
    one.written()
    assert one.n_reused("A" * 1000 + "2") == 1000


def test_a_disk_that_hangs_is_waited_for_no_longer_than_computing_takes(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    States(tmp_path, FakeRunner.fingerprint, ENOUGH).write(State(list(b"A" * 1000), b"[]"))
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait()

    one = child(token_s=0.0002)
    one._loop._disk.submit(hang)
    assert hangs.wait(20)
    try:
        assert one.n_reused("A" * 1000 + "1") == 0
        # Nothing more is asked of it until it answers.
        one.runner.held[0].clear()
        one._loop._scheduler.slots.slots[0].tokens.clear()
        assert one.n_reused("A" * 1000 + "2") == 0
        assert len(one._loop._reading) == 1
    finally:
        goes_on.set()


def test_a_sequence_that_was_cancelled_has_nothing_read_for_it(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [*b"A" * 1000]
    States(tmp_path, FakeRunner.fingerprint, ENOUGH).write(State(held, str(held).encode()))
    asked, goes_on = threading.Event(), threading.Event()
    n_read = 0
    real = States.read

    def read(self: States, saved: Saved) -> State | None:
        nonlocal n_read
        n_read += 1
        asked.set()
        goes_on.wait()
        return real(self, saved)

    monkeypatch.setattr(States, "read", read)
    one = child(n_slots=4, token_s=1.0)
    first = one.submit("A" * 1000 + "1")
    assert asked.wait(20)
    gone = [one.submit("A" * 1000 + "xyz"[n]) for n in range(3)]
    for sequence_id in gone:
        one.cancel(sequence_id)
    for sequence_id in gone:
        one.end_of(sequence_id)
    goes_on.set()
    assert one.end_of(first).prompt_reused == 1000
    one.written()
    assert n_read == 1


def test_a_state_whose_file_was_replaced_meanwhile_is_looked_for_again(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = States(tmp_path, FakeRunner.fingerprint, ENOUGH)
    short, long = [*b"A" * 1000], [*b"A" * 1500]
    there.write(State(short, str(short).encode()))
    real = States.read

    def read(self: States, saved: Saved) -> State | None:
        if len(saved.tokens) == len(short):
            assert there.best([*short, 0]) is not None
            there.write(State(long, str(long).encode()))
            assert not saved.path.exists()
        return real(self, saved)

    monkeypatch.setattr(States, "read", read)
    assert child().n_reused("A" * 1600) == 1500


def test_a_state_that_the_model_does_not_take_is_forgotten_and_another_one_written(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child()
    assert one.n_reused("A" * 1000) == 0
    assert one.n_reused("B" * 1000) == 0
    one.written()
    with monkeypatch.context() as patched:

        def refuse(slot: int, data: bytes) -> bool:
            one.runner.held[slot].clear()
            return False

        patched.setattr(one.runner, "restore", refuse)
        assert one.n_reused("A" * 1000 + "1") == 0
        one.written()
    assert one.n_reused("B" * 1000 + "1") == 1000
    one.written()
    assert one.n_reused("A" * 1000 + "2") == 1000


def test_at_the_end_what_was_used_last_is_kept(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child(n_slots=4, max_bytes=12_000)
    for letter in "ABCD":
        one.n_reused(letter * 1000)
    # However long each takes to be written.
    monkeypatch.setattr(time, "time", partial(next, itertools.count(int(time.time()), 10)))
    one.end()
    states = States(tmp_path, FakeRunner.fingerprint, ENOUGH)
    kept = [letter for letter in "ABCD" if states.best([*letter.encode() * 1000, 0]) is not None]
    assert kept
    assert kept == [*"ABCD"][-len(kept) :]
    assert len(kept) < 4


def test_of_sequences_that_are_cancelled_and_of_such_that_came_nothing_is_kept(child: Callable[..., Child]) -> None:
    one = child()
    for sequence_id in range(100, 1100):
        one.cancel(sequence_id)
    one._ids = itertools.count(1100)
    one.n_reused("a")
    assert one.coming == {}


def test_a_sequence_that_was_cancelled_before_it_came_is_told_so_once_and_does_not_run(
    child: Callable[..., Child],
) -> None:
    one = child()
    one.coming[7] = False
    one.cancel(7)
    one.cancel(7)
    assert one.end_of(7).finish == "cancelled"
    one._ids = itertools.count(7)
    assert one.submit("gone") == 7
    one.coming[7] = True
    assert one.end_of(one.submit("next")).finish == "length"
    assert one.coming == {}


async def test_a_failure_is_told_before_the_disk_has_done_its_work(tmp_path: Path) -> None:
    program = tmp_path / "failing.py"
    program.write_text(
        """
import sys, threading
from llamalith_app.engine import child, states
from tests.fake_engine import FakeRunner

class Failing(FakeRunner):
    def evaluate(self, plan):
        if any(len(work.tokens) > 1 and bytes(work.tokens[-8:]).startswith(b"d") for work in plan):
            raise RuntimeError("what the runner raised")
        return super().evaluate(plan)

child.WORTH_WRITING_S = 0.0
states.States.write = lambda *_: threading.Event().wait()
child.serve(int(sys.argv[-1]), lambda load, tell: Failing(lambda: [], n_ctx=load.n_ctx))
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
