"""`llamalith restore`: makes the database from a file that `llamalith backup` wrote."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from llamalith_app.commands.backup import show_progress
from llamalith_app.commands.settings import settings_options
from llamalith_app.errors import ConfigError
from llamalith_app.settings.load import load
from llamalith_app.store import backup
from llamalith_app.store.database import write_engine
from llamalith_app.store.migrate import migrate


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@settings_options
def command(file: Path, data_dir: Path | None, env_file: Path | None) -> None:
    """Make the database from FILE. There must be no database yet.

    Jobs that were running when FILE was written run again; that start is not counted as an attempt. New job ids
    continue after a gap, so that no id is used twice."""
    path = load(data_dir=data_dir, env_file=env_file).database_path
    left = [beside for suffix in ("-wal", "-journal") if (beside := path.with_name(path.name + suffix)).exists()]
    if left and not path.exists():
        raise ConfigError([f"{left[0]}: belongs to a database that is not there; move it away first"])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    backup.copy(file, path, show_progress)
    try:
        migrate(path)
        engine = write_engine(path)
        with engine.begin() as connection:
            backup.go_on(connection, datetime.now(UTC))
        engine.dispose()
    except BaseException:
        # Half a database would block the next try.
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        raise
    click.echo(f"{path}: restored from {file}")
