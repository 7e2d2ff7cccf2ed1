"""What a reply may be held to: named GBNF grammars of one folder, and JSON Schemas, both as llguidance takes them.

The grammars are a map made at start, never a path made from a name. Owns the bounds within which a grammar may work
a processor; whoever enforces one (`engine/constraint.py`) does so within the same. Knows no tokens.
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
    # Work that is counted, not timed: what is refused here is refused everywhere.
    # An object takes four for each property that may be absent; of some thousands a token costs some hundredths of a
    # second. One step of a model's vocabulary takes up to fifteen rows, one of bytes (`problem`) takes one: the second
    # limit must leave room for what passed the first.
    max_items_in_row=5000,
    step_max_items=150_000,
    max_lexer_states=10_000,
    precompute_large_lexemes=False,
    # No state of the parser in a reason that people read.
    verbose_errors=False,
)
TOO_WIDE = re.compile(r"row has (\d+) items; max is (\d+)")
WALKS, STEPS, WORDS = 2, 30, 3
GO_ON = 0.9
"""How likely a reply at random does not end something that may go on."""
ONE_BLANK_OR_A_LINE = r"[ ]|\n[ ]{0,20}"
"""Between the parts of a JSON text. Without an end to it a small model writes blanks for ever."""

ESCAPES = 'nrbtf\\"'
"""What may follow a backslash. Keys are compared as written: with \\u a known one could stand there a second time."""

LAST_EXACT = 2**53
"""Beyond it not every integer is a float, in which llguidance and many readers of JSON have their numbers."""
TOO_LARGE = 2**63
"""What llguidance refuses as a bound, or takes for the integer before."""
NEXT_TO_ZERO = 1e-15
"""The bound beside a bound of 0 that may not be reached. A smaller one would cost the lexer a state a digit."""
KEPT_DIGITS = 15
"""With no more, a fraction is the same float to llguidance, which reads and writes them carelessly, as to others."""
IN_KEPT_DIGITS = Context(prec=KEPT_DIGITS)


def load(folder: Path) -> dict[str, str]:
    """Name (the file's stem) -> grammar of each `*.gbnf`.

    Raises ConfigError for one that cannot be read, is too long or is no grammar.
    """
    grammars, problems = {}, []
    for path in sorted(folder.glob("*.gbnf")):
        try:
            grammars[path.stem] = of_gbnf(files.read_regular(path, MAX_GRAMMAR_BYTES).decode())
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


def of_gbnf(text: str) -> str:
    """Raises GbnfError."""
    return LLMatcher.grammar_from_lark(gbnf.to_lark(text))


def of_schema(schema: Any, unenforced: Collection[str] = ()) -> str:
    """Of a JSON Schema that was judged (`schema.py`), without what stands at the pointers `unenforced`."""
    held = keywords.without(keywords.plain(schema), unenforced)
    return LLMatcher.grammar_from_json_schema(
        json.dumps(keywords.changed(keywords.with_tagged_any_of(held), _with_kept_bounds)),
        # All that a schema could say of itself by `x-guidance`.
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_flexible": True,
            "whitespace_pattern": ONE_BLANK_OR_A_LINE,
            "coerce_one_of": any(map(keywords.reads_as_any_of, unenforced)),
            "lenient": False,
            "json_allowed_escapes": ESCAPES,
        },
    )


def _with_kept_bounds(_at: str, part: dict[str, Any]) -> dict[str, Any]:
    """The same part of a schema with those bounds of its numbers that llguidance keeps."""
    part = _bounded(part, "minimum", "exclusiveMinimum", upwards=True)
    return _bounded(part, "maximum", "exclusiveMaximum", upwards=False)


def _bounded(schema: dict[str, Any], closed: str, open_: str, *, upwards: bool) -> dict[str, Any]:
    """With the bounds of one side, that which may be reached and that which may not, a little within where need be."""
    limit, beyond = schema.get(closed), schema.get(open_)
    if isinstance(beyond, bool):
        # As draft 4 has it: a mark upon the other one.
        limit, beyond = (None, limit) if beyond else (limit, None)
    said = [one for one in (limit, beyond) if one is not None]
    if not said or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in said):
        return schema
    changed: dict[str, float] = {}
    if limit is not None:
        changed[closed] = limit if _is_exact(limit) else _next_within(limit, upwards=upwards)
    if beyond is not None:
        # llguidance does not keep one towards 0 among fractions. One away from it is kept, and is better left alone:
        # beside a closed 0.999999999999999 no reply could say 0.9.
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
    """Whether it is the same number to all."""
    if isinstance(limit, int):
        return abs(limit) <= LAST_EXACT
    return len(Decimal(repr(limit)).as_tuple().digits) <= KEPT_DIGITS


def _next_within(limit: float, *, upwards: bool) -> float:
    """The next number that is the same to all."""
    if limit == 0:
        return NEXT_TO_ZERO if upwards else -NEXT_TO_ZERO
    if abs(limit) >= TOO_LARGE:
        return limit
    found = Decimal(repr(limit))
    # Of two steps the first may be shorter than what a float is rounded by.
    for _ in range(1 if abs(limit) <= LAST_EXACT else 2):
        found = found.next_plus(IN_KEPT_DIGITS) if upwards else found.next_minus(IN_KEPT_DIGITS)
    return int(found) if found == found.to_integral_value() else float(found)


def problem(grammar: str) -> str:
    """Why nothing can be held to this grammar; empty: something can."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, limits=LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return ""
    return sentence(matcher.get_error())


def problem_on_the_way(grammar: str, keys: Sequence[str]) -> str:
    """Why a reply may break off though it can begin; empty: none of some replies at random does. `keys` are those that
    the replies of a JSON Schema may have."""
    random = Random(0)  # noqa: S311 - the same replies for the same grammar
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
            return sentence(matcher.get_error())
    return ""


def _next_bytes(matcher: LLMatcher, allowed: bytes, words: Sequence[bytes], random: Random) -> bytes:
    """A key where one may stand, the end of a text, or anything else, though rather not the end of a list."""
    if b'"' in allowed:
        for word in random.sample(words, min(WORDS, len(words))):
            if matcher.validate_tokens(list(word)) == len(word):
                return word
        return b'"'
    more = [byte for byte in allowed if byte not in b"]} \n"] or list(allowed)
    return bytes([random.choice(more if random.random() < GO_ON else allowed)])


def sentence(error: str) -> str:
    """What llguidance says is wrong, without the grammar and the parser's state that it adds, in our words."""
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
    # Of a regular expression the reason comes last, after a drawing.
    last = next((line for line in more if line.startswith("error: ")), "")
    return f"{first} {last.removeprefix('error: ')}".strip()[:MAX_REASON]
