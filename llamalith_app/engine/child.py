"""The child's loop: takes in messages, lets the scheduler decide and the runner do, sends one frame a step.

The main thread alone decodes. Beside it one thread blocks on the socket and ends the process when the worker is
gone; a few make prompts of turns, since a long text takes a second to tokenize, and a template may take a second or
hang; one reads and writes states. They hand over by one inbox. Knows no llama.cpp: which runner there is, its
composition root says.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from llamalith_app.engine import frames
from llamalith_app.engine.chat import fit
from llamalith_app.engine.messages import (
    Advance,
    Cancel,
    End,
    FromEngine,
    Loaded,
    LoadFailed,
    Loading,
    LoadModel,
    Refused,
    Step,
    Submit,
    ToEngine,
)
from llamalith_app.engine.prefill_budget import PrefillBudget
from llamalith_app.engine.runner_protocol import Refusal, Runner
from llamalith_app.engine.scheduler import Admission, Scheduler
from llamalith_app.engine.sequence import Sequence, State
from llamalith_app.engine.states import Saved, States
from llamalith_app.engine.text import ReplyText

TELL_LOADING_S = 0.1
WORTH_READING_S = 0.1
"""Of computing that a state on disk spares, to be worth the reading."""
WORTH_WRITING_S = 1.0
"""Of computing that would be lost with a slot's tokens, to be worth the writing."""
MAX_READING_S = 1.0
"""How long a state is waited for while it is not known how long computing would take; else, for so long."""
WORTH_TOKENS = 64
"""The same for both while the speed of reading is not known."""
MAX_PREPARING = 4
"""Turns that are made into prompts side by side. They wait for their template side by side, and compute by turns."""
MAX_WRITING = 2
"""States on their way to disk; each stands in memory until it is written."""


class CannotLoad(Exception):
    """A sentence for people that names model and file."""


OpenRunner = Callable[[LoadModel, Callable[[float], None]], Runner]
"""Opens what `LoadModel` names, telling its progress from 0 to 1; raises CannotLoad."""


class StateRead(NamedTuple):
    sequence_id: int
    state: State | None


@dataclass
class _Reading:
    """Of a state, which a sequence waits for."""

    sequence: Sequence
    saved: Saved
    until: float
    """Monotonic."""
    again: bool
    """The one before could not be had."""
    given_up: bool = False


class Begun(NamedTuple):
    """A sequence that can be submitted."""

    sequence: Sequence
    written: list[int]
    """Of its reply, by an earlier attempt, if it can go on behind that."""


Inbox = queue.SimpleQueue[Begun | Refused | Cancel | StateRead | End]
"""What the main thread hears."""

Coming = dict[int, bool]
"""Sequences that were submitted and have not come to the main thread: by id, whether each was cancelled. Each thread
does one thing at a time to it."""


def serve(fd: int, open_runner: OpenRunner) -> None:
    """Serves the worker at the other end of the socket until that is gone or says `End`."""
    connection = socket.socket(fileno=fd)
    received: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    inbox: Inbox = queue.SimpleQueue()
    coming: Coming = {}
    threading.Thread(target=_receive, args=(connection, received, inbox, coming), daemon=True).start()

    def send(message: FromEngine) -> None:
        connection.sendall(frames.encode(message))

    load = received.get()
    if not isinstance(load, LoadModel):
        raise frames.BrokenFrame("the first message must load a model")
    started = time.monotonic()
    try:
        runner = open_runner(load, _teller(send))
    except CannotLoad as error:
        send(LoadFailed(str(error)))
        return
    send(
        Loaded(
            n_ctx=runner.n_ctx,
            n_slots=runner.n_slots,
            load_s=time.monotonic() - started,
            can_think=runner.can_think,
            gpu=runner.gpu,
        )
    )
    computing = threading.Lock()
    # One more than run side by side: one that was cancelled may still be at its template.
    for _ in range(min(MAX_PREPARING, runner.n_slots + 1)):
        threading.Thread(target=_prepare, args=(runner, received, inbox, coming, computing), daemon=True).start()
    try:
        _Loop(runner, load, inbox, coming, send).run()
    except Exception:  # noqa: BLE001 - whatever it was, the worker is to hear of it at once, though a disk hangs
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # The other threads hold nothing that is worth waiting for.
    os._exit(0)


