"""Makes grammars for llguidance: from the GBNF files of one folder, and from JSON Schemas.

Owns the limits on the work of a grammar, and the words for what is wrong with one. Web and worker load the folder at
start, so that a name is never made into a path; the worker makes the grammar of a job; `engine/constraint.py` enforces
it within the same limits. Knows no tokens of a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from decimal import Context, Decimal
from pathlib import Path
from random import Random
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llamalith_app import files
from llamalith_app.errors import ConfigError
from llamalith_app.grammars import gbnf, keywords

MAX_GRAMMAR_BYTES = 100_000
MAX_REASON = 300
LIMITS = LLParserLimits(
    # These limits count work instead of measuring time, so that a grammar is refused on every machine or on none.
    # An object takes four items for each property that may be absent. With some thousands of items, a token takes some
    # hundredths of a second. A step of a model's vocabulary takes up to fifteen rows, and a step of bytes (`problem`)
    # takes one: the second limit must leave room for what passed the first.
    max_items_in_row=5000,
    step_max_items=150_000,
    max_lexer_states=10_000,
    precompute_large_lexemes=False,
    # People read these errors: they must not contain the state of the parser.
    verbose_errors=False,
)
TOO_WIDE = re.compile(r"row has (\d+) items; max is (\d+)")
WALKS, STEPS, WORDS = 2, 30, 3
"""Random replies, the steps of each, and the keys that are tried at a step."""
CONTINUE_PROBABILITY = 0.9
"""Probability that a random reply does not end a value that may continue."""
ONE_BLANK_OR_A_LINE = r"[ ]|\n[ ]{0,20}"
"""White space in a JSON reply. Without a limit, a small model writes blanks for ever."""

ESCAPES = 'nrbtf\\"'
"""Characters that may follow a backslash. Keys are compared as written: with \\u, a key could appear twice."""

LAST_EXACT = 2**53
"""Beyond it a float cannot hold every integer, and llguidance and many readers of JSON store numbers as floats."""
TOO_LARGE = 2**63
"""From here on llguidance refuses a bound, or rounds it down by one."""
NEXT_TO_ZERO = 1e-15
"""Replaces an exclusive bound of 0. A smaller number would cost the lexer one state for each digit."""
KEPT_DIGITS = 15
"""Digits with which llguidance, which is careless with floats, reads a fraction as the same float as others do."""
IN_KEPT_DIGITS = Context(prec=KEPT_DIGITS)


def load(folder: Path) -> dict[str, str]:
    """The grammars of the `*.gbnf` files in the folder, by the file's name without its suffix.

    Raises ConfigError, with a sentence for each file that cannot be read, is too long or is no grammar.
    """
    grammars, problems = {}, []
    for path in sorted(folder.glob("*.gbnf")):
        try:
            grammars[path.stem] = from_gbnf(files.read_regular(path, MAX_GRAMMAR_BYTES).decode())
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        except (UnicodeDecodeError, gbnf.GbnfError) as error:
            problems.append(f"{path}: {error}")
            continue
        if reason := problem(grammars[path.stem]):
            problems.append(f"{path}: {reason}")
    if problems:
        raise ConfigError(problems)
    return grammars


def from_gbnf(text: str) -> str:
    """The grammar of a text in GBNF. Raises GbnfError."""
    return LLMatcher.grammar_from_lark(gbnf.to_lark(text))


def from_schema(schema: Any, unenforced: Collection[str] = ()) -> str:
    """The grammar of a validated JSON Schema (`schema.py`), without the keywords at the pointers `unenforced`. Raises
    ValueError for a schema that llguidance does not support."""
    enforced = keywords.remove(keywords.simplify(schema), unenforced)
    return LLMatcher.grammar_from_json_schema(
        json.dumps(keywords.rewrite(keywords.with_tagged_unions(enforced), _with_kept_bounds)),
        # Every option is set here, so that a schema cannot set one by `x-guidance`.
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_flexible": True,
            "whitespace_pattern": ONE_BLANK_OR_A_LINE,
            "coerce_one_of": any(map(keywords.is_read_as_any_of, unenforced)),
            "lenient": False,
            "json_allowed_escapes": ESCAPES,
        },
    )


def _with_kept_bounds(_at: str, part: dict[str, Any]) -> dict[str, Any]:
    """The part of a schema with the bounds of its numbers replaced by bounds that llguidance enforces exactly."""
    part = _with_bounds_of_side(part, "minimum", "exclusiveMinimum", upwards=True)
    return _with_bounds_of_side(part, "maximum", "exclusiveMaximum", upwards=False)


def _with_bounds_of_side(schema: dict[str, Any], closed: str, open_: str, *, upwards: bool) -> dict[str, Any]:
    """The same for the bounds of one side, inclusive and exclusive. A bound may move inwards a little."""
    limit, beyond = schema.get(closed), schema.get(open_)
    if isinstance(beyond, bool):
        # In draft 4, `exclusiveMinimum` is a boolean that makes `minimum` exclusive.
        limit, beyond = (None, limit) if beyond else (limit, None)
    limits = [bound for bound in (limit, beyond) if bound is not None]
    if not limits or any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in limits):
        return schema
    changed: dict[str, float] = {}
    if limit is not None:
        changed[closed] = limit if _is_exact(limit) else _next_within(limit, upwards=upwards)
    if beyond is not None:
        # Among fractions, llguidance does not enforce an exclusive bound towards 0. It does enforce one away from 0,
        # which stays as it is: with an inclusive 0.999999999999999 instead of 1, no reply could say 0.9.
        if _is_exact(beyond) and (beyond < 0 if upwards else beyond > 0):
            changed[open_] = beyond
        else:
            within = _next_within(beyond, upwards=upwards)
            changed[closed] = (max if upwards else min)(within, changed.get(closed, within))
    bounded: dict[str, Any] = {}
    for key, value in schema.items():
        bounded |= changed if key in (closed, open_) else {key: value}
    return bounded


def _is_exact(limit: float) -> bool:
    """Whether llguidance reads the number as everybody else does."""
    if isinstance(limit, int):
        return abs(limit) <= LAST_EXACT
    return len(Decimal(repr(limit)).as_tuple().digits) <= KEPT_DIGITS


def _next_within(limit: float, *, upwards: bool) -> float:
    """The nearest number inside the bound for which `_is_exact` holds."""
    if limit == 0:
        return NEXT_TO_ZERO if upwards else -NEXT_TO_ZERO
    if abs(limit) >= TOO_LARGE:
        return limit
    found = Decimal(repr(limit))
    # A single step may be smaller than the distance between two floats of this size.
    for _ in range(1 if abs(limit) <= LAST_EXACT else 2):
        found = found.next_plus(IN_KEPT_DIGITS) if upwards else found.next_minus(IN_KEPT_DIGITS)
    return int(found) if found == found.to_integral_value() else float(found)


def problem(grammar: str) -> str:
    """Why no reply can be held to this grammar; empty: replies can."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, limits=LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return ""
    return readable_error(matcher.get_error())


