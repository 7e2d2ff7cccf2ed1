"""The environment and `.env`: which variables are set, by which of the two, and what children inherit.

The package's only reader of the environment beside the socket's folder in `paths.py`. Knows nothing of `config.json`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import parse_stream

from llamalith_app import files
from llamalith_app.settings.declaration import CONFIDENTIAL_VARIABLES, SECRET_KEYS, VARIABLES
from llamalith_app.settings.messages import UNEXPANDED, is_unexpanded, plain, shown, suggestion

MAX_ENV_FILE_BYTES = 64 * 1024
"""Its parser takes half a second for so many, in the worst case."""
TEST_VARIABLES = ("LLAMALITH_REQUIRE_ALL",)
"""Of the tests alone: a missing browser or nginx is a failure and no skip."""


class Variable(NamedTuple):
    value: str
    folder: Path
    """Where a relative path in it starts: the folder of the `.env` that sets it, or the current one."""
    prefix: str
    """How a message names its place: the `.env`'s path, or nothing."""


class EnvFile(NamedTuple):
    path: Path
    variables: dict[str, str]
    problems: list[str]


def read_env_file(path: Path) -> EnvFile | None:
    """None if there is no such file. Nothing is interpolated: the `$` of a hash are meant."""
    try:
        text = files.read_regular(path, MAX_ENV_FILE_BYTES).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return EnvFile(path, {}, [f"{path}: cannot be read: {error.strerror}"])
    except UnicodeDecodeError as error:
        return EnvFile(path, {}, [f"{path}: not UTF-8 at byte {error.start + 1}"])
    variables, problems = {}, []
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            problems.append(f"{path}: line {binding.original.line}: expected NAME=VALUE")
        elif binding.key is not None and binding.value is not None:
            variables[binding.key] = binding.value
    return EnvFile(path, variables, problems)


def variables(
    environ: Mapping[str, str], env_file: EnvFile | None, here: Path
) -> tuple[dict[str, Variable], list[str]]:
    """The variables that are set and can be used, by name, and the problems. The environment wins over `.env`; an empty
    value counts as none."""
    layers = [(environ, here, "")]
    if env_file is not None:
        layers.insert(0, (env_file.variables, env_file.path.parent, f"{env_file.path}: "))
    found = {
        name: Variable(value, folder, prefix)
        for layer, folder, prefix in layers
        for name, value in layer.items()
        if (name in VARIABLES or name.startswith("LLAMALITH_")) and name not in TEST_VARIABLES and value.strip()
    }
    problems = {
        name: f"{variable.prefix}{plain(name)}: {problem}"
        for name, variable in found.items()
        if (problem := _problem(name, variable.value))
    }
    usable = {name: variable for name, variable in found.items() if name not in problems}
    return usable, [*(env_file.problems if env_file else ()), *problems.values()]


def _problem(name: str, value: str) -> str:
    if name not in VARIABLES:
        return f"unknown variable{suggestion(name, VARIABLES)}"
    # Bytes that were not UTF-8 are lone surrogates by now.
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
        return "not UTF-8, or with a control character"
    # `require_secrets` checks the secrets itself: no part of one may be shown.
    if name not in SECRET_KEYS.values() and is_unexpanded(value):
        return f"{shown(value)} {UNEXPANDED}"
    return ""


def overridden(environ: Mapping[str, str], env_file: EnvFile | None) -> list[str]:
    """A line for each secret that the environment and `.env` both set, to different values."""
    return [
        f"{name}: the environment says something else than .env, and wins"
        for name in CONFIDENTIAL_VARIABLES
        if env_file is not None and environ.get(name, "").strip() and env_file.variables.get(name, "").strip()
        if environ[name] != env_file.variables[name]
    ]


def set_by(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the settings that the environment itself sets, sorted."""
    return tuple(sorted(name for name in VARIABLES if environ.get(name, "").strip()))


def exported_secrets() -> list[str]:
    """Names of the required secrets that the environment itself sets, whatever a .env says."""
    return [name for name in SECRET_KEYS.values() if os.environ.get(name)]


def allows_colours() -> bool:
    """False where NO_COLOR holds any text (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def child_environ(defaults: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that needs none of the secrets, such as one that parses people's model files."""
    return dict(defaults) | {name: value for name, value in os.environ.items() if name not in CONFIDENTIAL_VARIABLES}
