"""`llamalith migrate`: upgrades the database to this version's schema."""

from __future__ import annotations

from pathlib import Path

import click

from llamalith_app.commands.settings import settings_options
from llamalith_app.logs import say
from llamalith_app.settings.load import load
from llamalith_app.store.migrate import migrate


@click.command()
@settings_options
@click.option("--quiet", is_flag=True, help="Print nothing if there was nothing to do.")
def command(data_dir: Path | None, env_file: Path | None, quiet: bool) -> None:
    """Upgrade the database to this version's schema. Web and worker do so when they start."""
    config = load(data_dir=data_dir, env_file=env_file)
    done = migrate(config.database_path)
    if done or not quiet:
        say(f"{config.database_path}: {'migrated' if done else 'nothing to do'}")
