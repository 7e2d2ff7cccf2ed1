"""Merges the places where people set something: `config.json` < `.env` < the environment.

Knows nothing of defaults, nor of what is made of the values (`load.py`, `models.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import UNSET

from llamalith_app.settings import config_file, environment
from llamalith_app.settings.config_file import FileValues
from llamalith_app.settings.declaration import KEYS_OF_VARIABLES, SECRET_KEYS
from llamalith_app.settings.environment import EnvFile, Variable
from llamalith_app.settings.messages import origin, shown
from llamalith_app.settings.paths import locate, resolved
from llamalith_app.settings.validation import parse_variable


class Sources(NamedTuple):
    """What environment, `.env` and `config.json` set together."""

    variables: dict[str, Variable]
    values: dict[str, Any]
    """The valid values, by key of the declaration; paths absolute, structs as dicts."""
    origins: dict[str, str]
    """How a message names a path that was set, by key."""
    problems: list[str]
    knows_models: bool
    ignored: list[str]
    warnings: list[str]
    label: str
    """How messages name the `config.json`."""
    config_path: Path | None
    from_environment: tuple[str, ...]


def merge(
    environ: Mapping[str, str], env_file: EnvFile | None, here: Path, *, config_name: str = "LLAMALITH_CONFIG"
) -> Sources:
    """Reads the `config.json` that a variable names, too. `config_name`: what messages call that variable."""
    variables, problems = environment.variables(environ, env_file, here)
    file, label, config_path = config_file.NOTHING, "config.json", None
    if (named := variables.get("LLAMALITH_CONFIG")) is not None:
        file, label, config_path = _read_config_file(named, config_name, here)
        problems += file.problems
    values, origins = dict(file.values), dict(file.origins)
    values |= {key: variables[name].value for key, name in SECRET_KEYS.items() if name in variables}
    for name, key in KEYS_OF_VARIABLES.items():
        if name in variables:
            text, folder, prefix = variables[name]
            value, value_problems = parse_variable(key, text, f"{prefix}{name}")
            problems += value_problems
            if value is not UNSET:
                absolute, located = locate({key: value}, folder, prefix, problems, {key: name})
                values |= absolute
                origins |= located
    return Sources(
        variables=variables,
        values=values,
        origins=origins,
        problems=problems,
        knows_models=file.knows_models,
        ignored=list(file.ignored),
        warnings=environment.overridden(environ, env_file),
        label=label,
        config_path=config_path,
        from_environment=environment.set_by(environ),
    )


def _read_config_file(named: Variable, name: str, here: Path) -> tuple[FileValues, str, Path | None]:
    """The content of the file that LLAMALITH_CONFIG names; how messages name it; its path."""
    at = f"{named.prefix}{name}"
    try:
        path = resolved(named.value, named.folder)
    except ValueError as error:
        problem = f"{at}: {shown(named.value)} {error}"
        return FileValues({}, {}, [problem], knows_models=False, ignored=[]), named.value, None
    # As it was written, where that leads to it from here.
    label = named.value if named.folder == here else str(path)
    return config_file.read(path, label, origin(at, named.value, named.folder)), label, path
