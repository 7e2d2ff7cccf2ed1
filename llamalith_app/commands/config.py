"""`llamalith config`: judge a config.json, or tell its shape."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llamalith_app import config_file
from llamalith_app.config import load


@click.group("config")
def command() -> None:
    """Judge a config.json, or print its schema."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Tell every problem of FILE, one a line; exit 0 if there is none, 2 else."""
    config = load({"LLAMALITH_CONFIG": str(file.absolute())}, cwd=file.absolute().parent)
    names = ", ".join(model.name for model in config.models)
    click.echo(f"{file}: ok, {len(config.models)} models: {names}")
    for warning in config.warnings:
        click.echo(f"warning: {warning}")


@command.command()
def schema() -> None:
    """Print the JSON Schema of config.json."""
    click.echo(json.dumps(config_file.schema(), indent=2))
