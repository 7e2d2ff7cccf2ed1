"""The chat template of a GGUF: a program of the model's maker, run in a process of its own.

Jinja's sandbox keeps it from reaching Python, not from running for ever or filling the memory; and one multiplication
of large numbers holds Python's lock, so that no thread beside it could stop it. So a small process compiles and renders
it, the system ends that process when it has computed for too long, and the next conversation gets a new one. It ends by
itself when the engine child is gone. A process that somebody else ends, or that hangs, says nothing about the template:
the conversation is rendered once more by a new one. Knows no llama.cpp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import msgspec
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamalith_app.engine import forms, frames
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.runner_protocol import Refusal
from llamalith_app.supervise import parent

RENDER_CPU_S = 1.0
"""Seconds of computing for one conversation, and for compiling; milliseconds are usual."""
MEMORY_BYTES = 256 * 1024 * 1024
"""Address space of the process, 35 MB of which it takes to stand idle."""
MEMORY_BYTES_A_CHAR = 32
"""And as much more for each character of the conversation."""
MAX_REASON_CHARS = 500
MAX_CHARS = 1_000_000
"""A prompt may have as many characters more than four times its conversation: tokenizing takes time, too."""
LOOK_S = 0.1
"""Between two looks at a process that is waited for."""
SILENT_LOOKS = 10
"""So many in a row at which it neither computes nor waits for a core: it hangs."""
SILENT_STARTING_LOOKS = 100
"""The same while it starts: it waits for the disk then."""
N_TRIES = 2
"""Processes that a conversation is given to, one after the other."""
PATIENCE_S = 0.1
"""How long a conversation waits for the process of another one before it gets one of its own."""
KILL_S = 1.0
"""How long a killed process is waited for; it may be inside the kernel."""
NO_TOOLS: dict[str, list[Any]] = {"tools": [], "functions": []}
"""For a template that cannot do with None."""


class Program(msgspec.Struct, frozen=True):
    """First message to the process."""

    source: str
    bos: str
    eos: str


class Conversation(msgspec.Struct, frozen=True):
    messages: list[ChatMessage]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The template is compiled, or known not to be."""


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    prompt: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str


class TemplateFailed(Exception):
    """The template refuses the conversation in this form; the message is its own reason."""


class Template:
    """For any number of threads: each has a process to itself while it renders. Ended by `close`."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._program = frames.encode(Program(source, bos, eos))
        self._lock = Lock()
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._idle.put(_Process(self._program))

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Raises TemplateFailed; or Refusal: `template` where the template takes more time than it is given,
        `engine_died` where its processes died of something else."""
        conversation = frames.encode(Conversation(list(messages)))
        process = self._take()
        how = ""
        try:
            for _ in range(N_TRIES):
                try:
                    if process is not None and process.is_gone:
                        process.close()
                        process = None
                    process = process or _Process(self._program)
                    answer = process.ask(conversation)
                except _ProcessLost as lost:
                    how = str(lost)
                except OSError as error:
                    how = f"cannot be started: {error.strerror}"
                else:
                    if isinstance(answer, Failed):
                        raise TemplateFailed(answer.reason)
                    return answer.prompt
        finally:
            if process is not None:
                self._give_back(process)
        raise Refusal("engine_died", f"The process that renders the model's chat template {how}; {N_TRIES} were tried.")

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _take(self) -> _Process | None:
        """None: all are at work."""
        try:
            return self._idle.get(timeout=PATIENCE_S)
        except queue.Empty:
            return None

    def _give_back(self, process: _Process) -> None:
        """One stays for the next conversation."""
        with self._lock:
            if self._idle.empty() and not process.is_gone:
                self._idle.put(process)
                return
        process.close()


class _ProcessLost(Exception):
    """It was ended, but not by its template; or it hangs, and was ended for that. The end of a sentence about it."""


class _Process:
    """One that renders, used by one thread at a time."""

    def __init__(self, program: bytes) -> None:
        self._answers: msgspec.msgpack.Decoder[Ready | Rendered | Failed] = msgspec.msgpack.Decoder(
            Ready | Rendered | Failed
        )
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "llamalith_app.engine.template", "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # The worker takes the engine for alive while somebody holds the engine's.
                    stderr=subprocess.DEVNULL,
                )
        except OSError:
            ours.close()
            raise
        self._connection = ours
        self.pid = self._process.pid
        self._is_ready = False
        self._is_closed = False
        self._computed = ""
        self._n_silent = 0
        # What there is no room for goes with the first conversation: nobody waits for it yet.
        self._connection.setblocking(False)
        self._unsent = program
        with contextlib.suppress(OSError):
            self._unsent = program[self._connection.send(program) :]
        self._connection.settimeout(LOOK_S)

    @property
    def is_gone(self) -> bool:
        """It has ended, or is not to be asked any more: one inside the kernel outlives its kill."""
        return self._is_closed or self._process.poll() is not None

    def ask(self, conversation: bytes) -> Rendered | Failed:
        """Raises _ProcessLost, and Refusal where the template computes for too long."""
        self._n_silent = 0
        try:
            self._send(self._unsent + conversation)
            self._unsent = b""
            answer = frames.read(self, self._answers)
            while isinstance(answer, Ready):
                self._is_ready = True
                answer = frames.read(self, self._answers)
        except (ConnectionError, frames.BrokenFrame):
            answer = None
        except _ProcessLost:
            self.close()
            raise
        if answer is None:
            self.close()
            code = self._process.returncode
            if code == -signal.SIGPROF:
                raise Refusal("template", f"The model's chat template computes for more than {RENDER_CPU_S:g} s.")
            raise _ProcessLost(_how_it_ended(code))
        return answer

    def recv(self, n_bytes: int) -> bytes:
        """As of a socket, but looks at the process while nothing comes. Raises _ProcessLost."""
        while True:
            try:
                return self._connection.recv(n_bytes)
            except TimeoutError:
                self._look()

    def close(self) -> None:
        self._is_closed = True
        self._connection.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_S)

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._connection.send(rest) :]
            except TimeoutError:
                self._look()

    def _look(self) -> None:
        """Looks are counted, not seconds: what was frozen together with this process has missed nothing. One that
        waits for a core on a busy machine does not hang, and what it computes is bounded by the system."""
        state, computed = _doing(self.pid)
        if state == "R" or computed != self._computed:
            self._n_silent, self._computed = 0, computed
            return
        self._n_silent += 1
        starts = not self._is_ready and state not in "Tt"
        if self._n_silent >= (SILENT_STARTING_LOOKS if starts else SILENT_LOOKS):
            raise _ProcessLost("hangs")


