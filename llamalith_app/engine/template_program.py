"""The program that compiles and renders a chat template, and the messages between it and `template.py`.

`python -m llamalith_app.engine.template_program --fd N` reads a `TemplateSource` from a socket, answers `Ready`, and
then renders one `Conversation` after another. Owns the limits on a template's processor time and memory, and the
reasons that people read when a template fails. Jinja's sandbox keeps a template from Python's internals. Knows neither
llama.cpp nor the process that supervises it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import signal
import socket
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import msgspec
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamalith_app.engine import forms, frames
from llamalith_app.engine.messages import ChatMessage
from llamalith_app.supervise import parent

RENDER_CPU_S = 1.0
"""Seconds of processor time for one conversation, and for compiling. Milliseconds are usual."""
MEMORY_BYTES = 256 * 1024 * 1024
"""Address space of the process. It takes 35 MB while idle."""
MEMORY_BYTES_A_CHAR = 32
"""Address space in addition, for each character of the conversation."""
MAX_REASON_CHARS = 500
MAX_CHARS = 1_000_000
"""A prompt may have this many characters more than four times its conversation, because tokenizing takes time too."""
NO_TOOLS: dict[str, list[Any]] = {"tools": [], "functions": []}
"""For a template that fails if these are None."""


class TemplateSource(msgspec.Struct, frozen=True):
    """First message to the process: the template's text, and the texts of the tokens that begin and end a sequence."""

    source: str
    bos: str
    eos: str


class Conversation(msgspec.Struct, frozen=True):
    messages: list[ChatMessage]
    arguments: dict[str, bool | int | float | str | None] = {}


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The template is compiled, or cannot be. In the second case each conversation is answered with `Failed`."""

    system: Literal["own", "first", "last", "none"]
    """As PromptFormat has it."""


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    prompt: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str


Answer = Ready | Rendered | Failed


class RaisedByTemplate(Exception):
    """The template called `raise_exception`. The message is its maker's."""


def serve(fd: int) -> None:
    """Renders conversations from the socket `fd` until its other end is closed."""
    # The engine cannot end this process when it dies itself, and this process may be stopped or hang then.
    parent.die_with_parent()
    connection = socket.socket(fileno=fd)
    template = frames.read(connection, msgspec.msgpack.Decoder(TemplateSource))
    if template is None:
        return
    _set_limits(n_chars=len(template.source))
    render = compile_template(template)

    def render_trial(messages: list[forms.Message]) -> str:
        _set_limits(n_chars=len(template.source))
        return render(messages)

    form = forms.detect(render_trial)
    _lift_limits()
    connection.sendall(frames.encode(Ready(form.system or "none")))
    conversations = msgspec.msgpack.Decoder(Conversation)
    while (conversation := frames.read(connection, conversations)) is not None:
        n_chars = sum(len(message.content) for message in conversation.messages)
        _set_limits(n_chars)
        answer = _answer(render, form, conversation, MAX_CHARS + 4 * n_chars)
        _lift_limits()
        connection.sendall(answer)


def _set_limits(n_chars: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY_BYTES + MEMORY_BYTES_A_CHAR * n_chars
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    # Counts this process's processor time, however busy the machine is. The signal ends the process by default.
    signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_S)


def _lift_limits() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _answer(render: Callable[..., str], form: forms.Form, conversation: Conversation, max_chars: int) -> bytes:
    """The frame of a `Rendered` or `Failed`."""
    try:
        prompt = render(form.apply(conversation.messages), **conversation.arguments)
        if len(prompt) > max_chars:
            return frames.encode(Failed(f"it makes a prompt of {len(prompt)} characters; {max_chars} are allowed"))
        return frames.encode(Rendered(prompt))
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return frames.encode(Failed(_reason(error)))


def compile_template(template: TemplateSource) -> Callable[..., str]:
    """Returns a function that renders messages, with arguments by name, and with the globals that Transformers and
    llama-cpp-python give to a template. It raises whatever the template raises. For a template that cannot be
    compiled, it raises the reason."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals = environment.globals | {
        "bos_token": template.bos,
        "eos_token": template.eos,
        "add_generation_prompt": True,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        # Some templates distinguish None from undefined.
        "tools": None,
        "tool_choice": None,
        "functions": None,
        "function_call": None,
    }
    try:
        compiled = environment.from_string(template.source)
    except Exception as error:  # noqa: BLE001 - a template may be anything
        # Only the text is kept: the error itself would hold all frames that it passed through.
        reason = f"it cannot be compiled: {_reason(error)}"

        def refuse(_: list[forms.Message], **__: object) -> NoReturn:
            raise RaisedByTemplate(reason)

        return refuse

    def render(messages: list[forms.Message], **arguments: object) -> str:
        try:
            return compiled.render(messages=messages, **arguments)
        except (RaisedByTemplate, SecurityError, MemoryError):
            raise
        except Exception as error:
            with contextlib.suppress(Exception):
                return compiled.render(messages=messages, **arguments, **NO_TOOLS)
            raise error from None

    return render


REASONS: tuple[tuple[type[Exception], str], ...] = (
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
"""Python's and Jinja's own messages name Python types, which do not help a person who reads a job's error."""


def _reason(error: Exception) -> str:
    """What went wrong, for people, with the line of the template."""
    if isinstance(error, (RaisedByTemplate, forms.ContentDropped)):
        reason = str(error).strip() or "it raises an error without a word"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        reason = f"{error.message} (line {error.lineno})"
    else:
        reason = next((words for kind, words in REASONS if isinstance(error, kind)), "it fails")
        frames_in = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames_in if frame.f_code.co_filename == "<template>"]
        reason += f" (line {lines[-1]})" if lines else ""
    return reason[:MAX_REASON_CHARS].encode(errors="replace").decode()


def _raise_exception(message: str) -> NoReturn:
    raise RaisedByTemplate(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - local time, as every program that renders templates has it


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML's characters, and no model was trained on such prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks replies for training. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--fd", type=int, required=True)
    serve(arguments.parse_args().fd)
