"""Where things lie: what a path in a setting means, whether it can be used, and the embedded Valkey's socket.

Knows nothing of which place a value came from.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamalith_app.settings.declaration import PATH_KEYS
from llamalith_app.settings.messages import UNEXPANDED, is_unexpanded, origin, plain, shown

MAX_SOCKET_PATH_BYTES = 103
"""Of a Unix socket, on every system; Linux would take four more."""


def resolved(text: str, folder: Path) -> Path:
    """The absolute path that a setting means: `~` is a home directory, a relative path starts at `folder`.

    Raises ValueError, with the rest of a sentence, for a variable that nothing replaced and for an unknown home.
    """
    if is_unexpanded(text):
        raise ValueError(UNEXPANDED)
    # Not Path's own: to that `./~/x`, which names a folder of this name, is the same as `~/x`.
    expanded = os.path.expanduser(text)  # noqa: PTH111
    if expanded.startswith("~"):
        raise ValueError("starts with a ~ whose home directory is not known; ./~ is a folder of this name")
    return folder / expanded


def locate(
    values: Mapping[str, Any], folder: Path, prefix: str, problems: list[str], names: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same values with absolute paths (as `Path`), relative ones starting at `folder`; and their origins.

    Messages name a value by `prefix` and its name in `names`, else its key. Values that cannot be used are left out and
    added to the problems.
    """
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def absolute(key: str, text: str, at: str) -> Path | None:
        try:
            path = resolved(text, folder)
        except ValueError as error:
            problems.append(f"{at}: {shown(text)} {error}")
            return None
        origins[key] = origin(at, text, folder)
        return path

    for key, value in values.items():
        at = f"{prefix}{(names or {}).get(key, key)}"
        if key in PATH_KEYS:
            found[key] = absolute(key, value, at)
        elif key == "database_url":
            found["database_path"] = absolute("database_path", value.removeprefix("sqlite:///"), at)
        elif key == "model_paths":
            paths = {name: absolute(f"{key}.{name}", text, f"{at}.{plain(name)}") for name, text in value.items()}
            found[key] = {name: path for name, path in paths.items() if path is not None}
        elif key == "redis_url" and is_unexpanded(value):
            problems.append(f"{at}: {shown(value)} {UNEXPANDED}")
        else:
            found[key] = value
    return {key: value for key, value in found.items() if value is not None}, origins


def valkey_socket(data_dir: Path) -> Path:
    """The embedded Valkey's socket: under `data_dir`, or in a short private folder where that is too long."""
    socket = data_dir / "valkey" / "valkey.sock"
    if _fits_a_socket(socket):
        return socket
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    folder = f"llamalith-{os.getuid()}-{digest}"
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", folder, "valkey.sock")  # noqa: S108 - checked by its user
    return short if _fits_a_socket(short) else Path("/tmp", folder, "valkey.sock")  # noqa: S108 - the same


def _fits_a_socket(path: Path) -> bool:
    return path.is_absolute() and len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES


def is_absent(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def file_problem(path: Path) -> str:
    """Why there is no file and none can be made; empty: there is one, or nothing is in its way."""
    try:
        return "" if stat.S_ISREG(path.stat().st_mode) else "Not a regular file"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)


def folder_problem(path: Path) -> str:
    """Why a path cannot be used as a folder; empty: it can."""
    try:
        # A folder lists its entries; anything else raises the reason.
        with os.scandir(path):
            return ""
    except OSError as error:
        return f"cannot be used as a folder: {error.strerror}"


def write_problem(path: Path) -> str:
    """Why this user could make or change nothing at a path; empty: it could."""
    there = next(place for place in (path, *path.parents) if not is_absent(place))
    try:
        is_folder = stat.S_ISDIR(there.stat().st_mode)
    except OSError:
        return ""  # reported where it is used as a folder or a file
    if os.access(there, os.W_OK | (os.X_OK if is_folder else 0)):
        return ""
    return f"{there} cannot be written by this user"
