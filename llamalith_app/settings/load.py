"""Loads the settings: defaults < `config.json` < `.env` < the environment < arguments -> one `Config`.

Owns where a `.env` is looked for, and which values cannot be used together with what is on the disk.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from llamalith_app.errors import ConfigError
from llamalith_app.settings.config import GRAMMARS, Config, ModelConfig
from llamalith_app.settings.declaration import Settings
from llamalith_app.settings.environment import read_env_file
from llamalith_app.settings.messages import origin
from llamalith_app.settings.models import bundled_path, offered_models
from llamalith_app.settings.paths import file_problem, folder_problem, is_absent, valkey_socket, write_problem
from llamalith_app.settings.sources import Sources, merge


def load(
    environ: Mapping[str, str] | None = None,
    *,
    data_dir: Path | None = None,
    env_file: Path | None = None,
    cwd: Path | None = None,
) -> Config:
    """All settings; raises ConfigError with every problem found. Requires no secret: see `require_secrets`.

    `data_dir` wins over every other place that names one. `env_file` must exist and is the only `.env` that is read;
    without it that is the one of `cwd`, else of the data directory. Relative paths start at the folder of the file that
    contains them, those of the environment and of the arguments at `cwd`.
    """
    environ = os.environ if environ is None else environ
    here = Path.cwd() if cwd is None else cwd.absolute()
    found = read_env_file(here / (env_file or ".env"))
    if found is None and env_file is not None:
        raise ConfigError([f"--env-file: {here / env_file}: there is no such file"])
    sources = merge(environ, found, here)
    chosen = here / (data_dir or sources.values.get("data_dir") or "data")
    if found is None and (found := read_env_file(chosen / ".env")) is not None:
        sources = merge(environ, found, here)
        moved_to = sources.values.get("data_dir", chosen)
        if data_dir is None and moved_to != chosen:
            sources.problems.append(
                f"{chosen / '.env'}: leads to the data directory {moved_to}, and was found in another one"
            )
    if data_dir is not None:
        sources.origins["data_dir"] = origin("--data-dir", str(data_dir), here)
    return _config(sources, offered_models(sources, bundled_path()), chosen, found.path if found else None)


def check_file(path: Path, examine: Callable[[Sequence[ModelConfig], Path], list[str]] = lambda *_: []) -> Config:
    """The settings that a `config.json` alone would make. `examine` returns the problems of the models' files and of
    the folder of grammars. Raises ConfigError with every problem found, also those that a start only warns of."""
    here = Path.cwd()
    sources = merge({"LLAMALITH_CONFIG": str(path)}, None, here, config_name="FILE")
    data_dir = sources.values.get("data_dir", here / "data")
    models = offered_models(sources, bundled_path())
    sources.problems.extend(sources.warnings)
    sources.problems.extend(examine(models, sources.values.get("grammar_dir", GRAMMARS)))
    for key in ("data_dir", "database_path"):
        if key in sources.origins and (problem := write_problem(sources.values[key])):
            sources.problems.append(f"{sources.origins[key]}: {problem}")
    return _config(sources, models, data_dir, None)


def _config(sources: Sources, models: tuple[ModelConfig, ...], data_dir: Path, env_file: Path | None) -> Config:
    values = sources.values
    database_path = values.get("database_path", data_dir / "llamalith.db")
    if problems := [*sources.problems, *_problems(sources, data_dir, database_path)]:
        raise ConfigError(problems)
    given = msgspec.convert(values, Settings)
    return Config(
        data_dir=data_dir,
        models=models,
        redis_url=values.get("redis_url") or f"unix://{quote(os.fsencode(valkey_socket(data_dir)))}",
        embedded_redis="redis_url" not in values,
        database_path=database_path,
        n_slots=values.get("worker_settings", {}).get("worker_count"),
        grammar_dir=values.get("grammar_dir", GRAMMARS),
        env_file=env_file,
        config_path=sources.config_path,
        from_environment=sources.from_environment,
        warnings=(*sources.warnings, *_ignored_warnings(sources)),
        **msgspec.structs.asdict(given),
    )


def _problems(sources: Sources, data_dir: Path, database_path: Path) -> list[str]:
    """What is valid by itself and cannot be used."""
    values, origins, problems = sources.values, sources.origins, []
    if (folder := values.get("grammar_dir")) is not None and (problem := folder_problem(folder)):
        problems.append(f"{origins['grammar_dir']}: {problem}")
    proxies = sources.variables.get("LLAMALITH_TRUSTED_PROXIES")
    place = f"{proxies.prefix}LLAMALITH_TRUSTED_PROXIES" if proxies else f"{sources.label}: trusted_proxies"
    problems += [
        f"{place}: {network} is no address and no network"
        for network in values.get("trusted_proxies", ())
        if not _is_network(network)
    ]
    of_data_dir = "" if is_absent(data_dir) else folder_problem(data_dir)
    if of_data_dir:
        problems.append(f"{origins.get('data_dir', f'LLAMALITH_DATA_DIR: {data_dir}')}: {of_data_dir}")
    # A data directory that is none has no place for a database either: one problem, reported once.
    if (problem := file_problem(database_path)) and not (of_data_dir and "database_path" not in origins):
        problems.append(f"{origins.get('database_path', database_path)}: cannot be used as a database: {problem}")
    return problems


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _ignored_warnings(sources: Sources) -> list[str]:
    return (
        [f"{sources.label}: means nothing here and is ignored: {', '.join(sources.ignored)}"] if sources.ignored else []
    )
