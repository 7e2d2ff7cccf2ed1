"""`llamalith backup`: copies the database to one file."""

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
    """Copy the database to FILE, which must not exist. Web and worker may go on running.

    FILE holds every prompt and reply, but no secrets and no models. If the copy fails, no FILE is left."""
    config = load(data_dir=data_dir, env_file=env_file)
    backup.copy(config.database_path, file, show_progress)
    click.echo(f"{file}: {file.stat().st_size} bytes")


def show_progress(n_done: int, n_total: int) -> None:
    """Shows the share that is copied, on a terminal only."""
    if sys.stderr.isatty():
        click.echo(f"\r{100 * n_done // max(1, n_total)} %", nl=n_done == n_total, err=True)
