"""Validates a whole reply against a JSON Schema, where no grammar could hold it to all of that while it was written.

`python -m llamalith_app.grammars.validation` is a program of its own, to be killed: a pattern or a reply may mean harm.
It reads a schema and a reply as JSON from standard input and writes a Result to standard output. It follows no
reference to anything outside.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.grammars import grammar, keywords
from llamalith_app.supervise import parent

CPU_S = 2.0
"""Processor time that one validation may take."""
ADDRESS_SPACE_BYTES = 2 * 1024 * 1024 * 1024
MAX_REASON = 300


class Task(msgspec.Struct):
    schema: Any
    reply: str


class Result(msgspec.Struct):
    problem: str
    """The first thing that does not fit, and where; empty: the reply fits."""


class SchemaFlaw(NamedTuple):
    at: str
    reason: str


def flaw(schema: Any) -> SchemaFlaw | None:
    """Why nothing can be validated against the whole of this schema; None: everything can."""
    try:
        _validator(keywords.plain(schema))
    except jsonschema_rs.ValidationError as error:
        return SchemaFlaw(_pointer(error.instance_path), _short(error.message))
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return SchemaFlaw("#", _short(str(error)))
    return None


def unreadable(schema: Any) -> list[str]:
    """JSON pointers to the patterns that nothing can be validated against."""
    found = []

    def read(at: str, part: dict[str, Any]) -> dict[str, Any]:
        pattern = part.get("pattern")
        if isinstance(pattern, str) and flaw({"pattern": pattern}):
            found.append(f"{at}/pattern")
        return part

    keywords.changed(schema, read)
    return found


def problem(schema: Any, reply: str) -> str:
    """The first thing that does not fit; empty: the reply fits. Passes over patterns that it cannot read: they were
    enforced while the reply was written, or the schema had been refused.

    Raises RecursionError or ValueError for JSON that is nested more than about 1000 deep or has numbers of thousands of
    digits.
    """
    try:
        value = json.loads(reply)
    except json.JSONDecodeError as error:
        return _short(f"is no JSON: {error}")
    plain = keywords.plain(schema)
    if flaw(plain):
        plain = keywords.without(plain, unreadable(plain))
    try:
        _validator(plain).validate(value)
    except jsonschema_rs.ValidationError as error:
        return f"at {_pointer(error.instance_path)[:MAX_REASON]}: {_short(error.message)}"
    return ""


def _validator(plain: Any) -> Any:
    return jsonschema_rs.validator_for(
        plain,
        # A format decides which schema of a `oneOf`, a `not` or an `if` fits; all others are gone from a plain schema.
        validate_formats=True,
        formats=_FORMATS,
        offline=True,
        pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=1_000_000),
    )


def _has_format(name: str, text: str) -> bool:
    """Also where only a reply held to the format may be such a text: jsonschema_rs refuses a leap second at any hour,
    the 29th of February of any year, an e-mail address with a long name. To older drafts it knows fewer formats."""
    if _of_newest_draft(name).is_valid(text):
        return True
    matcher = _matcher(name)
    tokens = list(json.dumps(text, ensure_ascii=False).encode(errors="replace"))
    has_format = bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())
    matcher.reset()
    return has_format


@cache
def _of_newest_draft(name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({"format": name}, validate_formats=True)


@cache
def _matcher(name: str) -> LLMatcher:
    return LLMatcher(LLTokenizer("byte"), grammar.of_schema({"type": "string", "format": name}), log_level=0)


_FORMATS: dict[str, Callable[[str], bool]] = {name: partial(_has_format, name) for name in keywords.FORMATS}


def _pointer(path: list[str | int]) -> str:
    return "#" + "".join(f"/{keywords.escaped(str(key))}" for key in path)


def _short(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= MAX_REASON else f"{first[:MAX_REASON]}…"


def main() -> None:
    parent.die_with_parent()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdout.buffer.write(msgspec.json.encode(Result(problem(task.schema, task.reply))))


if __name__ == "__main__":
    main()
