"""How messages show what people typed: one line, shortened, without passwords.

Owns wording that every message about a setting shares. Knows no setting.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 80
UNEXPANDED = (
    "looks like a variable that nothing replaced: settings are taken as they are written, so write the value itself"
)
_VARIABLE = "[A-Za-z_][A-Za-z0-9_]*"
_BRACED = re.compile(rf"\$\{{{_VARIABLE}[^}}]*\}}|\$\([^)]*\)|\{{\{{.*?\}}\}}")
_BARE = re.compile(rf"\${_VARIABLE}|%{_VARIABLE}%")


def is_unexpanded(text: str, *, separators: str = r"[/:@,]") -> bool:
    """True for `${NAME}`, `$(command)` and `{{ name }}` anywhere, and for `$NAME` and `%NAME%` if nothing else stands
    between the same two separators: a `$` alone may belong to a value."""
    parts = re.split(separators, text.strip()) if separators else [text.strip()]
    return _BRACED.search(text) is not None or any(_BARE.fullmatch(part) for part in parts)


def suggestion(found: str, known: Iterable[str]) -> str:
    """`; did you mean x?` if a known name is similar, else nothing."""
    close = difflib.get_close_matches(found[:SHOWN_CHARACTERS], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(found: Any) -> str:
    """A value on one line: scalars as JSON, shortened, without the password of a URL; objects and lists by kind."""
    if isinstance(found, dict):
        return "an object"
    if isinstance(found, (list, tuple)):
        return f"a list of {len(found)}"
    if isinstance(found, str):
        return f'"{plain(re.sub(r"(?s)(?<=://).*@", "…@", found))}"'
    return plain(json.dumps(found))


def plain(text: str) -> str:
    """The text, shortened and escaped so that it fits into one line of a message."""
    short = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def origin(at: str, text: str, folder: Path) -> str:
    """How a message about a path begins: the setting, its value, and the folder that a relative path started from."""
    is_relative = not text.startswith(("/", "~"))
    return f"{at}: {shown(text)}{f' (relative to {folder})' if is_relative else ''}"
