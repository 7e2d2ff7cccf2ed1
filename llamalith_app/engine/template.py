"""Renders conversations by a GGUF's chat template, in processes of their own.

Owns those processes: starts them, watches them, replaces them. The runner calls `Template.render` from the threads that
prepare prompts. Does not know llama.cpp; `template_program.py` is what runs in the processes.

A template is a program of the model's maker. It may run for ever, and a single multiplication of large numbers holds
Python's lock, so that no thread beside it could stop it. The system ends the process when it has used its processor
time, and that refuses the conversation. A process that dies for another reason, or hangs, does not show a fault of the
template: a new process renders the conversation once more. Each process ends by itself when the engine is gone.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Literal

import msgspec

from llamalith_app.engine import frames
from llamalith_app.engine.messages import NO_ARGUMENTS, ChatMessage, TemplateArguments
from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.engine.template_program import (
    RENDER_CPU_S,
    Answer,
    Conversation,
    Failed,
    Ready,
    Rendered,
    TemplateSource,
)

PROGRAM = (sys.executable, "-P", "-m", "llamalith_app.engine.template_program")
SILENT_LOOKS = 10
"""After so many looks in a row at which a process neither computed nor waited for a core, it hangs."""
SILENT_STARTING_LOOKS = 100
"""The same while the process starts: it waits for the disk then."""
N_TRIES = 2
"""Processes that a conversation is given to, one after the other."""


class Timings(msgspec.Struct, frozen=True):
    """All in seconds."""

    look_s: float = 0.1
    """Between two looks at a process that has not answered."""
    idle_wait_s: float = 0.1
    """Wait for a process that another conversation uses, before a new one is started."""
    kill_wait_s: float = 1.0
    """Wait for a killed process, which may be inside the kernel."""


TIMINGS = Timings()


class TemplateFailed(Exception):
    """The template refuses the conversation in this form. The message is the template's reason."""


class Template:
    """One chat template. Any number of threads may render: each has a process to itself while it renders. The first
    process starts at once, so that it is ready for the first conversation. `close` ends the processes."""

    def __init__(self, source: str, *, bos: str, eos: str, timings: Timings = TIMINGS) -> None:
        self._source = frames.encode(TemplateSource(source, bos, eos))
        self._timings = timings
        self._lock = Lock()
        self._idle: queue.LifoQueue[TemplateProcess] = queue.LifoQueue()
        self._idle.put(TemplateProcess(self._source, timings))

    def render(self, messages: Sequence[ChatMessage], arguments: TemplateArguments = NO_ARGUMENTS) -> str:
        """Returns the prompt. The template gets the arguments beside the messages.

        Raises TemplateFailed if the template refuses the conversation. Raises Refusal of the kind `template` if the
        template takes too much processor time, and of the kind `engine_died` if N_TRIES processes were lost.
        """
        conversation = frames.encode(Conversation(list(messages), dict(arguments)))
        process = self._take_idle()
        lost_by = ""
        try:
            for _ in range(N_TRIES):
                try:
                    if process is not None and process.is_gone:
                        process.close()
                        process = None
                    process = process or TemplateProcess(self._source, self._timings)
                    answer = process.ask(conversation)
                except ProcessLost as lost:
                    lost_by = str(lost)
                except OSError as error:
                    lost_by = f"cannot be started: {error.strerror}"
                else:
                    if isinstance(answer, Failed):
                        raise TemplateFailed(answer.reason)
                    return answer.prompt
        finally:
            if process is not None:
                self._give_back(process)
        raise Refusal(
            "engine_died", f"The process that renders the model's chat template {lost_by}; {N_TRIES} were tried."
        )

    def system_position(self) -> Literal["own", "first", "last", "none"] | None:
        """Where this template shows a system prompt, as PromptFormat has it. Waits until its process is ready. None: it
        was lost, and what it would say is asked of nobody else."""
        process = self._take_idle()
        if process is None:
            return None
        try:
            return process.wait_until_ready().system
        except (ProcessLost, Refusal):
            return None
        finally:
            self._give_back(process)

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _take_idle(self) -> TemplateProcess | None:
        """None: every process is in use."""
        try:
            return self._idle.get(timeout=self._timings.idle_wait_s)
        except queue.Empty:
            return None

    def _give_back(self, process: TemplateProcess) -> None:
        """Keeps one idle process for the next conversation, and ends the others."""
        with self._lock:
            if self._idle.empty() and not process.is_gone:
                self._idle.put(process)
                return
        process.close()


