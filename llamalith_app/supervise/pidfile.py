"""Pid files that are proven by a lock.

A pid file counts only while it is locked. The process that it names inherits the open, locked file, so the kernel
releases the lock when that process ends. A stale file, or a pid that was reused, is therefore never believed. Used by
`up`, the worker and the health check. Knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from pathlib import Path

from llamalith_app.errors import ConfigError

POLL_S = 0.02


def try_lock(path: Path) -> int | None:
    """Opens and locks the file, and empties it. Returns a descriptor that children do not inherit unless it is passed.

    Returns None if another process holds the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if not _lock(fd):
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    return fd


def write_pid(fd: int, pid: int) -> None:
    """Writes the pid into the locked file. Raises OSError, for example on a full disk."""
    os.pwrite(fd, f"{pid}\n".encode(), 0)


def read_pid(path: Path) -> int | None:
    """The pid in the file, which another process may have by now; None if it is not written yet."""
    text = path.read_text().strip()
    return int(text) if text.isdecimal() and int(text) > 1 else None


def is_held(path: str) -> bool | None:
    """Whether a process holds this lock; None if that cannot be found out from here.

    Tries a shared lock, because several processes may ask at once.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


async def take_over(path: Path, *, term_s: float = 10.0, kill_s: float = 5.0) -> tuple[int, bool]:
    """Locks the file; ends the process that holds it, with its group: SIGTERM, and SIGKILL after `term_s` seconds.

    Returns the descriptor, and whether a process was ended. Raises ConfigError if the process still holds the lock
    `kill_s` seconds after SIGKILL.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if _lock(fd):
        os.ftruncate(fd, 0)
        return fd, False
    for number, patience_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        # None if its parent died before it wrote the pid. Such an orphan ends by itself.
        if (pid := read_pid(path)) is not None:
            signal_group(pid, number)
        try:
            async with asyncio.timeout(patience_s):
                while not _lock(fd):
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            continue
        os.ftruncate(fd, 0)
        return fd, True
    os.close(fd)
    raise ConfigError([f"{path}: process {read_pid(path) or '(unknown)'} holds it and cannot be ended"])


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def signal_group(pid: int, number: int) -> None:
    """Sends the signal to the process group that `pid` leads; does nothing if it is gone.

    Then sends SIGCONT, because a stopped process would not react to SIGTERM.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
        os.killpg(pid, signal.SIGCONT)
