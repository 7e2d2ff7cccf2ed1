"""Validates a whole reply against a JSON Schema, where no grammar could hold it to all of that while it was written.

`python -m llamalith_app.validation` is a program of its own, to be killed: a pattern or a reply may mean harm. On
standard input a schema and a reply as JSON; on standard output a Result. Follows no reference to anything outside.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec

from llamalith_app import keywords, parent

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
    """Why nothing can be validated against this schema; None: everything can."""
    try:
        _validator(schema)
    except jsonschema_rs.ValidationError as error:
        return SchemaFlaw(_pointer(error.instance_path), _short(error.message))
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return SchemaFlaw("#", _short(str(error)))
    return None


def problem(schema: Any, reply: str) -> str:
    """The first thing that does not fit; empty: the reply fits.

    Raises RecursionError or ValueError for JSON that is nested more than about 1000 deep or has numbers of thousands of
    digits.
    """
    try:
        value = json.loads(reply)
    except json.JSONDecodeError as error:
        return _short(f"is no JSON: {error}")
    try:
        _validator(schema).validate(value)
    except jsonschema_rs.ValidationError as error:
        return f"at {_pointer(error.instance_path)[:MAX_REASON]}: {_short(error.message)}"
    return ""


def _validator(schema: Any) -> Any:
    return jsonschema_rs.validator_for(
        keywords.plain(schema),
        # The formats that count are held to while the reply is written.
        validate_formats=False,
        offline=True,
        pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=1_000_000),
    )


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
