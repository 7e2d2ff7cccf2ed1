"""`llamalith config`: judge a `config.json` before it is used, and describe what may stand in one."""

from __future__ import annotations

from pathlib import Path

import click

from llamalith_app.config import check_file
from llamalith_app.config_file import json_schema


@click.group("config")
def command() -> None:
    """Judge a config.json, or print its JSON Schema."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Judge FILE: exit 0, or 2 with every problem, one a line."""
    config = check_file(file)
    names = [model.name for model in config.models]
    click.echo(f"{file}: ok, {len(names)} model{'s' * (len(names) != 1)}: {', '.join(names)}")
    for warning in config.warnings:
        click.echo(f"warning: {warning}")


@command.command()
def schema() -> None:
    """Print the JSON Schema of config.json."""
    click.echo(json_schema())
