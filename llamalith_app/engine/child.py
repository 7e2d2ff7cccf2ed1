"""The engine process: reads frames from the worker, prepares prompts and runs the loop.

Owns the socket and the threads around the loop. One thread blocks on the socket and ends the process when the worker
is gone. A few threads turn conversations into prompts: tokenizing a long text takes a second, and a chat template may
take a second or hang. The main thread runs `EngineLoop`. All of them put what they have into one inbox. Does not know
llama.cpp: `__main__.py` passes the function that opens a runner.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

import msgspec

from llamalith_app.engine import frames, typed
from llamalith_app.engine.chat import RenderedPrompt, fit, fit_raw
from llamalith_app.engine.loop import TIMINGS, EngineLoop, Inbox, Prepared, Preparing, Timings
from llamalith_app.engine.messages import (
    AnswerNow,
    Cancel,
    ChatMessage,
    End,
    FromEngine,
    Loaded,
    LoadFailed,
    Loading,
    LoadModel,
    Refused,
    Submit,
    TemplateArguments,
    ToEngine,
)
from llamalith_app.engine.reasoning import FAMILIES
from llamalith_app.engine.runner_protocol import CannotLoad, OpenRunner, Refusal, Runner, Thoughts
from llamalith_app.engine.sequence import Sequence
from llamalith_app.engine.template import TemplateFailed
from llamalith_app.engine.text import ReplyText

REPORT_LOADING_S = 0.1
"""Seconds between two reports of the progress of a load, at least."""
MAX_PREPARING = 4
"""Threads that prepare prompts. Their templates render at the same time; tokenizing takes turns."""


def serve(fd: int, open_runner: OpenRunner, timings: Timings = TIMINGS) -> None:
    """Serves the worker at the other end of the socket `fd`. Returns only if the model cannot be loaded; otherwise the
    process ends here, when the worker is gone or sends `End`.

    Raises BrokenFrame if the first message is not `LoadModel`.
    """
    connection = socket.socket(fileno=fd)
    received: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    inbox: Inbox = queue.SimpleQueue()
    preparing: Preparing = {}
    threading.Thread(target=_receive, args=(connection, received, inbox, preparing), daemon=True).start()

    def send(message: FromEngine) -> None:
        connection.sendall(frames.encode(message))

    load = received.get()
    if not isinstance(load, LoadModel):
        raise frames.BrokenFrame("the first message must load a model")
    started = time.monotonic()
    try:
        runner = open_runner(load, _progress_reporter(send))
    except CannotLoad as error:
        send(LoadFailed(str(error)))
        return
    send(
        Loaded(
            n_ctx=runner.n_ctx,
            n_slots=runner.n_slots,
            load_s=time.monotonic() - started,
            family=runner.family,
            marker_tokens=list(runner.marker_tokens),
            format=runner.format,
            gpu=runner.gpu,
        )
    )
    runner_lock = threading.Lock()
    # One more than can run: a cancelled sequence may still occupy a thread with its template.
    for _ in range(min(MAX_PREPARING, runner.n_slots + 1)):
        arguments = (runner, received, inbox, preparing, runner_lock)
        threading.Thread(target=_prepare_submitted, args=arguments, daemon=True).start()
    try:
        EngineLoop(runner, load, inbox, preparing, send, timings).run()
    except Exception:  # noqa: BLE001 - the worker must learn of any failure at once, even while a disk hangs
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # The other threads hold nothing that is worth waiting for.
    os._exit(0)


def _receive(
    connection: socket.socket, received: queue.SimpleQueue[ToEngine], inbox: Inbox, preparing: Preparing
) -> None:
    """Reads messages until the worker is gone, then ends the process. `Cancel`, `AnswerNow` and `End` go directly into
    the inbox, so that they overtake the sequences that still wait to be prepared."""
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
    is_first = True
    try:
        while (message := frames.read(connection, decoder)) is not None:
            if not is_first and isinstance(message, (Cancel, AnswerNow, End)):
                inbox.put(message)
            else:
                if isinstance(message, Submit):
                    preparing[message.sequence_id] = False
                received.put(message)
            is_first = False
    except frames.BrokenFrame as error:
        sys.stderr.write(f"broken frame from the worker: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    # Nobody is left to read a reply, and the main thread may stay inside native code for a long time.
    os._exit(0)


def _progress_reporter(send: Callable[[FromEngine], None]) -> Callable[[float], None]:
    last = 0.0

    def report(progress: float) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_LOADING_S:
            last = time.monotonic()
            send(Loading(progress))

    return report


def _prepare_submitted(
    runner: Runner,
    received: queue.SimpleQueue[ToEngine],
    inbox: Inbox,
    preparing: Preparing,
    runner_lock: threading.Lock,
) -> None:
    """Prepares one submitted sequence after another, except those that are cancelled by then."""
    while True:
        message = received.get()
        if isinstance(message, Submit):
            if preparing[message.sequence_id]:
                del preparing[message.sequence_id]
            else:
                inbox.put(_prepare(runner, message, runner_lock))
        else:
            sys.stderr.write("broken frame from the worker: a model is loaded already\n")
            sys.stderr.flush()
            os._exit(1)


def _prepare(runner: Runner, submit: Submit, runner_lock: threading.Lock) -> Prepared | Refused:
    sampling, mark = submit.sampling, ""

    def tokenize(text: str) -> list[int]:
        with runner_lock:
            return runner.tokenize(text, mark)

    family = None if submit.is_raw else FAMILIES.get(runner.family)
    kept, opening = (family.kept_in_history, family.opening) if family else ((), "")

    def render(messages: Iterable[ChatMessage]) -> str:
        arguments = submit.template_arguments
        try:
            return runner.render(list(messages), {**submit.effort_arguments, **arguments})
        except TemplateFailed:
            if not submit.effort_arguments:
                raise
        # Some templates know other efforts, and refuse ours.
        return runner.render(list(messages), arguments)

    def raw() -> RenderedPrompt:
        return fit_raw(submit.messages[-1].content, tokenize, runner.n_ctx, sampling.max_tokens)

    def templated() -> RenderedPrompt:
        nonlocal mark
        _check_arguments(submit.template_arguments, runner.controls)
        messages, mark = typed.mark(submit.messages, runner.controls, kept)
        return fit(messages, render, tokenize, runner.n_ctx, sampling.max_tokens, opening, may_omit=submit.may_omit)

    try:
        prompt = raw() if submit.is_raw else templated()
        thoughts = Thoughts(prompt.opens_thinking, submit.thinking_budget) if family and submit.thinks else None
        with runner_lock:
            can_resume = runner.begin(
                submit.sequence_id, sampling, submit.grammar, thoughts, prompt.tokens, submit.written
            )
    except Refusal as refusal:
        return Refused(sequence_id=submit.sequence_id, kind=refusal.kind, reason=refusal.reason)
    except Exception:  # noqa: BLE001 - any failure here concerns this sequence only
        traceback.print_exc()
        sys.stderr.flush()
        reason = "Something went wrong in the engine as it prepared the prompt; its worker's log says more."
        return Refused(sequence_id=submit.sequence_id, kind="internal", reason=reason)
    sequence = Sequence(
        id=submit.sequence_id,
        prompt=prompt.tokens,
        max_tokens=submit.sampling.max_tokens,
        text=ReplyText([*submit.stop, *runner.extra_stop]),
        omitted_messages=prompt.omitted_messages,
        opens_thinking=prompt.opens_thinking,
    )
    return Prepared(sequence, submit.written if can_resume else [])


def _check_arguments(arguments: TemplateArguments, controls: typed.Controls) -> None:
    """Raises Refusal for the text of a control token: the template would write it into the prompt."""
    texts = [value for value in arguments.values() if isinstance(value, str)]
    if control := typed.control_in(texts, controls):
        raise Refusal("template", f"An argument in chat_template_kwargs has the text of the control token {control}.")
