"""Validates a JSON Schema: whether replies can be held to it, which keywords cannot be enforced, and which part is why.

`python -m llamalith_app.grammars.schema` is a program that `jobs/schemas.py` starts and may kill, because llguidance
may take minutes with some schemas and cannot be interrupted. It reads one schema from standard input and writes a
Verdict a line to standard output; the last line counts. Owns the verdict and the search for the part that is why.
Follows no reference out of the schema, and knows nothing of jobs.

A gap is a keyword that cannot be enforced while a reply is written: the whole reply is validated against it at its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from llamalith_app.grammars import grammar, keywords, validation
from llamalith_app.grammars.subschemas import (
    DEFINITIONS,
    IN_MAPS,
    InvalidSchema,
    Subschema,
    all_subschemas,
    check_endings,
    check_writable,
    children,
    has_references,
    keyword_value,
    length,
    referenced,
    used_subschemas,
    value_at,
)
from llamalith_app.supervise.limits import limit

MAX_SCHEMA_BYTES = 64 * 1024
CPU_S = 1.0
"""Seconds of processor time for the validation. The engine takes about as long to compile the schema."""
GROWTH_BYTES = 32 * 1024 * 1024
"""Memory for a compiled schema. The worker plans the engine's memory with it."""
ADDRESS_SPACE_BYTES = 2 * 1024 * 1024 * 1024

MAX_UNENFORCED_CHARS = 16 * 1024
"""Limit for the pointers to all gaps together: they are stored and shown with the job."""

OF_TEXTS = ("pattern", "format", "minLength", "maxLength")
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OF_COUNTS = ("minProperties", "maxProperties")
MANY, MANY_SCHEMAS = 250, 20
"""A part of a schema with so many properties, or with so many alternatives, is tried by itself."""
FEW_ENOUGH = 50
"""Optional properties of which `minProperties` may require one: llguidance has a case for each of them."""


class Gap(msgspec.Struct):
    """A keyword that cannot be enforced while a reply is written."""

    at: str
    """A JSON pointer to the keyword."""
    reason: str


class Verdict(msgspec.Struct, kw_only=True):
    reason: str | None
    """Why no reply can be held to the schema; None: replies can, except for the gaps."""
    at: str = "#"
    """A JSON pointer to the part that is why."""
    gaps: list[Gap] = []
    """In any order."""


def validate(schema: Any) -> Iterator[Verdict]:
    """Yields a verdict, and then better ones that take more time. The last one counts."""
    try:
        all_subschemas(schema)
        simplified = keywords.simplify(schema)
        parts = all_subschemas(simplified)
        check_writable(parts)
        check_endings(parts)
    except InvalidSchema as invalid:
        yield Verdict(reason=invalid.reason, at=invalid.at)
        return
    used = used_subschemas(simplified)
    gaps = _gaps_by_keyword(used, keywords.draft(simplified))
    before = _peak_bytes()
    reason = _compile_problem(simplified, gaps)
    if reason and not _is_unsatisfiable(reason):
        yield Verdict(reason=reason)
        gaps |= _gaps_by_compiling(simplified, used, gaps)
        reason = _compile_problem(simplified, gaps)
    grown = _peak_bytes() - before
    if not reason and grown > GROWTH_BYTES:
        reason = f"takes {grown >> 20} MiB of memory when compiled; {GROWTH_BYTES >> 20} are allowed"
        yield Verdict(reason=reason)
        return
    if reason:
        yield Verdict(reason=reason)
        yield _locate(keywords.remove(simplified, gaps), used, reason)
        return
    verdict = _verdict_with_gaps(simplified, gaps)
    yield verdict
    if verdict.reason is None:
        yield from _dead_ends(keywords.remove(simplified, gaps), used, gaps)


