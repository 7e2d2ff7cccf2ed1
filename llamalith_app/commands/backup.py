"""`llamalith backup` and `llamalith restore`: the record as one file, and back."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from llamalith_app.config import load
from llamalith_app.errors import ConfigError
from llamalith_app.store import backup as copies
from llamalith_app.store.migrate import migrate


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where all state lives.")
def backup(file: Path, data_dir: Path | None) -> None:
    """Copy the whole record to FILE, which must not exist, also while everything runs.

    FILE holds every prompt and reply, but no secret of .env and no model; it is whole or it is not there."""
    config = load(data_dir=data_dir)
    copies.copy(config.database_path, file, _tell)
    click.echo(f"{file}: {file.stat().st_size} bytes")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where all state shall live.")
def restore(file: Path, data_dir: Path | None) -> None:
    """Make the record from FILE, where there is none; then web and worker go on from there.

    What was running when FILE was written is run again."""
    path = load(data_dir=data_dir).database_path
    left = [beside for suffix in ("-wal", "-journal") if (beside := path.with_name(path.name + suffix)).exists()]
    if left:
        raise ConfigError([f"{left[0]}: belongs to a database that is not there; move it away first"])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    copies.copy(file, path, _tell)
    migrate(path)
    click.echo(f"{path}: restored from {file}")


def _tell(done: int, of: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{100 * done // max(1, of)} %", nl=done == of, err=True)
