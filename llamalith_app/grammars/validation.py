"""Validates a whole reply against a JSON Schema that a grammar could not enforce completely.

Owns the validator and its formats. `schema.py` asks it whether a schema can be validated against at all.
`python -m llamalith_app.grammars.validation` is a program that `jobs/schemas.py` starts and may kill, because a pattern
or a reply can be malicious: it reads a Task from standard input and writes a Result to standard output, both as JSON.
It follows no reference out of the schema.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec
from llguidance import LLMatcher, LLTokenizer

from llamalith_app.grammars import grammar, keywords
from llamalith_app.supervise.limits import limit

CPU_S = 2.0
"""Seconds of processor time for one validation."""
ADDRESS_SPACE_BYTES = 2 * 1024 * 1024 * 1024
MAX_REASON = 300


class Task(msgspec.Struct):
    schema: Any
    reply: str


class Result(msgspec.Struct):
    problem: str
    """The first part of the reply that does not fit, and why. Empty: the reply fits."""


class SchemaFlaw(NamedTuple):
    """Why nothing can be validated against a schema, and the pointer to the reason."""

    at: str
    reason: str


def schema_flaw(schema: Any) -> SchemaFlaw | None:
    """The reason why nothing can be validated against this schema; None: there is none."""
    try:
        _validator(keywords.simplify(schema))
    except jsonschema_rs.ValidationError as error:
        return SchemaFlaw(_pointer(error.instance_path), _first_line(error.message))
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return SchemaFlaw("#", _first_line(str(error)))
    return None


def unreadable_patterns(schema: Any) -> list[str]:
    """JSON pointers to the patterns that the validator cannot compile."""
    found = []

    def read(at: str, part: dict[str, Any]) -> dict[str, Any]:
        pattern = part.get("pattern")
        if isinstance(pattern, str) and schema_flaw({"pattern": pattern}):
            found.append(f"{at}/pattern")
        return part

    keywords.rewrite(schema, read)
    return found


def problem(schema: Any, reply: str) -> str:
    """The first part of the reply that does not fit, and why; empty: the reply fits.

    Ignores patterns that it cannot compile: they were enforced while the reply was written, or the schema would have
    been refused. Raises RecursionError for JSON that is nested more than about 1000 deep, and ValueError for numbers of
    thousands of digits.
    """
    try:
        value = json.loads(reply)
    except json.JSONDecodeError as error:
        return _first_line(f"is no JSON: {error}")
    simple = keywords.simplify(schema)
    if schema_flaw(simple):
        simple = keywords.remove(simple, unreadable_patterns(simple))
    try:
        _validator(simple).validate(value)
    except jsonschema_rs.ValidationError as error:
        return f"at {_pointer(error.instance_path)[:MAX_REASON]}: {_first_line(error.message)}"
    return ""


def _validator(simple: Any) -> Any:
    return jsonschema_rs.validator_for(
        simple,
        # A format may decide a `oneOf`, a `not` or an `if`. A simplified schema has no formats that are annotations.
        validate_formats=True,
        formats=_FORMATS,
        offline=True,
        pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=1_000_000),
    )


def _has_format(name: str, text: str) -> bool:
    """Whether the text has the format for jsonschema_rs, or for llguidance, which wrote the reply and allows more: a
    leap second at any hour, the 29th of February of any year, an e-mail address with a long name. For older drafts,
    jsonschema_rs knows fewer formats."""
    if _newest_draft_validator(name).is_valid(text):
        return True
    matcher = _matcher(name)
    tokens = list(json.dumps(text, ensure_ascii=False).encode(errors="replace"))
    has_format = bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())
    matcher.reset()
    return has_format


@cache
def _newest_draft_validator(name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({"format": name}, validate_formats=True)


@cache
def _matcher(name: str) -> LLMatcher:
    return LLMatcher(LLTokenizer("byte"), grammar.from_schema({"type": "string", "format": name}), log_level=0)


_FORMATS: dict[str, Callable[[str], bool]] = {name: partial(_has_format, name) for name in keywords.FORMATS}


def _pointer(path: list[str | int]) -> str:
    return "#" + "".join(f"/{keywords.escaped(str(key))}" for key in path)


def _first_line(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= MAX_REASON else f"{first[:MAX_REASON]}…"


def main() -> None:
    """The program: limits its own processor time and memory, then validates one reply."""
    limit(CPU_S, ADDRESS_SPACE_BYTES)
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdout.buffer.write(msgspec.json.encode(Result(problem(task.schema, task.reply))))


if __name__ == "__main__":
    main()
