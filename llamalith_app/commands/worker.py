"""`llamalith worker`: hears hints, runs jobs in an engine child, keeps leases."""

from __future__ import annotations

from pathlib import Path

import click
import uvloop

from llamalith_app.commands.process import begin
from llamalith_app.commands.settings import settings_options
from llamalith_app.jobs.worker.process import run


@click.command()
@settings_options
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds that running jobs get at the end.",
)
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(data_dir: Path | None, env_file: Path | None, grace: float, parent_fd: int | None) -> None:
    """Run the jobs. As many as wanted, on any machine that sees the database and the models."""
    config = begin("worker", data_dir, parent_fd, env_file=env_file)
    uvloop.run(run(config, grace_s=grace, supervised=parent_fd is not None))
