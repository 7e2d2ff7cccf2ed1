"""`llamalith web`: the HTTP side alone."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import click
import uvicorn

from llamalith_app.app import WebApp, create_app
from llamalith_app.commands.process import begin
from llamalith_app.config import Config


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where all state lives.")
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(host: str, port: int, data_dir: Path | None, parent_fd: int | None) -> None:
    """Serve the API. Needs a worker beside it for anything to be answered."""
    # Heard before uvicorn listens to it, also as PID 1, and after it has drained, when it raises the signal once more.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = begin("web", data_dir, parent_fd)
    server(config, host=host, port=port).run()


class Server(uvicorn.Server):
    """Ends open streams before it waits for connections to end."""

    def __init__(self, app: WebApp, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.end_streams()
        await super().shutdown(sockets)


def server(config: Config, *, host: str = "127.0.0.1", port: int = 0) -> Server:
    app = create_app(config)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=list(config.trusted_proxies),
        log_config=None,
        access_log=False,
        server_header=False,
        # An open connection would otherwise hold the process for ever.
        timeout_graceful_shutdown=5,
    )
    return Server(app, settings)
