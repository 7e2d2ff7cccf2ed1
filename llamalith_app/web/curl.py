"""A request as a command for a shell: `curl` with its body as one quoted argument.

Characters that nobody sees are escaped in the JSON, so that what is copied is what is read. Knows no route.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from typing import Any

import msgspec

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
NOT_ASCII = re.compile(r"[^\x20-\x7e]")
MAX_BODY_BYTES = 60_000
"""Of a command. Linux takes 128 KiB in one argument, and a quote in it takes five characters."""
TOKEN = "$N8N_API_TOKEN"  # noqa: S105 - the variable's name


def command(method: str, url: str, body: Any = None, *, file: str = "", is_stream: bool = False) -> str:
    """The command, with line ends between its options. `body`: sent as JSON; None: nothing is sent. `file`: where the
    body stands instead, named without anything that a shell reads. `is_stream`: the answer is shown while it comes."""
    data = f"-d @{file}" if file else "" if body is None else f"-d {_quoted(visible_json(body))}"
    is_default = method == ("POST" if data else "GET")
    parts = [
        f"curl -s{'N' if is_stream else ''}{'' if is_default else f' -X {method}'} {shlex.quote(url)}",
        f'-H "Authorization: Bearer {TOKEN}"',
    ]
    if data:
        parts += ['-H "Content-Type: application/json"', data]
    return " \\\n  ".join(parts)


def visible_json(value: Any) -> str:
    """The value as JSON on one line, in which every character can be seen."""
    return NOT_ASCII.sub(_escaped_if_hidden, msgspec.json.encode(value).decode())


def _escaped_if_hidden(found: re.Match[str]) -> str:
    if unicodedata.category(found[0]) not in HIDDEN:
        return found[0]
    units = found[0].encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _quoted(text: str) -> str:
    """In single quotes, also where none are needed."""
    quoted = shlex.quote(text)
    return quoted if quoted.startswith("'") else f"'{quoted}'"