def _doing(pid: int) -> tuple[str, str]:
    """The state of a process, as Linux names it (R: it runs, or waits for a core), and what it has computed so far, in
    no unit. Empty: nobody knows."""
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


def _serve(fd: int) -> None:
    """The process: compiles the program, then renders one conversation after another."""
    # It may be stopped, or hang, when the engine dies.
    parent.die_with_parent()
    connection = socket.socket(fileno=fd)
    program = frames.read(connection, msgspec.msgpack.Decoder(Program))
    if program is None:
        return
    _bound(n_chars=len(program.source))
    render = _compiled(program)

    def try_out(messages: list[forms.Message]) -> str:
        _bound(n_chars=len(program.source))
        return render(messages)

    form = forms.find(try_out)
    _unbound()
    connection.sendall(frames.encode(Ready()))
    conversations = msgspec.msgpack.Decoder(Conversation)
    while (conversation := frames.read(connection, conversations)) is not None:
        n_chars = sum(len(message.content) for message in conversation.messages)
        _bound(n_chars)
        answer = _answer(render, form, conversation, MAX_CHARS + 4 * n_chars)
        _unbound()
        connection.sendall(answer)


def _bound(n_chars: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY_BYTES + MEMORY_BYTES_A_CHAR * n_chars
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    # What the process itself computes, whatever else the machine does meanwhile; the signal's default is to end it.
    signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_S)


def _unbound() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _answer(render: forms.Render, form: forms.Form, conversation: Conversation, max_chars: int) -> bytes:
    try:
        prompt = render(form.apply(conversation.messages))
        if len(prompt) > max_chars:
            return frames.encode(Failed(f"it makes a prompt of {len(prompt)} characters; {max_chars} are allowed"))
        return frames.encode(Rendered(prompt))
    except Exception as error:  # noqa: BLE001 - it is a program of the model's maker
        return frames.encode(Failed(_in_words(error)))


def _compiled(program: Program) -> forms.Render:
    """The template with what Transformers and llama-cpp-python give to one."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals = environment.globals | {
        "bos_token": program.bos,
        "eos_token": program.eos,
        "add_generation_prompt": True,
        "raise_exception": _raise,
        "strftime_now": _now,
        # Some templates tell None from what is not defined.
        "tools": None,
        "tool_choice": None,
        "functions": None,
        "function_call": None,
    }
    try:
        template = environment.from_string(program.source)
    except Exception as error:  # noqa: BLE001 - it is a program of the model's maker
        # The one who asks next is told; the error itself would hold what it grew out of.
        reason = f"it cannot be compiled: {_in_words(error)}"

        def refuse(_: list[forms.Message]) -> NoReturn:
            raise Raised(reason)

        return refuse

    def render(messages: list[forms.Message]) -> str:
        try:
            return template.render(messages=messages)
        except (Raised, SecurityError, MemoryError):
            raise
        except Exception as error:
            with contextlib.suppress(Exception):
                return template.render(messages=messages, **NO_TOOLS)
            raise error from None

    return render


class Raised(Exception):
    """By the template itself, by `raise_exception`: its maker's words."""


IN_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (MemoryError, f"it needs more than {MEMORY_BYTES >> 20} MB of memory"),
    (SecurityError, "it reaches for what is unsafe to give to a template"),
    (RecursionError, "its recursion has no end"),
    (UnicodeError, "it writes what is no text: half of a character (a surrogate)"),
    (ZeroDivisionError, "it makes a division by 0"),
    (OverflowError, "a number or a range in it is too large"),
    (jinja2.UndefinedError, "it needs something that is not given to it"),
    (jinja2.TemplateNotFound, "it includes another file, and there is none"),
    (jinja2.TemplateRuntimeError, "it uses a filter or a test that there is not"),
    (TypeError, "it uses a value of another kind than it expects"),
    (ValueError, "it uses a value that cannot be what it says"),
    (LookupError, "it looks for something that is not there"),
)
"""What Python and Jinja say of these names their own types, which help nobody who reads a job's error."""


def _in_words(error: Exception) -> str:
    if isinstance(error, (Raised, forms.LeftOut)):
        reason = str(error).strip() or "it raises an error without a word"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        reason = f"{error.message} (line {error.lineno})"
    else:
        reason = next((words for kind, words in IN_WORDS if isinstance(error, kind)), "it fails")
        frames_in = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames_in if frame.f_code.co_filename == "<template>"]
        reason += f" (line {lines[-1]})" if lines else ""
    return reason[:MAX_REASON_CHARS].encode(errors="replace").decode()


def _raise(message: str) -> NoReturn:
    raise Raised(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the day where the machine stands, as all do that render


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own writes HTML's characters as escapes, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks replies for training and means nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--fd", type=int, required=True)
    _serve(arguments.parse_args().fd)
