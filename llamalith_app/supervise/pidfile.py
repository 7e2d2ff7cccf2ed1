"""Files that say which process runs, and prove it.

A pid file is believed only while it is locked. The lock belongs to the open file, which the process named in
it inherits: the kernel frees it with that process, so that a stale file, or a pid that means another process
by now, fools nobody. Knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from pathlib import Path

from llamalith_app.errors import ConfigError

LOOK_EVERY_S = 0.02


def try_lock(path: Path) -> int | None:
    """An empty, locked file as a descriptor that no child inherits by itself; None: another holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if not _lock(fd):
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    return fd


def write_pid(fd: int, pid: int) -> None:
    os.pwrite(fd, f"{pid}\n".encode(), 0)


def read_pid(path: Path) -> int | None:
    """The pid in the file, whoever's it is by now; None: not written yet."""
    text = path.read_text().strip()
    return int(text) if text.isdecimal() and int(text) > 1 else None


def is_held(path: str) -> bool | None:
    """Does a process hold this lock; asked shared, as several may ask at once. None: it cannot be seen from here."""
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


async def replace(path: Path, *, term_s: float = 10.0, kill_s: float = 5.0) -> tuple[int, bool]:
    """The locked file, and whether a process had to be ended for it: SIGTERM, after `term_s` seconds SIGKILL.

    The process leads a group of its own. Raises ConfigError where it outlives SIGKILL for `kill_s` seconds.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if _lock(fd):
        os.ftruncate(fd, 0)
        return fd, False
    for number, patience_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        # None: its parent died before it wrote the pid. Such an orphan ends by itself.
        if (pid := read_pid(path)) is not None:
            signal_group(pid, number)
        try:
            async with asyncio.timeout(patience_s):
                while not _lock(fd):
                    await asyncio.sleep(LOOK_EVERY_S)
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
    """To the process and all of its group; nothing happens where they are gone. One that is stopped goes on, so that
    it can do what it is asked to."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
        os.killpg(pid, signal.SIGCONT)
