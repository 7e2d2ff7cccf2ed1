"""The bond between a process and the one that started it: a child notices that its parent is gone, however that
went, and holds nothing of its parent's but what it was given.

For a child that drains first, the parent keeps the write end of a pipe and gives it the read end: the kernel closes
the write end with the parent, also after kill -9. A child that has nothing to drain is ended by the kernel itself,
whatever state it is in. Knows nothing of what is done then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def watch(fd: int, on_gone: Callable[[], None]) -> None:
    """Calls `on_gone` once, in a thread of its own, when the parent is gone. `fd`: the read end, ours now."""
    os.set_inheritable(fd, False)

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os.close(fd)
        on_gone()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def keep_descriptors() -> None:
    """From here on no child inherits what this process was given beyond standard input, output and error.

    Called first thing by a process that starts children with uvloop, which, unlike subprocess, closes nothing in them:
    an engine that outlived its worker would go on holding the worker's lock.
    """
    for entry in Path("/dev/fd").iterdir():
        if int(entry.name) > 2:
            with contextlib.suppress(OSError):  # the descriptor of this very list is closed by now
                os.set_inheritable(int(entry.name), False)


def dies_with_parent(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """What a child calls between fork and exec to get the signal when the thread that started it ends, with its
    process or alone; None where the kernel cannot. By SIGKILL a child that is stopped or hung dies all the same."""
    prctl = _prctl()
    parent = os.getpid()
    if prctl is None:
        return None

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            # It went before the kernel was asked.
            os._exit(1)

    return ask_kernel


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends; stopped or hung, it dies all the same.

    Does nothing where the kernel cannot. A parent that is gone already must be noticed in another way.
    """
    if (prctl := _prctl()) is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl
