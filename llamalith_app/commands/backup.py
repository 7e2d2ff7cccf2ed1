"""`llamalith backup`: the record as one file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from llamalith_app.commands.settings import settings_options
from llamalith_app.settings.load import load
from llamalith_app.store import backup


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@settings_options
def command(file: Path, data_dir: Path | None, env_file: Path | None) -> None:
    """Copy the whole record to FILE, which must not exist, also while everything runs.

    FILE holds every prompt and reply, but no secret of .env and no model; it is whole or it is not there."""
    config = load(data_dir=data_dir, env_file=env_file)
    backup.copy(config.database_path, file, tell)
    click.echo(f"{file}: {file.stat().st_size} bytes")


def tell(done: int, of: int) -> None:
    """How far the copy is, to a person who waits for it."""
    if sys.stderr.isatty():
        click.echo(f"\r{100 * done // max(1, of)} %", nl=done == of, err=True)
