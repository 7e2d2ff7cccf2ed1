"""`llamalith worker`: runs one worker process, which runs jobs in its engine processes."""

from __future__ import annotations

from pathlib import Path

import click
import uvloop

from llamalith_app.commands.process import begin
from llamalith_app.commands.settings import settings_options
from llamalith_app.jobs.worker.run import run


@click.command()
@settings_options
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds for running jobs to finish at a stop.",
)
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(data_dir: Path | None, env_file: Path | None, grace: float, parent_fd: int | None) -> None:
    """Run jobs. Start as many workers as you want, on any machine that can access the database and the models."""
    config = begin("worker", data_dir, parent_fd, env_file=env_file)
    uvloop.run(run(config, grace_s=grace, supervised=parent_fd is not None))
