"""Judges a JSON Schema: can replies be held to it, and if not, which part of it is why.

`python -m llamalith_app.schema` is a program of its own, to be killed: what llguidance does with some schemas takes
minutes and cannot be interrupted. One schema on standard input; on standard output a Verdict a line, of which the
last one counts. Reads only the schema: no reference to anything outside is followed.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from llamalith_app import grammar

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 100
"""Of brackets in one another; llguidance's own reader of JSON gives up a little beyond."""
CPU_S = 1.0
"""Processor time that judging may take, and so about what the engine's compiling takes."""
GROWTH_BYTES = 32 * 1024 * 1024
"""What a compiled schema may take: the engine's memory is planned with it."""
ADDRESS_SPACE_BYTES = 2 * 1024 * 1024 * 1024

IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties")
REFUSED = ("$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef", "x-guidance")
"""Keywords that would change what other parts mean."""

UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""JSON writes these by \\u alone, which replies do not have (`grammar.ESCAPES`)."""
UNWRITABLE_IS = "a control character that no reply can hold: only \\n, \\r, \\t, \\b and \\f are"


class Verdict(msgspec.Struct, kw_only=True):
    reason: str | None
    """None: replies can be held to it."""
    at: str = "#"
    """A JSON pointer to the part that is why."""


class Flaw(Exception):
    def __init__(self, at: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = Verdict(reason=reason, at=at)


class _Part(NamedTuple):
    at: str
    schema: Any


def judge(schema: Any) -> Iterator[Verdict]:
    """The verdict, then a better one where that takes more time."""
    try:
        parts = _parts(schema)
        _must_be_counted(parts)
        _must_be_writable(parts)
        _must_end(parts)
    except Flaw as flaw:
        yield flaw.verdict
        return
    before = _peak_bytes()
    reason = _compiled(schema)
    grown = _peak_bytes() - before
    if not reason and grown > GROWTH_BYTES:
        reason = f"takes {grown >> 20} MiB of memory when compiled; {GROWTH_BYTES >> 20} are allowed"
        yield Verdict(reason=reason)
        return
    yield Verdict(reason=reason or None)
    if reason:
        yield _located(schema, parts, reason)


def _peak_bytes() -> int:
    """The most memory that this program ever had. `getrusage` would tell that of the process that started it too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
    return depth


def _parts(schema: Any) -> dict[str, Any]:
    """Every schema in the schema, by its place, deeper ones first; also those that only a reference leads to."""
    if _depth(schema) > MAX_DEPTH:
        raise Flaw("#", f"is nested more than {MAX_DEPTH} deep")
    found: dict[str, Any] = {}
    waiting = [_Part("#", schema)]
    while waiting:
        part = waiting.pop()
        if part.at in found:
            continue
        found[part.at] = part.schema
        if not isinstance(part.schema, (dict, bool)):
            raise Flaw(part.at, "is no schema: expected an object or a boolean")
        waiting += _children(part)
        if isinstance(part.schema, dict):
            for keyword in REFUSED:
                if keyword in part.schema and not (keyword == "$id" and part.at == "#"):
                    raise Flaw(f"{part.at}/{keyword}", f"{keyword} is not supported")
            if "$ref" in part.schema:
                waiting.append(_target(schema, part))
    return dict(reversed(found.items()))


def _children(part: _Part) -> Iterator[_Part]:
    if not isinstance(part.schema, dict):
        return
    for key, value in part.schema.items():
        at = f"{part.at}/{_escaped(key)}"
        if key in grammar.IN_MAPS and isinstance(value, dict):
            yield from (_Part(f"{at}/{_escaped(name)}", inner) for name, inner in value.items())
        elif key in IN_LISTS and isinstance(value, list):
            yield from (_Part(f"{at}/{index}", inner) for index, inner in enumerate(value))
        elif key in ALONE:
            yield _Part(at, value)


def _target(root: Any, part: _Part) -> _Part:
    """What the part's reference leads to."""
    reference = part.schema["$ref"]
    at = f"{part.at}/$ref"
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise Flaw(at, "leads out of the schema: only # and #/… are followed")
    found, place = root, "#"
    for escaped in reference.split("/")[1:]:
        key = unquote(escaped).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and len(key) < 10 and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise Flaw(at, f"leads to nothing: there is no {reference[:200]}")
        place += f"/{_escaped(key)}"
    return _Part(place, found)


def _must_be_counted(parts: dict[str, Any]) -> None:
    """Raises Flaw for a least number of properties that one name could reach by standing there again and again."""
    for at, schema in parts.items():
        if not isinstance(schema, dict) or not isinstance(schema.get("minProperties"), int):
            continue
        required = schema.get("required")
        most = 1 + (len(set(map(str, required))) if isinstance(required, list) else 0)
        if schema["minProperties"] > most:
            raise Flaw(
                f"{at}/minProperties",
                f"is more than can be held to: expected at most {most}, one more than the names in required",
            )


