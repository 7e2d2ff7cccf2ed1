"""`llamalith config`: validates a `config.json` before it is used, and prints the schema of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import click

from llamalith_app import files
from llamalith_app.engine import gguf
from llamalith_app.errors import ConfigError
from llamalith_app.grammars import grammar
from llamalith_app.settings.config import ModelConfig
from llamalith_app.settings.config_file import json_schema
from llamalith_app.settings.load import check_file
from llamalith_app.settings.messages import plain
from llamalith_app.settings.models import model_file_problem


@click.group("config")
def command() -> None:
    """Validate a config.json, or print its JSON Schema."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Validate FILE and the files that it names: exit 0, or 2 with every problem, one a line.

    Reads a model's whole file if its SHA-256 is given."""
    config = check_file(file, problems_of_files)
    names = [model.name for model in config.models]
    click.echo(f"{file}: ok, {len(names)} model{'s' * (len(names) != 1)}: {', '.join(names)}")
    for warning in config.warnings:
        click.echo(f"warning: {warning}")


@command.command()
def schema() -> None:
    """Print the JSON Schema of config.json."""
    click.echo(json_schema())


def problems_of_files(models: Sequence[ModelConfig], grammar_dir: Path) -> list[str]:
    """Why a start would be refused or the first jobs would fail, by the files alone: nothing is loaded."""
    problems = [problem for model in models if (problem := _model_problem(model))]
    try:
        grammar.load(grammar_dir)
    except ConfigError as error:
        problems += error.problems
    return problems


def _model_problem(model: ModelConfig) -> str:
    if model.path is None:
        return ""
    origin = model.origin or f"model {plain(model.name)}: {model.path}"
    if problem := model_file_problem(model.path):
        return f"{origin}: {problem}"
    try:
        if flaw := gguf.read(model.path).flaw:
            return f"{origin}: {flaw}"
        if model.sha256 is None:
            return ""
        with files.open_regular(model.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except gguf.BadGguf as error:
        return f"{origin}: {error}"
    except OSError as error:
        return f"{origin}: cannot be read: {error.strerror}"
    if digest != model.sha256:
        return f"{origin}: its SHA-256 is {digest}, not {model.sha256} as model_sha256 says"
    return ""
