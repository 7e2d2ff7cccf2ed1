"""`llamalith check`: verifies the invariants of the database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import click
import msgspec
from sqlalchemy import create_engine

from llamalith_app.commands.settings import settings_options
from llamalith_app.errors import ConfigError
from llamalith_app.settings.load import load
from llamalith_app.store import check
from llamalith_app.store.database import plain_errors


@click.command()
@settings_options
def command(data_dir: Path | None, env_file: Path | None) -> None:
    """Print the row counts and check the invariants of the database, which may be in use.

    Exits with 0 if all hold, else with 1 and the rows that break them."""
    config = load(data_dir=data_dir, env_file=env_file)
    path = config.database_path
    if not path.is_file():
        raise ConfigError([f"{path}: there is no database"])
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    )
    with plain_errors(path), engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        for name, count in check.counts(connection).items():
            click.echo(f"{name}: {count}")
        broken = check.broken(connection)
    engine.dispose()
    for rule, rows in broken:
        click.echo(f"BROKEN: {rule}")
        for row in rows:
            click.echo(f"  {msgspec.json.encode(row).decode()}")
    if broken:
        raise SystemExit(1)
    click.echo(f"all {len(check.RULES)} invariants hold")
