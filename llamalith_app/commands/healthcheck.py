"""`llamalith healthcheck`: is the web or the worker of this machine alive, for whoever starts again what is not.

Asks what cannot lie: the web's own answer, the lock that the kernel frees with a worker. Knows nothing of whether
jobs can be done (that is `/readyz`), and loads neither the web nor the database's layers: it runs every few seconds.
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

PATIENCE_S = 3.0


class Unhealthy(LlamalithError):
    type = "unhealthy"


@click.group("healthcheck")
def command() -> None:
    """Exit 0 if the web or a worker of this machine is alive, else 1; one line says more."""


@command.command()
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
def web(port: int) -> None:
    """Does the web of this machine answer."""
    url = f"http://127.0.0.1:{port}/healthz"
    # Not urllib: it would ask a proxy that the environment names.
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        try:
            connection.request("GET", "/healthz", headers={"Connection": "close"})
            status = connection.getresponse().status
        except (OSError, HTTPException) as error:
            raise Unhealthy(f"{url}: {_reason(error)}") from None
    if status != 200:
        raise Unhealthy(f"{url}: answers {status}")
    click.echo(f"{url}: answers")


@command.command()
@settings_options
def worker(data_dir: Path | None, env_file: Path | None) -> None:
    """Is a worker of this machine alive."""
    try:
        path = load(data_dir=data_dir, env_file=env_file).database_path
    except ConfigError as error:
        raise Unhealthy("; ".join(error.problems)) from None
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
            # In a container the name of the machine is the container's: a sibling on the same volume proves nothing.
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


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
