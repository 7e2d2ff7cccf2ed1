"""`llamalith healthcheck`: says whether this machine's web or worker is alive, for container runtimes.

It asks the web over HTTP, and checks the lock that the kernel releases when a worker ends. It does not say whether jobs
can run; that is `/readyz`. It runs every few seconds, so it imports neither the web framework nor SQLAlchemy.
"""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import click

from llamalith_app.commands.settings import settings_options
from llamalith_app.errors import ConfigError, LlamalithError
from llamalith_app.settings.load import load
from llamalith_app.supervise.pidfile import is_held

TIMEOUT_S = 3.0


class Unhealthy(LlamalithError):
    """The process is not alive, or that cannot be found out."""

    type = "unhealthy"


@click.group("healthcheck")
def command() -> None:
    """Exit with 0 if the web or a worker of this machine is alive, else with 1. Prints one line."""


@command.command()
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
def web(port: int) -> None:
    """Check that the web of this machine answers."""
    click.echo(check_web(port))


@command.command()
@settings_options
def worker(data_dir: Path | None, env_file: Path | None) -> None:
    """Check that a worker of this machine is alive."""
    try:
        path = load(data_dir=data_dir, env_file=env_file).database_path
    except ConfigError as error:
        raise Unhealthy("; ".join(error.problems)) from None
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=TIMEOUT_S)) as database:
            # A container's host name is its own: the worker of another container on the same volume does not count.
            found = database.execute(
                "SELECT id, lock_path FROM workers WHERE ended_at IS NULL AND host = ? ORDER BY id DESC",
                (socket.gethostname(),),
            ).fetchall()
    except sqlite3.Error as error:
        raise Unhealthy(f"{path}: {_reason(error)}") from None
    for worker_id, lock_path in found:
        if is_held(lock_path):
            click.echo(f"worker {worker_id} is alive")
            return
    raise Unhealthy("no worker of this machine is alive")


def check_web(port: int, timeout_s: float = TIMEOUT_S) -> str:
    """The line to print if the web on this port answers 200 within `timeout_s` seconds. Raises Unhealthy otherwise."""
    url = f"http://127.0.0.1:{port}/healthz"
    # Not urllib, which would use a proxy that the environment names.
    with closing(HTTPConnection("127.0.0.1", port, timeout=timeout_s)) as connection:
        try:
            connection.request("GET", "/healthz", headers={"Connection": "close"})
            status = connection.getresponse().status
        except (OSError, HTTPException) as error:
            raise Unhealthy(f"{url}: {_reason(error)}") from None
    if status != 200:
        raise Unhealthy(f"{url}: answers {status}")
    return f"{url}: answers"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
