"""What of a JSON Schema holds a reply while it is written, and what says nothing. Pure.

llguidance refuses every schema with a format or a keyword that it does not know. `plain` takes out what JSON Schema
calls an annotation and what allows everything; `without` takes out what is left to a validation of the whole reply.
Owns the tables of formats and keywords; a test holds them against the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any
from urllib.parse import unquote

FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
"""All others are annotations, as JSON Schema 2020-12 has it."""
DRAFTS = {
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": 2020,
}
"""The drafts by what `$schema` says, without a # at its end. Where it says something else, the newest counts."""
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
"""Keywords that no reply can be held to while it is written, with the draft that brought them: before that one they
say nothing."""

IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords in which schemas stand by name."""
IN_NONE = ("const", "enum", "default", "examples", "dependentRequired")
"""Keywords in which nothing is a schema, whatever it looks like."""
NAMES = ("$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
"""What other schemas may refer to; here none does."""
NOTES = ("title", "description", "$comment", "examples", "default", "deprecated", "$schema", *NAMES)

MAX_REFERENCES = 10
"""One leading to another."""

Change = Callable[[str, dict[str, Any]], Any]


def draft(schema: Any) -> int:
    said = schema.get("$schema") if isinstance(schema, dict) else None
    return DRAFTS.get(_without_hash(said), NEWEST) if isinstance(said, str) else NEWEST


def plain(schema: Any) -> Any:
    """The same schema without what says nothing, and with those references and names only that it needs itself."""
    return changed(schema, _plain)


def without(schema: Any, pointers: Collection[str], *, also_one_of: bool = False) -> Any:
    """The schema without the keywords at these places. Without `also_one_of` a `oneOf` stays, and is to be read as
    `anyOf`."""
    gone = {pointer for pointer in pointers if also_one_of or not reads_as_any_of(pointer)}
    if not gone:
        return schema
    return changed(
        schema, lambda at, part: {key: value for key, value in part.items() if f"{at}/{escaped(key)}" not in gone}
    )


def reads_as_any_of(pointer: str) -> bool:
    return pointer.endswith("/oneOf")


def changed(schema: Any, change: Change, at: str = "#") -> Any:
    """A copy in which each part that may be a schema went through `change`, the inner ones first."""
    if isinstance(schema, list):
        return [changed(inner, change, f"{at}/{index}") for index, inner in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    inside = {}
    for key, value in schema.items():
        here = f"{at}/{escaped(key)}"
        if key in IN_MAPS and isinstance(value, dict):
            inside[key] = {name: changed(inner, change, f"{here}/{escaped(name)}") for name, inner in value.items()}
        else:
            inside[key] = value if key in IN_NONE else changed(value, change, here)
    return change(at, inside)


def with_tagged_any_of(schema: Any) -> Any:
    """The same schema with `anyOf` for each `oneOf` whose schemas are told apart by a constant, as those of a tagged
    union are: llguidance sees so only where they stand in place, not where references lead to them."""
    if "/oneOf/" in json.dumps(schema):
        # Something refers to a place in one.
        return schema

    def tagged(_at: str, part: dict[str, Any]) -> dict[str, Any]:
        members = part.get("oneOf")
        if (
            "anyOf" in part
            or not isinstance(members, list)
            or not _have_a_tag([_led_to(schema, one) for one in members])
        ):
            return part
        return {"anyOf" if key == "oneOf" else key: value for key, value in part.items()}

    return changed(schema, tagged)


def _led_to(root: Any, part: Any) -> Any:
    """What the part's reference leads to; None where that is not plain."""
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
    """Whether all are objects that must have one property, which is another text in each."""
    if not members or not all(isinstance(one, dict) and one.get("type") == "object" for one in members):
        return False
    tags = [_tags(one) for one in members]
    return any(len({one.get(name) for one in tags} - {None}) == len(tags) for name in tags[0])


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


def unenforced(part: dict[str, Any], of_draft: int) -> Iterator[str]:
    """The keywords of a plain part that no reply can be held to."""
    return (key for key in part if UNENFORCED.get(key, NEWEST + 1) <= of_draft)


def escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def unescaped(segment: str) -> str:
    return unquote(segment).replace("~1", "/").replace("~0", "~")


def _plain(at: str, part: dict[str, Any]) -> Any:
    if "not" in part and _takes_everything(part["not"]):
        return False
    return {key: value for key, value in _with_known_schema(at, part).items() if not _says_nothing(part, key, value)}


def _with_known_schema(at: str, part: dict[str, Any]) -> dict[str, Any]:
    said = part.get("$schema")
    if not isinstance(said, str):
        return part
    known = _without_hash(said)
    if at != "#" or known not in DRAFTS:
        return {key: value for key, value in part.items() if key != "$schema"}
    return part | {"$schema": known}


def _without_hash(said: str) -> str:
    """As the drafts themselves write it: many say https for those of http."""
    said = said.rstrip("#")
    return said if said in DRAFTS else said.replace("https://", "http://", 1)


def _says_nothing(part: dict[str, Any], key: str, value: Any) -> bool:
    if key in NAMES:
        return isinstance(value, (str, bool))
    if key == "format":
        return isinstance(value, str) and value not in FORMATS
    if key == "uniqueItems":
        return value is False
    if key == "not":
        return value is False
    if key == "propertyNames":
        return _takes_every_text(value)
    if key in ("unevaluatedItems", "unevaluatedProperties"):
        return _takes_everything(value)
    if key in ("dependencies", "dependentRequired", "dependentSchemas"):
        return isinstance(value, dict) and not value
    if key in ("minContains", "maxContains"):
        return "contains" not in part
    if key == "if":
        return all(_takes_everything(part.get(branch, True)) for branch in ("then", "else"))
    if key in ("then", "else"):
        return "if" not in part or _takes_everything(value)
    return False


def _takes_everything(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and all(key in NOTES for key in schema))


def _takes_every_text(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return schema is True
    kinds = schema.get("type", "string")
    return (kinds == "string" or (isinstance(kinds, list) and "string" in kinds)) and all(
        key == "type" or key in NOTES or (key == "minLength" and schema[key] == 0) for key in schema
    )