def problem_in_replies(grammar: str, keys: Sequence[str]) -> str:
    """Why a reply may break off in the middle; empty: none of a few random replies did. `keys` are the property names
    of the JSON Schema. The same grammar gets the same random replies."""
    random = Random(0)  # noqa: S311 - repeatable, not secret
    words = [json.dumps(key, ensure_ascii=False).encode() + b":" for key in keys]
    for _ in range(WALKS):
        matcher = LLMatcher(LLTokenizer("byte"), grammar, limits=LIMITS, log_level=0)
        for _ in range(STEPS):
            bits = matcher.compute_bitmask()
            if matcher.is_error() or matcher.is_stopped():
                break
            allowed = bytes(byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1)
            if not allowed or not matcher.consume_tokens(list(_next_bytes(matcher, allowed, words, random))):
                break
        if matcher.is_error():
            return readable_error(matcher.get_error())
    return ""


def _next_bytes(matcher: LLMatcher, allowed: bytes, words: Sequence[bytes], random: Random) -> bytes:
    """A key if one is allowed here; otherwise the end of a string, or any byte, though rarely one that ends a list."""
    if b'"' in allowed:
        for word in random.sample(words, min(WORDS, len(words))):
            if matcher.validate_tokens(list(word)) == len(word):
                return word
        return b'"'
    more = [byte for byte in allowed if byte not in b"]} \n"] or list(allowed)
    return bytes([random.choice(more if random.random() < CONTINUE_PROBABILITY else allowed)])


def readable_error(error: str) -> str:
    """An error of llguidance for people, without the parts of the grammar that it contains."""
    first, *more = error.splitlines() or [""]
    if "NoExtension" in first:
        return "it allows no reply at all"
    if (row := TOO_WIDE.search(first)) is not None:
        return f"too many choices at one place: {row[1]}, at most {row[2]}; a property that may be absent counts as 4"
    if first.startswith("panic"):
        return "too large to be compiled"
    if first.startswith("oneOf"):
        return "oneOf is not supported where two of its schemas may fit the same value; anyOf is"
    if first.startswith("Unimplemented keys"):
        keys = first.partition("[")[2].rstrip("]").replace('"', "")
        return f"not supported: {keys}"
    # For a regular expression the reason comes last, after a drawing.
    last = next((line for line in more if line.startswith("error: ")), "")
    return f"{first} {last.removeprefix('error: ')}".strip()[:MAX_REASON]
