"""The chat template of a GGUF: a program of the model's maker, run in a process of its own.

Jinja's sandbox keeps it from reaching Python, not from running for ever or filling the memory; and one multiplication
of large numbers holds Python's lock, so that no thread beside it could stop it. So a small process compiles and renders
it, the system ends that process when it has computed for too long, and the next conversation gets a new one. It ends by
itself when the engine child is gone. Knows no llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamalith_app.engine import frames
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.engine.steps import Refusal

RENDER_CPU_S = 1.0
"""Seconds of computing for one conversation, and for compiling; milliseconds are usual."""
MEMORY_BYTES = 256 * 1024 * 1024
"""Address space of the process, 35 MB of which it takes to stand idle."""
MEMORY_BYTES_A_CHAR = 32
"""And as much more for each character of the conversation."""
MAX_REASON_CHARS = 500
MAX_CHARS = 1_000_000
"""A prompt may have as many characters more than four times its conversation: tokenizing takes time, too."""


class Program(msgspec.Struct, frozen=True):
    """First message to the process."""

    source: str
    bos: str
    eos: str


class Conversation(msgspec.Struct, frozen=True):
    messages: list[ChatMessage]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    prompt: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str


class TemplateFailed(Exception):
    """The template refuses the conversation in this form; the message is its own reason."""


class Template:
    """Used by one thread at a time; ended by `close`."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._program = frames.encode(Program(source, bos, eos))
        self._answers: msgspec.msgpack.Decoder[Rendered | Failed] = msgspec.msgpack.Decoder(Rendered | Failed)
        self._start()

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Raises TemplateFailed, or Refusal where the template takes more time or memory than it is given."""
        if self._process.poll() is not None:
            self.close()
            self._start()
        try:
            self._connection.sendall(frames.encode(Conversation(list(messages))))
            answer = frames.read(self._connection, self._answers)
        except (ConnectionError, frames.BrokenFrame):
            answer = None
        if answer is None:
            self.close()
            raise Refusal("template", f"The model's chat template {self._how_it_ended()}.")
        if isinstance(answer, Failed):
            raise TemplateFailed(answer.reason)
        return answer.prompt

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "llamalith_app.engine.template", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # The worker takes the engine for alive while somebody holds the engine's.
                stderr=subprocess.DEVNULL,
            )
        try:
            self._connection.sendall(self._program)
        except ConnectionError:
            pass  # told by the next `render`

    def _how_it_ended(self) -> str:
        if self._process.returncode == -signal.SIGPROF:
            return f"computes for more than {RENDER_CPU_S:g} s"
        return f"ended its process (exit code {self._process.returncode})"


def _serve(fd: int) -> None:
    """The process: compiles the program, then renders one conversation after another."""
    connection = socket.socket(fileno=fd)
    program = frames.read(connection, msgspec.msgpack.Decoder(Program))
    if program is None:
        return
    _bound(n_chars=len(program.source))
    render = _compiled(program)
    _unbound()
    conversations = msgspec.msgpack.Decoder(Conversation)
    while (conversation := frames.read(connection, conversations)) is not None:
        n_chars = sum(len(message.content) for message in conversation.messages)
        _bound(n_chars)
        answer = _answer(render, conversation, MAX_CHARS + 4 * n_chars)
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


def _answer(render: Callable[..., str], conversation: Conversation, max_chars: int) -> bytes:
    told = [{"role": message.role, "content": message.content} for message in conversation.messages]
    try:
        prompt = render(messages=told)
        if len(prompt) > max_chars:
            return frames.encode(Failed(f"it makes a prompt of {len(prompt)} characters; {max_chars} are allowed"))
        return frames.encode(Rendered(prompt))
    except MemoryError:
        return frames.encode(Failed(f"it needs more than {MEMORY_BYTES >> 20} MB of memory"))
    except Exception as error:  # noqa: BLE001 - it is a program of the model's maker
        return frames.encode(Failed(_told(error)))


def _compiled(program: Program) -> Callable[..., str]:
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
        return environment.from_string(program.source).render
    except Exception as error:  # noqa: BLE001 - it is a program of the model's maker
        reason = f"it cannot be compiled: {_told(error)}"

        def refuse(**_: object) -> NoReturn:
            raise ValueError(reason)

        return refuse


def _told(error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    return reason[:MAX_REASON_CHARS].encode(errors="replace").decode()


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


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
