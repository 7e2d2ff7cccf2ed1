"""The subschemas of a JSON Schema, found by their place and by reference, and what is wrong with them by themselves.

Owns the walk through a schema and the checks that need no compiling: nesting, references, constants that no reply can
write, and circles without an end. `schema.py` calls it first. Follows no reference out of the schema. Pure; knows
nothing of llguidance but its limits.

A place is a JSON pointer that begins with `#`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from llamalith_app.grammars.grammar import LAST_EXACT
from llamalith_app.grammars.keywords import escaped, unescaped

MAX_DEPTH = 100
"""Limit for nested brackets. llguidance's own reader of JSON gives up at little more."""
DEFINITIONS = ("$defs", "definitions")
IN_MAPS = ("properties", "patternProperties", *DEFINITIONS)
IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties")
REFUSED = ("$dynamicRef", "$recursiveRef", "x-guidance")
"""Keywords that would change the meaning of other parts."""

UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""JSON needs \\u for these characters, and replies have no \\u (`grammar.ESCAPES`)."""
UNWRITABLE_IS = "a control character that no reply can hold: only \\n, \\r, \\t, \\b and \\f are"


class InvalidSchema(Exception):
    """No reply can be held to the schema because of the part at the pointer `at`. `reason` is for people."""

    def __init__(self, at: str, reason: str) -> None:
        super().__init__(reason)
        self.at = at
        self.reason = reason


class Subschema(NamedTuple):
    """A part of a schema, with its place."""

    at: str
    schema: Any


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


def all_subschemas(schema: Any) -> dict[str, Any]:
    """All subschemas by their places, deeper ones first, including those that only a reference leads to. Raises
    InvalidSchema."""
    if _depth(schema) > MAX_DEPTH:
        raise InvalidSchema("#", f"is nested more than {MAX_DEPTH} deep")
    return _walk(schema, excluding=())


def used_subschemas(schema: Any) -> dict[str, Any]:
    """`all_subschemas` without definitions that no reference leads to."""
    return _walk(schema, excluding=DEFINITIONS)


def _walk(schema: Any, *, excluding: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = [Subschema("#", schema)]
    while waiting:
        part = waiting.pop()
        if part.at in found:
            continue
        found[part.at] = part.schema
        if not isinstance(part.schema, (dict, bool)):
            raise InvalidSchema(part.at, "is no schema: expected an object or a boolean")
        waiting += children(part, excluding)
        if isinstance(part.schema, dict):
            for keyword in REFUSED:
                if keyword in part.schema:
                    raise InvalidSchema(f"{part.at}/{keyword}", f"{keyword} is not supported")
            if "$id" in part.schema and part.at != "#" and has_references(part.schema):
                raise InvalidSchema(f"{part.at}/$id", "$id is not supported where a $ref within it would start from it")
            if "$ref" in part.schema:
                waiting.append(referenced(schema, part))
    return dict(reversed(found.items()))


def has_references(value: Any) -> bool:
    """Whether there is a `$ref` anywhere in the value."""
    if isinstance(value, list):
        return any(map(has_references, value))
    return isinstance(value, dict) and ("$ref" in value or any(map(has_references, value.values())))


def children(part: Subschema, excluding: Collection[str] = ()) -> Iterator[Subschema]:
    """The subschemas directly inside this one, except those under the excluded keywords."""
    if not isinstance(part.schema, dict):
        return
    for key, value in part.schema.items():
        at = f"{part.at}/{escaped(key)}"
        if key in excluding:
            continue
        if key in IN_MAPS and isinstance(value, dict):
            yield from (Subschema(f"{at}/{escaped(name)}", inner) for name, inner in value.items())
        elif key in IN_LISTS and isinstance(value, list):
            yield from (Subschema(f"{at}/{index}", inner) for index, inner in enumerate(value))
        elif key in ALONE:
            yield Subschema(at, value)


def referenced(root: Any, part: Subschema) -> Subschema:
    """The subschema that the `$ref` of this one leads to. Raises InvalidSchema."""
    reference = part.schema["$ref"]
    at = f"{part.at}/$ref"
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise InvalidSchema(at, "leads out of the schema: only # and #/… are followed")
    found, place = root, "#"
    for segment in reference.split("/")[1:]:
        key = unescaped(segment)
        if isinstance(found, list) and key.isdecimal() and len(key) < 10 and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise InvalidSchema(at, f"leads to nothing: there is no {reference[:200]}")
        place += f"/{escaped(key)}"
    return Subschema(place, found)


def check_writable(parts: dict[str, Any]) -> None:
    """Raises InvalidSchema for a constant that a reply cannot write, or that floats do not distinguish from another."""
    for at, schema in parts.items():
        if not isinstance(schema, dict):
            continue
        names = schema.get("properties")
        if isinstance(names, dict) and any(map(UNWRITABLE.search, names)):
            raise InvalidSchema(f"{at}/properties", f"has a name with {UNWRITABLE_IS}")
        fixed = {key: schema[key] for key in ("const", "enum") if key in schema}
        for place, value in _scalars(Subschema(at, fixed)):
            if isinstance(value, str) and UNWRITABLE.search(value):
                raise InvalidSchema(place, f"has {UNWRITABLE_IS}")
            if isinstance(value, (int, float)) and abs(value) > LAST_EXACT:
                reason = (
                    f"cannot be distinguished from its neighbours: expected a number within ±{LAST_EXACT}, or a text"
                )
                raise InvalidSchema(place, reason)


def _scalars(part: Subschema) -> Iterator[Subschema]:
    """The numbers, texts, booleans and nulls in a value, with their places."""
    at, value = part
    if not isinstance(value, (dict, list)):
        yield part
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _scalars(Subschema(f"{at}/{escaped(str(key))}", inner))


def check_endings(parts: dict[str, Any]) -> None:
    """Raises InvalidSchema for a subschema that every value would need to repeat inside itself without an end."""
    ending: set[str] = set()
    root = parts["#"]
    while True:
        new = {at for at, schema in parts.items() if at not in ending and _can_end(root, Subschema(at, schema), ending)}
        if not new:
            break
        ending |= new
    for at in parts:
        if at not in ending:
            raise InvalidSchema(at, "goes round in a circle: no value that fits it could ever end")


def _can_end(root: Any, part: Subschema, ending: set[str]) -> bool:
    """Whether a value of this subschema can end, given those that can (`ending`)."""
    at, schema = part
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and referenced(root, part).at not in ending:
        return False
    if any(f"{at}/allOf/{index}" not in ending for index in range(length(schema.get("allOf")))):
        return False
    for either in ("anyOf", "oneOf"):
        n_choices = length(schema.get(either))
        if n_choices and not any(f"{at}/{either}/{index}" in ending for index in range(n_choices)):
            return False
    if "const" in schema or "enum" in schema:
        return True
    types = schema.get("type", "string")
    types = types if isinstance(types, list) else [types]
    if any(name not in ("object", "array") for name in types):
        return True
    return ("object" in types and _object_can_end(part, ending)) or ("array" in types and _array_can_end(part, ending))


def _object_can_end(part: Subschema, ending: set[str]) -> bool:
    properties, required = part.schema.get("properties", {}), part.schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    return all(
        not isinstance(name, str) or name not in properties or f"{part.at}/properties/{escaped(name)}" in ending
        for name in required
    )


def _array_can_end(part: Subschema, ending: set[str]) -> bool:
    least, first = part.schema.get("minItems", 0), part.schema.get("prefixItems", [])
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    places = [f"{part.at}/prefixItems/{index}" for index in range(min(least, len(first)))]
    if least > len(first) and isinstance(part.schema.get("items"), dict):
        places.append(f"{part.at}/items")
    return all(place in ending for place in places)


def value_at(pointer: str, schema: Any) -> Any:
    """The value at a place that exists."""
    for segment in pointer.split("/")[1:]:
        key = segment.replace("~1", "/").replace("~0", "~")
        schema = schema[int(key) if isinstance(schema, list) else key]
    return schema


def keyword_value(schema: Any, keyword: str) -> Any:
    """The value of a keyword; None for a schema without it."""
    return schema.get(keyword) if isinstance(schema, dict) else None


def length(value: Any) -> int:
    """The length of a list; 0 for anything else."""
    return len(value) if isinstance(value, list) else 0