def _must_be_writable(parts: dict[str, Any]) -> None:
    """Raises Flaw for a constant that a reply has no way to write, or no way that tells it from another."""
    for at, schema in parts.items():
        if not isinstance(schema, dict):
            continue
        names = schema.get("properties")
        if isinstance(names, dict) and any(map(UNWRITABLE.search, names)):
            raise Flaw(f"{at}/properties", f"has a name with {UNWRITABLE_IS}")
        fixed = {key: schema[key] for key in ("const", "enum") if key in schema}
        for place, value in _scalars(_Part(at, fixed)):
            if isinstance(value, str) and UNWRITABLE.search(value):
                raise Flaw(place, f"has {UNWRITABLE_IS}")
            if isinstance(value, (int, float)) and abs(value) > grammar.LAST_EXACT:
                reason = (
                    f"cannot be told from its neighbours: expected a number within ±{grammar.LAST_EXACT}, or a text"
                )
                raise Flaw(place, reason)


def _scalars(part: _Part) -> Iterator[_Part]:
    """The values in a value that hold no others."""
    at, value = part
    if not isinstance(value, (dict, list)):
        yield part
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _scalars(_Part(f"{at}/{_escaped(str(key))}", inner))


def _must_end(parts: dict[str, Any]) -> None:
    """Raises Flaw for a part of which no instance has an end, as where each must hold another one."""
    ending: set[str] = set()
    root = parts["#"]
    while True:
        new = {at for at, schema in parts.items() if at not in ending and _can_end(root, _Part(at, schema), ending)}
        if not new:
            break
        ending |= new
    for at in parts:
        if at not in ending:
            raise Flaw(at, "goes round in a circle: no value that fits it could ever end")


def _can_end(root: Any, part: _Part, ending: set[str]) -> bool:
    """As far as is known by now."""
    at, schema = part
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and _target(root, part).at not in ending:
        return False
    if any(f"{at}/allOf/{index}" not in ending for index in range(_length(schema.get("allOf")))):
        return False
    for either in ("anyOf", "oneOf"):
        n_choices = _length(schema.get(either))
        if n_choices and not any(f"{at}/{either}/{index}" in ending for index in range(n_choices)):
            return False
    if "const" in schema or "enum" in schema:
        return True
    types = schema.get("type", "string")
    types = types if isinstance(types, list) else [types]
    if any(one not in ("object", "array") for one in types):
        return True
    return ("object" in types and _object_can_end(part, ending)) or ("array" in types and _array_can_end(part, ending))


def _object_can_end(part: _Part, ending: set[str]) -> bool:
    properties, required = part.schema.get("properties", {}), part.schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    return all(
        not isinstance(name, str) or name not in properties or f"{part.at}/properties/{_escaped(name)}" in ending
        for name in required
    )


def _array_can_end(part: _Part, ending: set[str]) -> bool:
    least, first = part.schema.get("minItems", 0), part.schema.get("prefixItems", [])
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    places = [f"{part.at}/prefixItems/{index}" for index in range(min(least, len(first)))]
    if least > len(first) and isinstance(part.schema.get("items"), dict):
        places.append(f"{part.at}/items")
    return all(place in ending for place in places)


def _compiled(schema: Any) -> str:
    try:
        return grammar.problem(grammar.of_schema(schema))
    except ValueError as error:
        return grammar.sentence(str(error))


def _located(schema: Any, parts: dict[str, Any], reason: str) -> Verdict:
    """Goes down to the smallest part that alone has the fault."""
    inside = _moved(schema)
    frame = {"$schema": inside.pop("$schema")} if isinstance(inside, dict) and "$schema" in inside else {}
    best, seen = Verdict(reason=reason), {"#"}
    while True:
        part = _Part(best.at, parts[best.at])
        below = [child.at for child in _children(part)]
        if isinstance(part.schema, dict) and "$ref" in part.schema:
            below.append(_target(schema, part).at)
        for at in below:
            if at in seen:
                continue
            seen.add(at)
            reference = "#/$defs/it" + "".join(f"/{_quoted(key)}" for key in at.split("/")[1:])
            found = _compiled(frame | {"$defs": {"it": inside}, "$ref": reference})
            if found and (found == best.reason or found.startswith("Unsatisfiable")):
                best = Verdict(reason=found, at=at)
                break
        else:
            return best


def _moved(value: Any) -> Any:
    """A copy that stands at #/$defs/it: its references say so."""
    if isinstance(value, list):
        return [_moved(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: f"#/$defs/it{inner[1:]}" if key == "$ref" and isinstance(inner, str) else _moved(inner)
        for key, inner in value.items()
        if key != "$id"
    }


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _quoted(key: str) -> str:
    return "".join(c if c.isalnum() or c in "$-_.~" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in key)


def main() -> None:
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for verdict in judge(json.loads(sys.stdin.buffer.read())):
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
