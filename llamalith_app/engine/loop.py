"""The engine's main loop: takes messages, admits sequences, runs one step and sends one frame for it.

The main thread of the engine process runs it, and it alone decodes. Owns the traffic of slot states with the disk: one
thread reads and writes them, so that a slow disk never delays a step. Decides nothing about slots (`scheduler.py`) and
knows neither the socket nor llama.cpp.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from llamalith_app.engine.messages import Advance, AnswerNow, Cancel, End, FromEngine, LoadModel, Refused, Step
from llamalith_app.engine.prefill_budget import PrefillBudget
from llamalith_app.engine.runner_protocol import Runner
from llamalith_app.engine.scheduler import Admission, Scheduler
from llamalith_app.engine.sequence import Sequence, SlotState
from llamalith_app.engine.states import SavedState, StateStore

WORTH_TOKENS = 64
"""Tokens that make a state worth reading or writing while the speed of prefill is not known."""
MAX_WRITING = 2
"""States on their way to disk. Each stays in memory until it is written."""


class Timings(msgspec.Struct, frozen=True):
    """When the disk is worth its time. All in seconds."""

    worth_reading_s: float = 0.1
    """A state is read if it spares at least so much prefill."""
    worth_writing_s: float = 1.0
    """A state is written if losing it would cost at least so much prefill."""
    max_reading_s: float = 1.0
    """Limit for a read while the speed of prefill is not known. Once it is known, a read may take as long as the
    prefill that it spares."""


TIMINGS = Timings()


class Prepared(NamedTuple):
    """A sequence whose prompt is tokenized and whose sampler exists."""

    sequence: Sequence
    written: list[int]
    """Tokens of the reply that an earlier attempt drew; empty if the sequence cannot resume behind them."""


class StateRead(NamedTuple):
    """The disk thread has read a state for this sequence; None: it could not."""

    sequence_id: int
    state: SlotState | None


Inbox = queue.SimpleQueue[Prepared | Refused | Cancel | AnswerNow | StateRead | End]
"""Messages of the other threads to the main thread."""

Preparing = dict[int, bool]
"""Sequences that were submitted and are not in the inbox yet: id -> whether the sequence is cancelled.
Several threads share it without a lock: each touches it by single operations only, which are atomic."""


@dataclass
class _PendingRead:
    """A state that is being read while its sequence waits."""

    sequence: Sequence
    saved: SavedState
    deadline: float
    """Monotonic time. From then on computing would have been faster."""
    is_retry: bool
    """An earlier state for this sequence could not be read."""
    given_up: bool = False


def fill_slot(scheduler: Scheduler, runner: Runner, admission: Admission) -> bool:
    """Puts the reused tokens into the slot of an admitted sequence, and corrects the scheduler if fewer of them could
    be kept. False: llama.cpp did not accept the state from disk."""
    slot, source, n_reused, _ = admission.assignment
    is_restored = True
    if admission.state is not None:
        is_restored = runner.restore(slot, admission.state.data)
        n_reused = n_reused if is_restored else 0
    elif source != slot:
        runner.copy(source, slot)
    n_kept = runner.keep(slot, n_reused)
    if n_kept != admission.assignment.n_reused:
        scheduler.correct_reuse(admission, n_kept)
    return is_restored


class EngineLoop:
    """Runs until `End` arrives. Notes in `preparing` which sequences are cancelled before they are prepared."""

    def __init__(
        self,
        runner: Runner,
        load: LoadModel,
        inbox: Inbox,
        preparing: Preparing,
        send: Callable[[FromEngine], None],
        timings: Timings = TIMINGS,
    ) -> None:
        self._runner = runner
        self._inbox = inbox
        self._preparing = preparing
        self._send = send
        self._timings = timings
        self._budget = PrefillBudget(load.n_chunk)
        self._scheduler = Scheduler(runner)
        self._states = None
        if load.state_dir:
            with contextlib.suppress(OSError):  # without the folder no state is saved, and nothing else is lost
                self._states = StateStore(Path(load.state_dir), runner.fingerprint, load.state_max_bytes)
        self._state_max_bytes = load.state_max_bytes
        self._disk = ThreadPoolExecutor(1)
        self._writing: list[Future[None]] = []
        self._reading: dict[int, _PendingRead] = {}
        """By sequence id. A read that was given up stays here until the disk answers."""
        self._is_ending = False

    def run(self) -> None:
        """Returns after `End`, once the states of the slots are saved."""
        while not self._is_ending:
            self._take_messages()
            self._admit()
            n_decoding = self._scheduler.n_decoding
            plan = self._scheduler.plan(*self._budget.next(n_decoding))
            if plan:
                started = time.monotonic()
                results = self._runner.evaluate(plan)
                n_read = sum(len(work.tokens) for work in plan) - n_decoding
                self._budget.observe(n_read, n_decoding, time.monotonic() - started)
                self._send_results(self._scheduler.apply(results))
        self._save_all()

    def _admit(self) -> None:
        # A function of its own, so that no local variable holds the last state through the steps that follow.
        for admission in self._scheduler.admit():
            self._save_evicted(admission)
            is_restored = fill_slot(self._scheduler, self._runner, admission)
            if not is_restored and admission.state is not None and self._states is not None:
                # Otherwise it would be read in vain each time, and would keep a good state from being written.
                self._disk.submit(self._states.forget, admission.state.tokens)

    def _take_messages(self) -> None:
        """Handles every message in the inbox. Waits for one if there is nothing else to do."""
        while not self._is_ending:
            timeout_s = self._give_up_reading()
            try:
                message = self._inbox.get(block=self._scheduler.is_idle, timeout=timeout_s)
            except queue.Empty:
                if self._scheduler.is_idle:
                    continue
                return
            match message:
                case Prepared():
                    if self._was_cancelled(message.sequence.id):
                        self._runner.end(message.sequence.id)
                    else:
                        self._submit(*message)
                case Refused():
                    if not self._was_cancelled(message.sequence_id):
                        self._send(message)
                case Cancel():
                    self._cancel(message.sequence_id)
                case AnswerNow():
                    if (written := self._scheduler.written(message.sequence_id)) is not None:
                        self._runner.answer_now(message.sequence_id, written)
                case StateRead():
                    self._finish_reading(message)
                case End():
                    self._is_ending = True

    def _was_cancelled(self, sequence_id: int) -> bool:
        """Whether the sequence was cancelled while it was prepared. It is not preparing any more."""
        return self._preparing.pop(sequence_id, False)

    def _cancel(self, sequence_id: int) -> None:
        ended = self._scheduler.cancel(sequence_id)
        if ended is None and self._preparing.get(sequence_id) is False:
            self._preparing[sequence_id] = True
            ended = Advance(
                sequence_id=sequence_id, prompt_tokens=0, prompt_done=0, prompt_reused=0, finish="cancelled"
            )
        if ended is not None:
            self._send_results([ended])

    def _submit(self, sequence: Sequence, written: list[int]) -> None:
        if (ended := self._scheduler.resume(sequence, written)) is not None:
            self._send_results([ended])
            return
        self._begin_reading(sequence)
        self._scheduler.submit(sequence)

    def _begin_reading(self, sequence: Sequence, failed: SavedState | None = None) -> None:
        """Reads the best state for the sequence, if that spares enough prefill and it is not the one that failed."""
        # A read that was given up still occupies the disk thread: another one would not come in time either.
        is_stuck = any(reading.given_up for reading in self._reading.values())
        if self._states is None or is_stuck:
            return
        n_here = self._scheduler.slots.longest_prefix(sequence.prompt).n_tokens
        saved = self._states.best(sequence.prompt)
        if saved is None or (failed is not None and failed.path == saved.path):
            return
        n_spared = saved.n_usable - n_here
        if self._is_worth(n_spared, self._timings.worth_reading_s):
            sequence.awaits_state = True
            token_s = self._budget.token_s
            patience_s = self._timings.max_reading_s if token_s is None else n_spared * token_s
            deadline = time.monotonic() + patience_s
            self._reading[sequence.id] = _PendingRead(sequence, saved, deadline, is_retry=failed is not None)
            self._disk.submit(self._read, self._states, saved, sequence)

    def _give_up_reading(self) -> float | None:
        """Gives up each read that is past its deadline. The seconds until the next deadline; None: there is none."""
        now = time.monotonic()
        for sequence_id, reading in self._reading.items():
            if not reading.given_up and reading.deadline <= now:
                reading.given_up = True
                self._scheduler.deliver_state(sequence_id, None)
        waits = [reading.deadline - now for reading in self._reading.values() if not reading.given_up]
        return min(waits, default=None)

    def _finish_reading(self, read: StateRead) -> None:
        reading = self._reading.pop(read.sequence_id)
        # A late state is still useful while its sequence waits for a slot.
        self._scheduler.deliver_state(read.sequence_id, read.state)
        if read.state is None and not (reading.is_retry or reading.given_up) and reading.sequence.finish is None:
            # Another engine may have just replaced the file by a longer state.
            self._begin_reading(reading.sequence, reading.saved)

    def _save_evicted(self, admission: Admission) -> None:
        if evicted := admission.assignment.evicted:
            n_stays = self._scheduler.slots.longest_prefix([*evicted, 0]).n_tokens
            self._save(admission.assignment.slot, evicted, n_stays)

    def _save(self, slot: int, tokens: list[int], n_stays: int, used_at: float | None = None) -> None:
        """Writes the state of a slot, if enough prefill would be lost with it. `n_stays`: its leading tokens that
        another slot holds."""
        self._writing = [future for future in self._writing if not future.done()]
        if self._states is None or len(self._writing) >= MAX_WRITING:
            return
        n_lost = len(tokens) - max(n_stays, self._states.n_restorable(tokens))
        if self._is_worth(n_lost, self._timings.worth_writing_s):
            least_cut = self._runner.least_cut_restored(len(tokens))
            if (data := self._runner.save(slot, self._state_max_bytes)) is not None:
                state = SlotState(list(tokens), data, least_cut)
                self._writing.append(self._disk.submit(self._states.write, state, used_at))

    def _save_all(self) -> None:
        """Saves the most recently used slot first: the worker kills this process if it takes too long."""
        slots = self._scheduler.slots.slots
        now = time.time()
        for n_later, index in enumerate(sorted(range(len(slots)), key=lambda index: -slots[index].used_at)):
            self._save(index, slots[index].tokens, 0, used_at=now - n_later)
            wait(self._writing)

    def _is_worth(self, n_tokens: int, seconds: float) -> bool:
        """Whether prefill of so many tokens takes at least so many seconds."""
        if self._budget.token_s is None:
            return n_tokens >= WORTH_TOKENS
        return n_tokens * self._budget.token_s >= seconds

    def _read(self, states: StateStore, saved: SavedState, sequence: Sequence) -> None:
        """Runs in the disk thread."""
        state = None
        try:
            if sequence.finish is None:
                state = states.read(saved)
        finally:
            self._inbox.put(StateRead(sequence.id, state))

    def _send_results(self, results: Collection[Advance | Refused]) -> None:
        for result in results:
            if isinstance(result, Refused) or result.finish is not None:
                self._runner.end(result.sequence_id)
        advances = [result for result in results if isinstance(result, Advance)]
        if advances:
            self._send(Step(advances))
        for result in results:
            if isinstance(result, Refused):
                self._send(result)
