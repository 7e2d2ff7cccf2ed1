"""Judges a JSON Schema: can replies be held to it, which parts of it only a whole reply can be validated against, and
where neither is so, which part is why.

`python -m llamalith_app.grammars.schema` is a program of its own, to be killed: llguidance may take minutes with some
schemas and cannot be interrupted. It reads one schema from standard input and writes a Verdict a line to standard
output, of which the last one counts. It reads only the schema: it follows no reference to anything outside.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llamalith_app.grammars import grammar, keywords, validation
from llamalith_app.grammars.keywords import escaped, unescaped
from llamalith_app.supervise import parent

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 100
"""Of brackets in one another; llguidance's own reader of JSON gives up a little beyond."""
CPU_S = 1.0
"""Processor time that judging may take, and so about what the engine's compiling takes."""
GROWTH_BYTES = 32 * 1024 * 1024
"""What a compiled schema may take: the engine's memory is planned with it."""
ADDRESS_SPACE_BYTES = 2 * 1024 * 1024 * 1024

MAX_UNENFORCED_CHARS = 16 * 1024
"""Of the pointers to what only a whole reply can be validated against: they are stored and told with the job."""

DEFINITIONS = ("$defs", "definitions")
IN_MAPS = ("properties", "patternProperties", *DEFINITIONS)
IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties")
OF_TEXTS = ("pattern", "format", "minLength", "maxLength")
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OF_COUNTS = ("minProperties", "maxProperties")
MANY, MANY_SCHEMAS = 250, 20
"""Properties, and schemas of which one is to fit, from which on a part of a schema is tried alone."""
FEW_ENOUGH = 50
"""Properties that may be absent while one of them must not: llguidance has a case for each of them."""
REFUSED = ("$dynamicRef", "$recursiveRef", "x-guidance")
"""Keywords that would change what other parts mean."""

UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""JSON writes these by \\u alone, which replies do not have (`grammar.ESCAPES`)."""
UNWRITABLE_IS = "a control character that no reply can hold: only \\n, \\r, \\t, \\b and \\f are"


class Gap(msgspec.Struct):
    """A keyword that no reply can be held to while it is written."""

    at: str
    """A JSON pointer to it."""
    reason: str


class Verdict(msgspec.Struct, kw_only=True):
    reason: str | None
    """None: replies can be held to it, but for the gaps."""
    at: str = "#"
    """A JSON pointer to the part that is why."""
    gaps: list[Gap] = []
    """In no order that says anything."""


class Flaw(Exception):
    def __init__(self, at: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = Verdict(reason=reason, at=at)


class _Subschema(NamedTuple):
    at: str
    schema: Any


def judge(schema: Any) -> Iterator[Verdict]:
    """The verdict, then a better one where that takes more time."""
    try:
        _parts(schema)
        plain = keywords.plain(schema)
        parts = _parts(plain)
        _must_be_writable(parts)
        _must_end(parts)
    except Flaw as flaw:
        yield flaw.verdict
        return
    used = _used(plain)
    gaps = _known_gaps(used, keywords.draft(plain))
    before = _peak_bytes()
    reason = _compiled(plain, gaps)
    if reason and not _is_unsatisfiable(reason):
        yield Verdict(reason=reason)
        gaps |= _found_gaps(plain, used, gaps)
        reason = _compiled(plain, gaps)
    grown = _peak_bytes() - before
    if not reason and grown > GROWTH_BYTES:
        reason = f"takes {grown >> 20} MiB of memory when compiled; {GROWTH_BYTES >> 20} are allowed"
        yield Verdict(reason=reason)
        return
    if reason:
        yield Verdict(reason=reason)
        yield _located(keywords.without(plain, gaps), used, reason)
        return
    verdict = _with_gaps(plain, gaps)
    yield verdict
    if verdict.reason is None:
        yield from _breaking_off(keywords.without(plain, gaps), used, gaps)


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
    return _reached(schema, but=())


def _used(schema: Any) -> dict[str, Any]:
    """The same without definitions that nothing refers to."""
    return _reached(schema, but=DEFINITIONS)


def _reached(schema: Any, *, but: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = [_Subschema("#", schema)]
    while waiting:
        part = waiting.pop()
        if part.at in found:
            continue
        found[part.at] = part.schema
        if not isinstance(part.schema, (dict, bool)):
            raise Flaw(part.at, "is no schema: expected an object or a boolean")
        waiting += _children(part, but)
        if isinstance(part.schema, dict):
            for keyword in REFUSED:
                if keyword in part.schema:
                    raise Flaw(f"{part.at}/{keyword}", f"{keyword} is not supported")
            if "$id" in part.schema and part.at != "#" and _refers(part.schema):
                raise Flaw(f"{part.at}/$id", "$id is not supported where a $ref within it would start from it")
            if "$ref" in part.schema:
                waiting.append(_target(schema, part))
    return dict(reversed(found.items()))


def _refers(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, dict) and ("$ref" in value or any(map(_refers, value.values())))


def _children(part: _Subschema, but: Collection[str] = ()) -> Iterator[_Subschema]:
    if not isinstance(part.schema, dict):
        return
    for key, value in part.schema.items():
        at = f"{part.at}/{escaped(key)}"
        if key in but:
            continue
        if key in IN_MAPS and isinstance(value, dict):
            yield from (_Subschema(f"{at}/{escaped(name)}", inner) for name, inner in value.items())
        elif key in IN_LISTS and isinstance(value, list):
            yield from (_Subschema(f"{at}/{index}", inner) for index, inner in enumerate(value))
        elif key in ALONE:
            yield _Subschema(at, value)


def _target(root: Any, part: _Subschema) -> _Subschema:
    """What the part's reference leads to."""
    reference = part.schema["$ref"]
    at = f"{part.at}/$ref"
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise Flaw(at, "leads out of the schema: only # and #/… are followed")
    found, place = root, "#"
    for segment in reference.split("/")[1:]:
        key = unescaped(segment)
        if isinstance(found, list) and key.isdecimal() and len(key) < 10 and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise Flaw(at, f"leads to nothing: there is no {reference[:200]}")
        place += f"/{escaped(key)}"
    return _Subschema(place, found)