def _peak_bytes() -> int:
    """The peak memory of this program. `getrusage` would include that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _gaps_by_keyword(parts: dict[str, Any], draft: int) -> dict[str, str]:
    """Pointer -> reason of the keywords that cannot be enforced, whatever their value."""
    found: dict[str, str] = {}
    for at, schema in parts.items():
        if isinstance(schema, dict):
            found |= {f"{at}/{key}": f"not supported: {key}" for key in keywords.unenforced(schema, draft)}
            if reason := _min_properties_problem(schema):
                found[f"{at}/minProperties"] = reason
    return found


def _min_properties_problem(schema: dict[str, Any]) -> str:
    """Why `minProperties` cannot be enforced; empty: it can. One name could reach the number by being repeated, or the
    grammar would be too large."""
    least = schema.get("minProperties")
    if not isinstance(least, int) or not least:
        return ""
    required = schema.get("required")
    names = set(map(str, required)) if isinstance(required, list) else set()
    if least > 1 + len(names):
        return f"is more than can be held to: expected at most {1 + len(names)}, one more than the names in required"
    if least > len(names) and (n_others := len(set(_property_names(schema)) - names)) > FEW_ENOUGH:
        return f"cannot be held to: {n_others} properties may be absent; expected at most {FEW_ENOUGH} of them"
    return ""


def _gaps_by_compiling(schema: Any, parts: dict[str, Any], known: dict[str, str]) -> dict[str, str]:
    """Pointer -> reason of the keywords whose value llguidance does not support."""
    found: dict[str, str] = {}
    for at, part in parts.items():
        if isinstance(part, dict):
            for suspects, small in _suspects(part):
                blamed = [f"{at}/{key}" for key in suspects if f"{at}/{key}" not in known]
                if blamed and (reason := _compile_problem(small)) and not _is_unsatisfiable(reason):
                    rest = {key: value for key, value in small.items() if key not in suspects}
                    found |= {} if _compile_problem(rest) else dict.fromkeys(blamed, reason)
    several = {f"{at}/oneOf": at for at, part in parts.items() if length(keyword_value(part, "oneOf")) > 1}
    for pointer, at in several.items():
        # Without the other gaps: they are no fault of the `oneOf`.
        mended = keywords.remove(schema, known | found, also_one_of=True)
        if (reason := _compile_problem(_isolated(at, mended))).startswith("oneOf"):
            found[pointer] = reason
    reason = _compile_problem(schema, known | found)
    return found | (dict.fromkeys(several, reason) if reason.startswith("oneOf") else {})


def _suspects(part: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Keywords of a part, and a small schema that llguidance refuses if it does not support them."""
    if "pattern" in part:
        yield ["pattern"], {"type": "string"} | {key: part[key] for key in OF_TEXTS if key in part}
    if bounds := {key: part[key] for key in OF_NUMBERS if key in part}:
        yield list(bounds), {"type": "integer" if part.get("type") == "integer" else "number"} | bounds
    named = {key: dict.fromkeys(part[key], True) for key in IN_MAPS if isinstance(keyword_value(part, key), dict)}
    if named.get("patternProperties"):
        # Which names match none of the patterns depends on the patterns.
        suspects: list[str] = [key for key in ("patternProperties", "additionalProperties") if key in part]
        yield suspects, {"type": "object", "patternProperties": named["patternProperties"]}
    if counts := {key: part[key] for key in OF_COUNTS if key in part}:
        others = part.get("additionalProperties") is not False
        required = {"required": part["required"]} if "required" in part else {}
        yield list(counts), {"type": "object", **named, "additionalProperties": others, **required, **counts}


def _dead_ends(schema: Any, parts: dict[str, Any], gaps: Collection[str]) -> Iterator[Verdict]:
    """A verdict on the first part at which a reply would break off because too much may come next; nothing if there is
    none."""
    keys = [name for part in parts.values() for name in _property_names(part)]
    for at, part in parts.items():
        if at == "#" or _is_wide(parts["#"], Subschema(at, part)):
            held = grammar.from_schema(_isolated(at, schema), gaps)
            if reason := grammar.problem_in_replies(held, keys):
                yield Verdict(reason=reason, at=at)
                return


def _is_wide(root: Any, part: Subschema) -> bool:
    """Whether much may come next where a value of this part begins. Counts what the part itself allows there, its
    reference, and its alternatives; looks at no more than MANY of these."""
    n_choices, seen, waiting = 0.0, {part.at}, [part]
    for candidate in waiting:
        n_choices += len(_property_names(candidate.schema))
        inside = [] if keyword_value(candidate.schema, "$ref") is None else [referenced(root, candidate)]
        for key in ("allOf", "anyOf", "oneOf"):
            members = keyword_value(candidate.schema, key) if length(keyword_value(candidate.schema, key)) else []
            n_choices += 0 if key == "allOf" else MANY / MANY_SCHEMAS * len(members)
            inside += [Subschema(f"{candidate.at}/{key}/{index}", member) for index, member in enumerate(members)]
        if n_choices >= MANY:
            return True
        new = [inner for inner in inside if inner.at not in seen][: MANY - len(seen)]
        seen.update(inner.at for inner in new)
        waiting += new
    return False


