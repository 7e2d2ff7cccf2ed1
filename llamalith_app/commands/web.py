"""`llamalith web`: the HTTP side alone."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import click
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llamalith_app import signals
from llamalith_app.app import WebApp, create_app
from llamalith_app.commands.process import begin
from llamalith_app.commands.settings import settings_options
from llamalith_app.config import Config


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
    web = server(config, host=host, port=port)
    for number in handled:
        # uvicorn itself knows nothing of SIGHUP.
        signal.signal(number, web.handle_exit)
    web.run()


class Server(uvicorn.Server):
    """Ends open streams before it waits for connections to end."""

    def __init__(self, app: WebApp, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.end_streams()
        await super().shutdown(sockets)


class OneWrite:
    """A transport that tells the kernel at once what is written in one turn of the event loop.

    uvicorn writes an answer's head and its body apart, and uvloop hands on each at once; with one system call for both
    the product accepts 8 % more jobs a second (bench/README.md).
    """

    MOST_HELD = 64 * 1024
    """Bytes; more is handed on at once, so that the transport below judges whether its reader keeps up."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held += data
        if len(self._held) > self.MOST_HELD:
            self.flush()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._writes = OneWrite(transport, self.loop)
        super().connection_made(self._writes)  # type: ignore[arg-type]

    def eof_received(self) -> None:
        """The transport below closes by itself after this: a client may end its side and still want its answer."""
        self._writes.flush()


def server(config: Config, *, host: str = "127.0.0.1", port: int = 0) -> Server:
    app = create_app(config)
    settings = uvicorn.Config(
        app,
        http=Protocol,
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
