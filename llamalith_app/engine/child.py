"""The child's loop: reads messages, lets the scheduler decide and the runner do, sends one frame a step.

The main thread alone touches the runner; a reader thread blocks on the socket and ends the process when the
worker is gone. Knows no llama.cpp: which runner there is, its composition root says.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection

import msgspec

from llamalith_app.engine import frames
from llamalith_app.engine.chat import fit
from llamalith_app.engine.messages import (
    Advance,
    Cancel,
    FromEngine,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    Refused,
    Step,
    Submit,
    ToEngine,
)
from llamalith_app.engine.scheduler import Scheduler
from llamalith_app.engine.sequence import Sequence
from llamalith_app.engine.steps import Refusal, Runner
from llamalith_app.engine.text import ReplyText

TELL_LOADING_S = 0.1


class CannotLoad(Exception):
    """A sentence for people that names model and file."""


OpenRunner = Callable[[Load, Callable[[float], None]], Runner]
"""Opens what `Load` names, telling its progress from 0 to 1; raises CannotLoad."""


def serve(fd: int, open_runner: OpenRunner) -> None:
    """Serves the worker at the other end of the socket until that is gone."""
    connection = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()

    def send(message: FromEngine) -> None:
        connection.sendall(frames.encode(message))

    load = inbox.get()
    if not isinstance(load, Load):
        raise frames.BrokenFrame("the first message must load a model")
    started = time.monotonic()
    try:
        runner = open_runner(load, _teller(send))
    except CannotLoad as error:
        send(LoadFailed(str(error)))
        return
    send(Loaded(n_ctx=runner.n_ctx, n_slots=runner.n_slots, load_s=time.monotonic() - started))
    _Loop(runner, load.n_chunk, inbox, send).run()


def _receive(connection: socket.socket, inbox: queue.SimpleQueue[ToEngine]) -> None:
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
    try:
        while (message := frames.read(connection, decoder)) is not None:
            inbox.put(message)
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


class _Loop:
    def __init__(
        self,
        runner: Runner,
        n_chunk: int,
        inbox: queue.SimpleQueue[ToEngine],
        send: Callable[[FromEngine], None],
    ) -> None:
        self._runner = runner
        self._inbox = inbox
        self._send = send
        self._scheduler = Scheduler(
            n_slots=runner.n_slots,
            n_ctx=runner.n_ctx,
            n_chunk=n_chunk,
            piece=runner.piece,
            is_end=runner.is_end,
        )

    def run(self) -> None:
        while True:
            self._hear()
            for admission in self._scheduler.admit():
                n_kept = self._runner.keep(admission.slot, admission.n_reused)
                if n_kept != admission.n_reused:
                    self._scheduler.reused(admission, n_kept)
            plan = self._scheduler.plan()
            if plan:
                self._tell(self._scheduler.apply(self._runner.evaluate(plan)))

    def _hear(self) -> None:
        """Takes in every message that is there; waits for one when there is nothing else to do."""
        while True:
            try:
                message = self._inbox.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Cancel):
                ended = self._scheduler.cancel(message.sequence_id)
                if ended is not None:
                    self._tell([ended])
            else:
                raise frames.BrokenFrame("a model is loaded already")

    def _submit(self, submit: Submit) -> None:
        runner = self._runner
        try:
            prompt = fit(submit.messages, runner.render, runner.tokenize, runner.n_ctx, submit.sampling.max_tokens)
            runner.begin(submit.sequence_id, submit.sampling, submit.grammar, prompt.tokens)
        except Refusal as refusal:
            self._send(Refused(sequence_id=submit.sequence_id, kind=refusal.kind, reason=refusal.reason))
            return
        self._scheduler.submit(
            Sequence(
                id=submit.sequence_id,
                prompt=prompt.tokens,
                max_tokens=submit.sampling.max_tokens,
                text=ReplyText([*submit.stop, *runner.extra_stop]),
                omitted_messages=prompt.omitted_messages,
            )
        )

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