def _receive(connection: socket.socket, received: queue.SimpleQueue[ToEngine], inbox: Inbox, coming: Coming) -> None:
    """What ends something goes past the turns that are still to be prepared."""
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
    begun = False
    try:
        while (message := frames.read(connection, decoder)) is not None:
            if begun and isinstance(message, (Cancel, End)):
                inbox.put(message)
            else:
                if isinstance(message, Submit):
                    coming[message.sequence_id] = False
                received.put(message)
            begun = True
    except frames.BrokenFrame as error:
        sys.stderr.write(f"broken frame from the worker: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    # Nobody is there to read a reply; the main thread may be inside native code for a long time.
    os._exit(0)


def _teller(send: Callable[[FromEngine], None]) -> Callable[[float], None]:
    last = 0.0

    def tell(progress: float) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_LOADING_S:
            last = time.monotonic()
            send(Loading(progress))

    return tell


def _prepare(
    runner: Runner, received: queue.SimpleQueue[ToEngine], inbox: Inbox, coming: Coming, computing: threading.Lock
) -> None:
    """Makes a sequence of each turn that was not cancelled before."""
    while True:
        message = received.get()
        if isinstance(message, Submit):
            if coming[message.sequence_id]:
                del coming[message.sequence_id]
            else:
                inbox.put(_sequence(runner, message, computing))
        else:
            sys.stderr.write("broken frame from the worker: a model is loaded already\n")
            sys.stderr.flush()
            os._exit(1)


def _sequence(runner: Runner, submit: Submit, computing: threading.Lock) -> Begun | Refused:
    def tokenize(text: str) -> list[int]:
        with computing:
            return runner.tokenize(text)

    sampling = submit.sampling
    try:
        prompt = fit(submit.messages, runner.render, tokenize, runner.n_ctx, sampling.max_tokens)
        with computing:
            goes_on = runner.begin(submit.sequence_id, sampling, submit.grammar, prompt.tokens, submit.written)
    except Refusal as refusal:
        return Refused(sequence_id=submit.sequence_id, kind=refusal.kind, reason=refusal.reason)
    except Exception:  # noqa: BLE001 - whatever it was, it is this turn's and nobody else's
        traceback.print_exc()
        sys.stderr.flush()
        reason = "Something went wrong in the engine as it prepared the prompt; its worker's log tells more."
        return Refused(sequence_id=submit.sequence_id, kind="internal", reason=reason)
    sequence = Sequence(
        id=submit.sequence_id,
        prompt=prompt.tokens,
        max_tokens=submit.sampling.max_tokens,
        text=ReplyText([*submit.stop, *runner.extra_stop]),
        omitted_messages=prompt.omitted_messages,
        opens_thinking=prompt.opens_thinking,
    )
    return Begun(sequence, submit.written if goes_on else [])


def fill(scheduler: Scheduler, runner: Runner, admission: Admission) -> bool:
    """Gives the slot of an admitted sequence what it takes over. False: llama.cpp did not take its state."""
    slot, source, n_reused, _ = admission.place
    is_taken = True
    if admission.state is not None:
        is_taken = runner.restore(slot, admission.state.data)
        n_reused = n_reused if is_taken else 0
    elif source != slot:
        runner.copy(source, slot)
    n_kept = runner.keep(slot, n_reused)
    if n_kept != admission.place.n_reused:
        scheduler.reused(admission, n_kept)
    return is_taken


class _Loop:
    """`coming`: where it notes which sequences are cancelled before they come."""

    def __init__(
        self,
        runner: Runner,
        load: LoadModel,
        inbox: Inbox,
        coming: Coming,
        send: Callable[[FromEngine], None],
    ) -> None:
        self._runner = runner
        self._inbox = inbox
        self._coming = coming
        self._send = send
        self._pace = PrefillBudget(load.n_chunk)
        self._scheduler = Scheduler(runner)
        self._states = None
        if load.state_dir:
            with contextlib.suppress(OSError):  # a folder that cannot be made only costs what would have been saved
                self._states = States(Path(load.state_dir), runner.fingerprint, load.state_max_bytes)
        self._state_max_bytes = load.state_max_bytes
        self._disk = ThreadPoolExecutor(1)
        self._writing: list[Future[None]] = []
        self._reading: dict[int, _Reading] = {}
        """By sequence id; those given up too, until the disk has answered."""
        self._ends = False

    def run(self) -> None:
        while not self._ends:
            self._hear()
            self._admit()
            n_decoding = self._scheduler.n_decoding
            plan = self._scheduler.plan(*self._pace.chunk(n_decoding))
            if plan:
                started = time.monotonic()
                results = self._runner.evaluate(plan)
                n_read = sum(len(work.tokens) for work in plan) - n_decoding
                self._pace.took(n_read, n_decoding, time.monotonic() - started)
                self._tell(self._scheduler.apply(results))
        self._save_all()

    def _admit(self) -> None:
        # In a frame of its own, so that the last one's state is not held through the steps that follow.
        for admission in self._scheduler.admit():
            self._save_evicted(admission)
            is_taken = fill(self._scheduler, self._runner, admission)
            if not is_taken and admission.state is not None and self._states is not None:
                # Else it would be read in vain each time, and none that is taken be written.
                self._disk.submit(self._states.forget, admission.state.tokens)

    def _hear(self) -> None:
        """Takes in every message that is there; waits for one when there is nothing else to do."""
        while not self._ends:
            patience_s = self._give_up_reading()
            try:
                message = self._inbox.get(block=self._scheduler.is_idle, timeout=patience_s)
            except queue.Empty:
                if self._scheduler.is_idle:
                    continue
                return
            match message:
                case Begun():
                    if self._was_cancelled(message.sequence.id):
                        self._runner.end(message.sequence.id)
                    else:
                        self._submit(*message)
                case Refused():
                    if not self._was_cancelled(message.sequence_id):
                        self._send(message)
                case Cancel():
                    self._cancel(message.sequence_id)
                case StateRead():
                    self._take_read(message)
                case End():
                    self._ends = True

    def _was_cancelled(self, sequence_id: int) -> bool:
        """Before it came, which it does now."""
        return self._coming.pop(sequence_id, False)

    def _cancel(self, sequence_id: int) -> None:
        ended = self._scheduler.cancel(sequence_id)
        if ended is None and self._coming.get(sequence_id) is False:
            self._coming[sequence_id] = True
            ended = Advance(
                sequence_id=sequence_id, prompt_tokens=0, prompt_done=0, prompt_reused=0, finish="cancelled"
            )
        if ended is not None:
            self._tell([ended])

    def _submit(self, sequence: Sequence, written: list[int]) -> None:
        if (ended := self._scheduler.resume(sequence, written)) is not None:
            self._tell([ended])
            return
        self._begin_reading(sequence)
        self._scheduler.submit(sequence)

    def _begin_reading(self, sequence: Sequence, before: Saved | None = None) -> None:
        """Of the best state for it, if it is worth that and another one than before."""
        # The disk hangs: nothing else that it is asked for would come.
        hangs = any(reading.given_up for reading in self._reading.values())
        if self._states is None or hangs:
            return
        n_here = self._scheduler.slots.longest_prefix(sequence.prompt).n_tokens
        saved = self._states.best(sequence.prompt)
        if saved is None or (before is not None and before.path == saved.path):
            return
        n_spared = saved.n_usable - n_here
        if self._is_worth(n_spared, WORTH_READING_S):
            sequence.is_reading = True
            patience_s = MAX_READING_S if self._pace.token_s is None else n_spared * self._pace.token_s
            until = time.monotonic() + patience_s
            self._reading[sequence.id] = _Reading(sequence, saved, until, again=before is not None)
            self._disk.submit(self._read, self._states, saved, sequence)

    def _give_up_reading(self) -> float | None:
        """Where computing would be done by now. How long it is until the next is given up; None: none is waited for."""
        now = time.monotonic()
        for sequence_id, reading in self._reading.items():
            if not reading.given_up and reading.until <= now:
                reading.given_up = True
                self._scheduler.state_read(sequence_id, None)
        waits = [reading.until - now for reading in self._reading.values() if not reading.given_up]
        return min(waits, default=None)

    def _take_read(self, read: StateRead) -> None:
        reading = self._reading.pop(read.sequence_id)
        # Also a late one is of use, while its sequence waits for a slot.
        self._scheduler.state_read(read.sequence_id, read.state)
        if read.state is None and not (reading.again or reading.given_up) and reading.sequence.finish is None:
            # Another one may have come in its place just now.
            self._begin_reading(reading.sequence, reading.saved)

    def _save_evicted(self, admission: Admission) -> None:
        if evicted := admission.place.evicted:
            n_stays = self._scheduler.slots.longest_prefix([*evicted, 0]).n_tokens
            self._save(admission.place.slot, evicted, n_stays)

    def _save(self, slot: int, tokens: list[int], n_stays: int, used_at: float | None = None) -> None:
        self._writing = [one for one in self._writing if not one.done()]
        if self._states is None or len(self._writing) >= MAX_WRITING:
            return
        n_lost = len(tokens) - max(n_stays, self._states.n_held(tokens))
        if self._is_worth(n_lost, WORTH_WRITING_S):
            least_cut = self._runner.least_cut_restored(len(tokens))
            if (data := self._runner.save(slot, self._state_max_bytes)) is not None:
                state = State(list(tokens), data, least_cut)
                self._writing.append(self._disk.submit(self._states.write, state, used_at))

    def _save_all(self) -> None:
        """What was used last first, for as long as there is time."""
        slots = self._scheduler.slots.slots
        now = time.time()
        for n_later, index in enumerate(sorted(range(len(slots)), key=lambda index: -slots[index].used_at)):
            self._save(index, slots[index].tokens, 0, used_at=now - n_later)
            wait(self._writing)

    def _is_worth(self, n_tokens: int, seconds: float) -> bool:
        if self._pace.token_s is None:
            return n_tokens >= WORTH_TOKENS
        return n_tokens * self._pace.token_s >= seconds

    def _read(self, states: States, saved: Saved, sequence: Sequence) -> None:
        state = None
        try:
            if sequence.finish is None:
                state = states.read(saved)
        finally:
            self._inbox.put(StateRead(sequence.id, state))

    def _tell(self, results: Collection[Advance | Refused]) -> None:
        for one in results:
            if isinstance(one, Refused) or one.finish is not None:
                self._runner.end(one.sequence_id)
        advances = [one for one in results if isinstance(one, Advance)]
        if advances:
            self._send(Step(advances))
        for one in results:
            if isinstance(one, Refused):
                self._send(one)
