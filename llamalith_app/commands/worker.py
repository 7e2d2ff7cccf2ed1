"""`llamalith worker`: hears hints, runs jobs in an engine child, keeps leases."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click
import uvloop

from llamalith_app import logs, parent
from llamalith_app.config import load, require_secrets
from llamalith_app.jobs.queue import refuse_old_redis
from llamalith_app.jobs.worker import run
from llamalith_app.store.migrate import migrate


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where all state lives.")
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds that running jobs get at the end.",
)
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(data_dir: Path | None, grace: float, parent_fd: int | None) -> None:
    """Run the jobs. As many as wanted, on any machine that sees the database and the models."""
    config = load(data_dir=data_dir)
    logs.start("worker", config)
    require_secrets(config)
    uvloop.run(refuse_old_redis(config.redis_url))
    migrate(config.database_path)
    if parent_fd is not None:
        parent.watch(parent_fd, lambda: os.kill(os.getpid(), signal.SIGTERM))
    uvloop.run(run(config, grace_s=grace))