def _property_names(part: Any) -> Collection[str]:
    found = keyword_value(part, "properties")
    return found.keys() if isinstance(found, dict) else ()


def _verdict_with_gaps(schema: Any, gaps: dict[str, str]) -> Verdict:
    """The verdict on a schema whose gaps are known. With gaps, replies must be validated, and that must be possible."""
    flaw = validation.schema_flaw(schema) if gaps else None
    if flaw:
        enforced = [at for at in validation.unreadable_patterns(schema) if not _is_left_to_validation(at, schema, gaps)]
        flaw = validation.schema_flaw(keywords.remove(schema, enforced)) if enforced else flaw
    if flaw:
        # For example a pattern that the validator cannot compile.
        return Verdict(reason=gaps.get(flaw.at, flaw.reason), at=flaw.at)
    if sum(map(len, gaps)) > MAX_UNENFORCED_CHARS:
        at, reason = next(iter(gaps.items()))
        return Verdict(reason=f"{reason}, and so on in {len(gaps)} places, which is more than is listed", at=at)
    return Verdict(reason=None, gaps=[Gap(at, reason) for at, reason in gaps.items()])


def _is_left_to_validation(at: str, schema: Any, gaps: Collection[str]) -> bool:
    """Whether the part at this pointer belongs to a gap."""
    if any(at == gap or at.startswith(f"{gap}/") for gap in gaps):
        return True
    # A reference inside a gap may lead to it.
    return any(has_references(value_at(gap, schema)) for gap in gaps)


def _compile_problem(schema: Any, unenforced: Collection[str] = ()) -> str:
    """Why llguidance refuses the schema; empty: it does not."""
    try:
        return grammar.problem(grammar.from_schema(schema, unenforced))
    except ValueError as error:
        return grammar.readable_error(str(error))


def _is_unsatisfiable(reason: str) -> bool:
    return reason.startswith("Unsatisfiable")


def _locate(schema: Any, parts: dict[str, Any], reason: str) -> Verdict:
    """A verdict on the smallest part that has the fault by itself. A `false` has none: the part around it does."""
    best, seen = Verdict(reason=reason), {"#"}
    while True:
        part = Subschema(best.at, parts[best.at])
        below = [child.at for child in children(part, DEFINITIONS)]
        if isinstance(part.schema, dict) and "$ref" in part.schema:
            below.append(referenced(schema, part).at)
        for at in below:
            if at in seen or isinstance(parts.get(at, True), bool):
                continue
            seen.add(at)
            found = _compile_problem(_isolated(at, schema))
            if not found:
                continue
            # A part that no value fits may be harmless, such as an optional property.
            if (found == best.reason and not _is_unsatisfiable(found)) or (
                _compile_problem(_isolated(best.at, _without_part(schema, at))) != best.reason
            ):
                best = Verdict(reason=found, at=at)
                break
        else:
            return best


def _isolated(at: str, schema: Any) -> Any:
    """A schema that consists of one part of this one."""
    if at == "#":
        return schema
    frame = {"$schema": schema["$schema"]} if isinstance(schema, dict) and "$schema" in schema else {}
    reference = "#/$defs/it" + "".join(f"/{_percent_encoded(key)}" for key in at.split("/")[1:])
    return frame | {"$defs": {"it": _with_moved_references(schema)}, "$ref": reference}


def _without_part(schema: Any, at: str) -> Any:
    """The schema with the part at the pointer replaced by one that every value fits."""
    return keywords.rewrite(schema, lambda here, part: {} if here == at else part)


def _with_moved_references(value: Any) -> Any:
    """A copy for the place #/$defs/it, with its references changed accordingly."""
    if isinstance(value, list):
        return [_with_moved_references(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: f"#/$defs/it{inner[1:]}" if key == "$ref" and isinstance(inner, str) else _with_moved_references(inner)
        for key, inner in value.items()
        if key != "$schema" or not isinstance(inner, str)
    }


def _percent_encoded(key: str) -> str:
    return "".join(c if c.isalnum() or c in "$-_.~" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in key)


def main() -> None:
    """The program: limits its own processor time and memory, then validates one schema."""
    limit(CPU_S, ADDRESS_SPACE_BYTES)
    for verdict in validate(json.loads(sys.stdin.buffer.read())):
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
