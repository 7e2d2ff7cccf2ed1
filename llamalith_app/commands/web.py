"""`llamalith web`: the HTTP side alone."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from pathlib import Path

import click

from llamalith_app.app import create_server
from llamalith_app.commands.process import begin
from llamalith_app.commands.settings import settings_options
from llamalith_app.supervise import signals


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@settings_options
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(host: str, port: int, data_dir: Path | None, env_file: Path | None, parent_fd: int | None) -> None:
    """Serve the API. Needs a worker beside it for anything to be answered."""
    # Heard before uvicorn listens to it, also as PID 1, and after it has drained, when it raises the signal once more.
    handled = [number for number in signals.requests_to_end() if number != signal.SIGINT]
    for number in handled:
        signal.signal(number, lambda *_: sys.exit(0))
    config = begin("web", data_dir, parent_fd, env_file=env_file, host=host)
    _allow_all_descriptors()
    web = create_server(config, host=host, port=port)
    for number in handled:
        # uvicorn itself knows nothing of SIGHUP.
        signal.signal(number, web.handle_exit)
    web.run()


def _allow_all_descriptors() -> None:
    """Raises the soft limit of open files to the hard one: with the usual 1,024 a crowd of as many connections would
    keep everybody else out."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems name a hard limit beyond what they then allow.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
