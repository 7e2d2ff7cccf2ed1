"""`llamalith web`: runs the web process alone."""

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
    """Serve the API and the pages. Jobs run only if a worker runs too."""
    # For the time before uvicorn installs its handlers, also as PID 1; and after the drain, when uvicorn raises the
    # signal once more.
    handled = [number for number in signals.requests_to_end() if number != signal.SIGINT]
    for number in handled:
        signal.signal(number, lambda *_: sys.exit(0))
    config = begin("web", data_dir, parent_fd, env_file=env_file, host=host)
    _allow_all_descriptors()
    web = create_server(config, host=host, port=port)
    for number in handled:
        # uvicorn does not handle SIGHUP itself.
        signal.signal(number, web.handle_exit)
    web.run()


def _allow_all_descriptors() -> None:
    """Raises the soft limit of open files to the hard limit. With the usual 1,024, as many connections would block all
    further ones."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems report a hard limit that they then refuse.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