def _known_gaps(parts: dict[str, Any], draft: int) -> dict[str, str]:
    """By their places, with the reasons: what no reply can be held to whatever stands there."""
    found: dict[str, str] = {}
    for at, schema in parts.items():
        if isinstance(schema, dict):
            found |= {f"{at}/{key}": f"not supported: {key}" for key in keywords.unenforced(schema, draft)}
            if reason := _too_many_names(schema):
                found[f"{at}/minProperties"] = reason
    return found


def _too_many_names(schema: dict[str, Any]) -> str:
    """Why no least number of properties can be kept: one name could reach it by standing there again and again, or it
    costs too much."""
    least = schema.get("minProperties")
    if not isinstance(least, int) or not least:
        return ""
    required = schema.get("required")
    names = set(map(str, required)) if isinstance(required, list) else set()
    if least > 1 + len(names):
        return f"is more than can be held to: expected at most {1 + len(names)}, one more than the names in required"
    if least > len(names) and (n_others := len(set(_names(schema)) - names)) > FEW_ENOUGH:
        return f"cannot be held to: {n_others} properties may be absent; expected at most {FEW_ENOUGH} of them"
    return ""


def _found_gaps(schema: Any, parts: dict[str, Any], known: dict[str, str]) -> dict[str, str]:
    """The same for what llguidance takes or not by what stands there."""
    found: dict[str, str] = {}
    for at, part in parts.items():
        if isinstance(part, dict):
            for suspects, small in _suspects(part):
                blamed = [f"{at}/{key}" for key in suspects if f"{at}/{key}" not in known]
                if blamed and (reason := _compiled(small)) and not _is_unsatisfiable(reason):
                    rest = {key: value for key, value in small.items() if key not in suspects}
                    found |= {} if _compiled(rest) else dict.fromkeys(blamed, reason)
    several = {f"{at}/oneOf": at for at, part in parts.items() if _length(_of(part, "oneOf")) > 1}
    for pointer, at in several.items():
        # What was found in it before is no fault of its own.
        mended = keywords.without(schema, known | found, also_one_of=True)
        if (reason := _compiled(_standing_at(at, mended))).startswith("oneOf"):
            found[pointer] = reason
    reason = _compiled(schema, known | found)
    return found | (dict.fromkeys(several, reason) if reason.startswith("oneOf") else {})


