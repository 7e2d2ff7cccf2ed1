"""Named GBNF grammars: a map of the files found in one folder at start, never a path made from a name."""

from __future__ import annotations

from pathlib import Path

from llamalith_app.errors import ConfigError

MAX_GRAMMAR_BYTES = 100_000


def load(folder: Path) -> dict[str, str]:
    """Name (the file's stem) -> text of each `*.gbnf`.

    Raises ConfigError for one that cannot be read or is too long.
    """
    grammars, problems = {}, []
    for path in sorted(folder.glob("*.gbnf")):
        try:
            content = path.read_bytes()
            if len(content) > MAX_GRAMMAR_BYTES:
                problems.append(f"{path}: {len(content)} bytes; a grammar has at most {MAX_GRAMMAR_BYTES}")
            grammars[path.stem] = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(problems)
    return grammars
