"""Reads and validates a `config.json`, and writes its JSON Schema.

Knows nothing of the environment, of defaults outside the file and of what the settings are used for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from llamalith_app import files
from llamalith_app.settings.declaration import ConfigFile
from llamalith_app.settings.messages import plain, shown
from llamalith_app.settings.paths import locate
from llamalith_app.settings.validation import ConfigValidator

MAX_BYTES = 1024**2
"""Of a `config.json`; a hundred models take 50 kB."""


class FileValues(NamedTuple):
    values: dict[str, Any]
    """The valid values, by ConfigFile's keys and of the types there, paths absolute; structs as dicts."""
    origins: dict[str, str]
    """How a message names a path that was set: where, as what, and from which folder. By key, models as
    `model_paths.NAME`."""
    problems: list[str]
    knows_models: bool
    """False if model_paths could not be understood: a message about an unknown model would then be misleading."""
    ignored: list[str]
    """Places of keys that the original knew and that mean nothing here."""


NOTHING = FileValues({}, {}, [], knows_models=True, ignored=[])


def read(path: Path, label: str, origin: str | None = None) -> FileValues:
    """Reads and validates a file. Problems name it as `label`; one that cannot be read as `origin`. Raises nothing."""
    problems: list[str] = []
    tree = _parsed(path, label, origin or label, problems)
    ignored: list[str] = []
    values = UNSET if tree is UNSET else ConfigValidator(f"{label}: ", problems, ignored).value(tree, ConfigFile, "")
    if values is UNSET:
        return FileValues({}, {}, problems, knows_models=False, ignored=[])
    knows_models = not any(problem.startswith(f"{label}: model_paths") for problem in problems)
    absolute, origins = locate(values, path.parent, f"{label}: ", problems)
    return FileValues(absolute, origins, problems, knows_models, ignored)


def json_schema() -> bytes:
    """The JSON Schema of `config.json`, indented."""
    schema = msgspec.json.schema(ConfigFile)
    # The setting's type is a list, since the rest of the program reads it as one.
    schema["$defs"]["ModelSettings"]["properties"]["stop"]["type"] = ["string", "array"]
    return msgspec.json.format(msgspec.json.encode(schema), indent=2)


def _parsed(path: Path, label: str, origin: str, problems: list[str]) -> Any:
    repeated: list[str] = []

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated.extend(key for key in found if keys.count(key) > 1)
        return found

    try:
        # -sig: some editors put a byte order mark in front.
        text = files.read_regular(path, MAX_BYTES).decode("utf-8-sig")
        tree = json.loads(text, object_pairs_hook=without_repeats)
        json.dumps(tree, ensure_ascii=False).encode()
    except OSError as error:
        problems.append(f"{origin}: cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        problems.append(f"{label}: not UTF-8 at byte {error.start + 1}")
    except UnicodeEncodeError:
        problems.append(f"{label}: holds half of a character (a \\ud800 to \\udfff without its other half)")
    except json.JSONDecodeError as error:
        problems.append(f"{label}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        problems.append(f"{label}: nested too deeply")
    except ValueError as error:
        # Of a path with a NUL, or of a number with thousands of digits.
        problems.append(f"{label}: cannot be read: {plain(str(error))}")
    else:
        problems.extend(f"{label}: key {shown(key)} stands twice in one object" for key in repeated)
        return tree
    return UNSET