def _suspects(part: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Keywords of a part, and a small schema that llguidance refuses where it refuses them."""
    if "pattern" in part:
        yield ["pattern"], {"type": "string"} | {key: part[key] for key in OF_TEXTS if key in part}
    if bounds := {key: part[key] for key in OF_NUMBERS if key in part}:
        yield list(bounds), {"type": "integer" if part.get("type") == "integer" else "number"} | bounds
    named = {key: dict.fromkeys(part[key], True) for key in IN_MAPS if isinstance(_of(part, key), dict)}
    if named.get("patternProperties"):
        # What matches none of the patterns is known only where these are.
        suspects: list[str] = [key for key in ("patternProperties", "additionalProperties") if key in part]
        yield suspects, {"type": "object", "patternProperties": named["patternProperties"]}
    if counts := {key: part[key] for key in OF_COUNTS if key in part}:
        others = part.get("additionalProperties") is not False
        required = {"required": part["required"]} if "required" in part else {}
        yield list(counts), {"type": "object", **named, "additionalProperties": others, **required, **counts}


def _breaking_off(schema: Any, parts: dict[str, Any], gaps: Collection[str]) -> Iterator[Verdict]:
    """A verdict on the first part, if any, at which a reply would break off, since too much may come next there."""
    keys = [name for part in parts.values() for name in _names(part)]
    for at, part in parts.items():
        if at == "#" or _opens_many(parts["#"], _Subschema(at, part)):
            held = grammar.of_schema(_standing_at(at, schema), gaps)
            if reason := grammar.problem_on_the_way(held, keys):
                yield Verdict(reason=reason, at=at)
                return


def _opens_many(root: Any, part: _Subschema) -> bool:
    """Whether much may come next where this part begins: also what its references, and the schemas of which one or all
    are to fit, have there. Looks at no more than MANY of these."""
    n_choices, seen, waiting = 0.0, {part.at}, [part]
    for one in waiting:
        n_choices += len(_names(one.schema))
        inside = [] if _of(one.schema, "$ref") is None else [_target(root, one)]
        for key in ("allOf", "anyOf", "oneOf"):
            members = _of(one.schema, key) if _length(_of(one.schema, key)) else []
            n_choices += 0 if key == "allOf" else MANY / MANY_SCHEMAS * len(members)
            inside += [_Subschema(f"{one.at}/{key}/{index}", member) for index, member in enumerate(members)]
        if n_choices >= MANY:
            return True
        new = [inner for inner in inside if inner.at not in seen][: MANY - len(seen)]
        seen.update(inner.at for inner in new)
        waiting += new
    return False


def _names(part: Any) -> Collection[str]:
    found = _of(part, "properties")
    return found.keys() if isinstance(found, dict) else ()


def _with_gaps(schema: Any, gaps: dict[str, str]) -> Verdict:
    """Replies that no grammar can hold to all of the schema are validated; that has to be possible."""
    flaw = validation.flaw(schema) if gaps else None
    if flaw:
        enforced = [at for at in validation.unreadable(schema) if not _is_left_to_validation(at, schema, gaps)]
        flaw = validation.flaw(keywords.without(schema, enforced)) if enforced else flaw
    if flaw:
        # A pattern that nobody can read, for one.
        return Verdict(reason=gaps.get(flaw.at, flaw.reason), at=flaw.at)
    if sum(map(len, gaps)) > MAX_UNENFORCED_CHARS:
        at, reason = next(iter(gaps.items()))
        return Verdict(reason=f"{reason}, and so on in {len(gaps)} places, which is more than can be told", at=at)
    return Verdict(reason=None, gaps=[Gap(at, reason) for at, reason in gaps.items()])


def _is_left_to_validation(at: str, schema: Any, gaps: Collection[str]) -> bool:
    """Whether what stands at this place says something that no reply is held to while it is written."""
    if any(at == gap or at.startswith(f"{gap}/") for gap in gaps):
        return True
    # A reference in a gap may lead to it.
    return any(_refers(_at(gap, schema)) for gap in gaps)


def _must_be_writable(parts: dict[str, Any]) -> None:
    """Raises Flaw for a constant that a reply has no way to write, or no way that tells it from another."""
    for at, schema in parts.items():
        if not isinstance(schema, dict):
            continue
        names = schema.get("properties")
        if isinstance(names, dict) and any(map(UNWRITABLE.search, names)):
            raise Flaw(f"{at}/properties", f"has a name with {UNWRITABLE_IS}")
        fixed = {key: schema[key] for key in ("const", "enum") if key in schema}
        for place, value in _scalars(_Subschema(at, fixed)):
            if isinstance(value, str) and UNWRITABLE.search(value):
                raise Flaw(place, f"has {UNWRITABLE_IS}")
            if isinstance(value, (int, float)) and abs(value) > grammar.LAST_EXACT:
                reason = (
                    f"cannot be told from its neighbours: expected a number within ±{grammar.LAST_EXACT}, or a text"
                )
                raise Flaw(place, reason)


def _scalars(part: _Subschema) -> Iterator[_Subschema]:
    """The values in a value that hold no others."""
    at, value = part
    if not isinstance(value, (dict, list)):
        yield part
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _scalars(_Subschema(f"{at}/{escaped(str(key))}", inner))


def _must_end(parts: dict[str, Any]) -> None:
    """Raises Flaw for a part of which no instance has an end, as where each must hold another one."""
    ending: set[str] = set()
    root = parts["#"]
    while True:
        new = {
            at for at, schema in parts.items() if at not in ending and _can_end(root, _Subschema(at, schema), ending)
        }
        if not new:
            break
        ending |= new
    for at in parts:
        if at not in ending:
            raise Flaw(at, "goes round in a circle: no value that fits it could ever end")


def _can_end(root: Any, part: _Subschema, ending: set[str]) -> bool:
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


def _object_can_end(part: _Subschema, ending: set[str]) -> bool:
    properties, required = part.schema.get("properties", {}), part.schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    return all(
        not isinstance(name, str) or name not in properties or f"{part.at}/properties/{escaped(name)}" in ending
        for name in required
    )


def _array_can_end(part: _Subschema, ending: set[str]) -> bool:
    least, first = part.schema.get("minItems", 0), part.schema.get("prefixItems", [])
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    places = [f"{part.at}/prefixItems/{index}" for index in range(min(least, len(first)))]
    if least > len(first) and isinstance(part.schema.get("items"), dict):
        places.append(f"{part.at}/items")
    return all(place in ending for place in places)


def _compiled(schema: Any, unenforced: Collection[str] = ()) -> str:
    """Why nothing can be held to it; empty: something can."""
    try:
        return grammar.problem(grammar.of_schema(schema, unenforced))
    except ValueError as error:
        return grammar.sentence(str(error))


def _is_unsatisfiable(reason: str) -> bool:
    return reason.startswith("Unsatisfiable")


def _located(schema: Any, parts: dict[str, Any], reason: str) -> Verdict:
    """Goes down to the smallest part that alone has the fault; a `false` is none, but what must fit it."""
    best, seen = Verdict(reason=reason), {"#"}
    while True:
        part = _Subschema(best.at, parts[best.at])
        below = [child.at for child in _children(part, DEFINITIONS)]
        if isinstance(part.schema, dict) and "$ref" in part.schema:
            below.append(_target(schema, part).at)
        for at in below:
            if at in seen or isinstance(parts.get(at, True), bool):
                continue
            seen.add(at)
            found = _compiled(_standing_at(at, schema))
            if not found:
                continue
            # Many a part that nothing fits does no harm, such as a property that may be absent.
            if (found == best.reason and not _is_unsatisfiable(found)) or (
                _compiled(_standing_at(best.at, _with_all_at(schema, at))) != best.reason
            ):
                best = Verdict(reason=found, at=at)
                break
        else:
            return best


def _standing_at(at: str, schema: Any) -> Any:
    """A schema that is one part of this one."""
    if at == "#":
        return schema
    frame = {"$schema": schema["$schema"]} if isinstance(schema, dict) and "$schema" in schema else {}
    reference = "#/$defs/it" + "".join(f"/{_quoted(key)}" for key in at.split("/")[1:])
    return frame | {"$defs": {"it": _moved(schema)}, "$ref": reference}


def _with_all_at(schema: Any, at: str) -> Any:
    """The schema with a part that everything fits in the place of this one."""
    return keywords.changed(schema, lambda here, part: {} if here == at else part)


def _moved(value: Any) -> Any:
    """A copy that stands at #/$defs/it: its references say so."""
    if isinstance(value, list):
        return [_moved(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: f"#/$defs/it{inner[1:]}" if key == "$ref" and isinstance(inner, str) else _moved(inner)
        for key, inner in value.items()
        if key != "$schema" or not isinstance(inner, str)
    }


def _at(pointer: str, schema: Any) -> Any:
    for segment in pointer.split("/")[1:]:
        key = segment.replace("~1", "/").replace("~0", "~")
        schema = schema[int(key) if isinstance(schema, list) else key]
    return schema


def _of(schema: Any, keyword: str) -> Any:
    return schema.get(keyword) if isinstance(schema, dict) else None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _quoted(key: str) -> str:
    return "".join(c if c.isalnum() or c in "$-_.~" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in key)


def main() -> None:
    parent.die_with_parent()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for verdict in judge(json.loads(sys.stdin.buffer.read())):
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