class ProcessLost(Exception):
    """The process was ended by something else than its template, or it hung and was ended for that. The message is a
    predicate whose subject is the process."""


class TemplateProcess:
    """A running `template_program`. One thread at a time uses it. `template`: the frame of the TemplateSource."""

    def __init__(self, template: bytes, timings: Timings = TIMINGS) -> None:
        self._timings = timings
        self._answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*PROGRAM, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # The worker takes the engine for alive while any process holds the engine's stderr.
                    stderr=subprocess.DEVNULL,
                )
        except OSError:
            ours.close()
            raise
        self._connection = ours
        self.pid = self._process.pid
        self._is_ready = False
        self._is_closed = False
        self._cpu_time = ""
        self._n_silent_looks = 0
        # Sends what fits without waiting. The rest goes with the first conversation: nobody waits for it before.
        self._connection.setblocking(False)
        self._unsent = template
        with contextlib.suppress(OSError):
            self._unsent = template[self._connection.send(template) :]
        self._connection.settimeout(timings.look_s)

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended or was closed. A closed one may still exist inside the kernel."""
        return self._is_closed or self._process.poll() is not None

    def wait_until_ready(self) -> Ready:
        """To be called before the first `ask`. Raises what that raises."""
        answer = self._exchange(b"")
        if not isinstance(answer, Ready):
            raise ProcessLost("answered what it was not asked")
        self._is_ready = True
        return answer

    def ask(self, conversation: bytes) -> Rendered | Failed:
        """Sends the frame of a Conversation and waits for the answer. Raises ProcessLost, and Refusal if the template
        took too much processor time."""
        answer = self._exchange(conversation)
        while isinstance(answer, Ready):
            self._is_ready = True
            answer = self._exchange(b"")
        return answer

    def _exchange(self, sent: bytes) -> Answer:
        self._n_silent_looks = 0
        try:
            self._send(self._unsent + sent)
            self._unsent = b""
            answer = frames.read(self, self._answers)
        except (ConnectionError, frames.BrokenFrame):
            answer = None
        except ProcessLost:
            self.close()
            raise
        if answer is None:
            self.close()
            code = self._process.returncode
            if code == -signal.SIGPROF:
                raise Refusal("template", f"The model's chat template computes for more than {RENDER_CPU_S:g} s.")
            raise ProcessLost(_how_it_ended(code))
        return answer

    def recv(self, n_bytes: int) -> bytes:
        """As a socket's `recv`, but looks at the process while nothing comes. Raises ProcessLost if it hangs."""
        while True:
            try:
                return self._connection.recv(n_bytes)
            except TimeoutError:
                self._look()

    def close(self) -> None:
        """Kills the process."""
        self._is_closed = True
        self._connection.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._timings.kill_wait_s)

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._connection.send(rest) :]
            except TimeoutError:
                self._look()

    def _look(self) -> None:
        """Raises ProcessLost if the process hangs. A process that waits for a core does not hang, and the system limits
        its processor time. Counts looks instead of seconds: if the machine was suspended, the process was too."""
        state, cpu_time = _activity(self.pid)
        if state == "R" or cpu_time != self._cpu_time:
            self._n_silent_looks, self._cpu_time = 0, cpu_time
            return
        self._n_silent_looks += 1
        is_starting = not self._is_ready and state not in "Tt"
        if self._n_silent_looks >= (SILENT_STARTING_LOOKS if is_starting else SILENT_LOOKS):
            raise ProcessLost("hangs")


def _activity(pid: int) -> tuple[str, str]:
    """Linux's letter for the state of a process (R: it runs or waits for a core), and its processor time so far, to be
    compared only. Both are empty if they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], " ".join(fields[11:13])


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
