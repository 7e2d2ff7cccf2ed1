"""Which keywords of a JSON Schema can hold a reply to it while it is written, and which have no effect.

Owns the tables of formats and keywords, which a test compares with llguidance, and the functions that rewrite a schema.
`schema.py`, `grammar.py` and `validation.py` use them. Pure.

llguidance refuses a schema with any format or keyword that it does not know. `simplify` removes annotations, as JSON
Schema calls them, and keywords that allow everything. `remove` takes out what only a validation of the whole reply can
check. A pointer is a JSON pointer that begins with `#`; a part is a schema inside a schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any
from urllib.parse import unquote

FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
"""The formats that are enforced. JSON Schema 2020-12 treats all others as annotations."""
DRAFTS = {
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": 2020,
}
"""The value of `$schema`, without a # at its end -> the draft. Any other value means the newest draft."""
NEWEST = 2020
UNENFORCED = {
    "dependencies": 4,
    "not": 4,
    "uniqueItems": 4,
    "contains": 6,
    "propertyNames": 6,
    "if": 7,
    "then": 7,
    "else": 7,
    "dependentRequired": 2019,
    "dependentSchemas": 2019,
    "maxContains": 2019,
    "minContains": 2019,
    "unevaluatedItems": 2019,
    "unevaluatedProperties": 2019,
}
"""Keywords that cannot be enforced while a reply is written -> the draft that introduced them. They have no effect in
an earlier draft."""

IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords whose value maps names to schemas."""
IN_NONE = ("const", "enum", "default", "examples", "dependentRequired")
"""Keywords whose value contains no schema, whatever it looks like."""
NAMES = ("$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
"""Names for references from other schemas, which are not followed here."""
NOTES = ("title", "description", "$comment", "examples", "default", "deprecated", "$schema", *NAMES)

MAX_REFERENCES = 10
"""Limit for a reference that leads to a reference, and so on."""

Change = Callable[[str, dict[str, Any]], Any]
"""Gets a pointer and the part there; returns the new part."""


def draft(schema: Any) -> int:
    """The number of the draft that the schema is written for, as in DRAFTS."""
    declared = schema.get("$schema") if isinstance(schema, dict) else None
    return DRAFTS.get(_normalized_draft(declared), NEWEST) if isinstance(declared, str) else NEWEST


def simplify(schema: Any) -> Any:
    """The schema without keywords that have no effect and without names for references. Its meaning is the same."""
    return rewrite(schema, _simplify_part)


def remove(schema: Any, pointers: Collection[str], *, also_one_of: bool = False) -> Any:
    """The schema without the keywords at these pointers. A `oneOf` stays unless `also_one_of`: llguidance is asked to
    read it as `anyOf`."""
    gone = {pointer for pointer in pointers if also_one_of or not is_read_as_any_of(pointer)}
    if not gone:
        return schema
    return rewrite(
        schema, lambda at, part: {key: value for key, value in part.items() if f"{at}/{escaped(key)}" not in gone}
    )


def is_read_as_any_of(pointer: str) -> bool:
    """Whether the pointer is to a keyword that is not removed but read as `anyOf`."""
    return pointer.endswith("/oneOf")


def rewrite(schema: Any, change: Change, at: str = "#") -> Any:
    """A copy in which `change` has replaced each part that may be a schema, inner parts first."""
    if isinstance(schema, list):
        return [rewrite(inner, change, f"{at}/{index}") for index, inner in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    inside = {}
    for key, value in schema.items():
        here = f"{at}/{escaped(key)}"
        if key in IN_MAPS and isinstance(value, dict):
            inside[key] = {name: rewrite(inner, change, f"{here}/{escaped(name)}") for name, inner in value.items()}
        else:
            inside[key] = value if key in IN_NONE else rewrite(value, change, here)
    return change(at, inside)


def with_tagged_unions(schema: Any) -> Any:
    """The schema with `anyOf` instead of `oneOf` in each tagged union, whose members have a property with a different
    constant each. llguidance recognizes tagged unions itself, but not if their members are references."""
    if "/oneOf/" in json.dumps(schema):
        # A reference points into a `oneOf` and would break.
        return schema

    def tagged(_at: str, part: dict[str, Any]) -> dict[str, Any]:
        members = part.get("oneOf")
        if (
            "anyOf" in part
            or not isinstance(members, list)
            or not _have_a_tag([_dereference(schema, member) for member in members])
        ):
            return part
        return {"anyOf" if key == "oneOf" else key: value for key, value in part.items()}

    return rewrite(schema, tagged)


def _dereference(root: Any, part: Any) -> Any:
    """The part that the references of this one lead to in the end; None if that is not easy to say."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(part, dict) or "$ref" not in part:
            return part
        reference = part["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        part = root
        for segment in reference.split("/")[1:]:
            part = part.get(unescaped(segment)) if isinstance(part, dict) else None
    return None


def _have_a_tag(members: list[Any]) -> bool:
    """Whether all members are objects that require the same property, with a different text in each."""
    if not members or not all(isinstance(member, dict) and member.get("type") == "object" for member in members):
        return False
    tags = [_tags(member) for member in members]
    return any(len({member.get(name) for member in tags} - {None}) == len(tags) for name in tags[0])


def _tags(part: dict[str, Any]) -> dict[str, str]:
    properties, required = part.get("properties"), part.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    constants = {name: _constant(properties[name]) for name in required if isinstance(name, str) and name in properties}
    return {name: constant for name, constant in constants.items() if isinstance(constant, str)}


def _constant(part: Any) -> Any:
    if not isinstance(part, dict):
        return None
    choices = part.get("enum")
    return choices[0] if isinstance(choices, list) and len(choices) == 1 else part.get("const")


def unenforced(part: dict[str, Any], in_draft: int) -> Iterator[str]:
    """The keywords of a simplified part that cannot be enforced while a reply is written."""
    return (key for key in part if UNENFORCED.get(key, NEWEST + 1) <= in_draft)


def escaped(key: str) -> str:
    """The key as a segment of a pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def unescaped(segment: str) -> str:
    """The key behind a segment of a reference."""
    return unquote(segment).replace("~1", "/").replace("~0", "~")


def _simplify_part(at: str, part: dict[str, Any]) -> Any:
    if "not" in part and _allows_everything(part["not"]):
        return False
    return {key: value for key, value in _with_known_schema(at, part).items() if not _has_no_effect(part, key, value)}


def _with_known_schema(at: str, part: dict[str, Any]) -> dict[str, Any]:
    declared = part.get("$schema")
    if not isinstance(declared, str):
        return part
    known = _normalized_draft(declared)
    if at != "#" or known not in DRAFTS:
        return {key: value for key, value in part.items() if key != "$schema"}
    return part | {"$schema": known}


def _normalized_draft(declared: str) -> str:
    """The value of `$schema` as the drafts write it. Many schemas write https where the draft has http."""
    declared = declared.rstrip("#")
    return declared if declared in DRAFTS else declared.replace("https://", "http://", 1)


def _has_no_effect(part: dict[str, Any], key: str, value: Any) -> bool:
    if key in NAMES:
        return isinstance(value, (str, bool))
    if key == "format":
        return isinstance(value, str) and value not in FORMATS
    if key == "uniqueItems":
        return value is False
    if key == "not":
        return value is False
    if key == "propertyNames":
        return _allows_every_text(value)
    if key in ("unevaluatedItems", "unevaluatedProperties"):
        return _allows_everything(value)
    if key in ("dependencies", "dependentRequired", "dependentSchemas"):
        return isinstance(value, dict) and not value
    if key in ("minContains", "maxContains"):
        return "contains" not in part
    if key == "if":
        return all(_allows_everything(part.get(branch, True)) for branch in ("then", "else"))
    if key in ("then", "else"):
        return "if" not in part or _allows_everything(value)
    return False


def _allows_everything(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and all(key in NOTES for key in schema))


def _allows_every_text(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return schema is True
    kinds = schema.get("type", "string")
    return (kinds == "string" or (isinstance(kinds, list) and "string" in kinds)) and all(
        key == "type" or key in NOTES or (key == "minLength" and schema[key] == 0) for key in schema
    )
