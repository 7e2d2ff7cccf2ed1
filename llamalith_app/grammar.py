"""What a reply may be held to: named GBNF grammars of one folder, and JSON Schemas, both as llguidance takes them.

The grammars are a map made at start, never a path made from a name. Owns the bounds within which a grammar may work
a processor; whoever enforces one (`engine/constraint.py`) does so within the same. Knows no tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llamalith_app import gbnf
from llamalith_app.errors import ConfigError

MAX_GRAMMAR_BYTES = 100_000
MAX_REASON = 300
LIMITS = LLParserLimits(
    # Work that is counted, not timed: what is refused here is refused everywhere.
    max_items_in_row=1000,
    step_max_items=50_000,
    max_lexer_states=10_000,
    precompute_large_lexemes=False,
    # No state of the parser in a reason that people read.
    verbose_errors=False,
)
ONE_BLANK_OR_A_LINE = r"[ ]|\n[ ]{0,20}"
"""Between the parts of a JSON text. Without an end to it a small model writes blanks for ever."""

ESCAPES = 'nrbtf\\"'
"""What may follow a backslash. Keys are compared as written: with \\u a known one could stand there a second time."""


def load(folder: Path) -> dict[str, str]:
    """Name (the file's stem) -> grammar of each `*.gbnf`.

    Raises ConfigError for one that cannot be read, is too long or is no grammar.
    """
    grammars, problems = {}, []
    for path in sorted(folder.glob("*.gbnf")):
        try:
            content = path.read_bytes()
            if len(content) > MAX_GRAMMAR_BYTES:
                problems.append(f"{path}: {len(content)} bytes; a grammar has at most {MAX_GRAMMAR_BYTES}")
                continue
            grammars[path.stem] = of_gbnf(content.decode())
        except (OSError, UnicodeDecodeError, gbnf.GbnfError) as error:
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


def of_schema(schema: Any) -> str:
    """Of a JSON Schema that was judged (`schema.py`)."""
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        # All that a schema could say of itself by `x-guidance`.
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_flexible": True,
            "whitespace_pattern": ONE_BLANK_OR_A_LINE,
            "coerce_one_of": False,
            "lenient": False,
            "json_allowed_escapes": ESCAPES,
        },
    )


def problem(grammar: str) -> str:
    """Why nothing can be held to this grammar; empty: something can."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, limits=LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return ""
    return sentence(matcher.get_error())


def sentence(error: str) -> str:
    """What llguidance says is wrong, without the grammar and the parser's state that it adds, in our words."""
    first, *more = error.splitlines() or [""]
    if "NoExtension" in first:
        return "it allows no reply at all"
    if first.startswith("oneOf"):
        return "oneOf is not supported where two of its schemas may fit the same value; anyOf is"
    if first.startswith("Unimplemented keys"):
        keys = first.partition("[")[2].rstrip("]").replace('"', "")
        return f"not supported: {keys}"
    # Of a regular expression the reason comes last, after a drawing.
    last = next((line for line in more if line.startswith("error: ")), "")
    return f"{first} {last.removeprefix('error: ')}".strip()[:MAX_REASON]
