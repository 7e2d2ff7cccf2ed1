"""Makes a child process end when its parent does, however the parent ended, kill -9 included.

- A child that drains first uses `watch`: the parent holds the write end of a pipe and the child waits at the read end,
  which the kernel closes with the parent.
- Another child gets a signal from the kernel (`PR_SET_PDEATHSIG`); SIGKILL works even while it is stopped or hung. The
  parent asks for it before `exec` (`preexec_die_with_parent`) for programs that are not ours, and for the engine, which
  must be covered before its first instruction. Our helper programs ask for it themselves (`die_with_parent`): they are
  started by processes with many threads and much memory, where code between fork and exec is unsafe and slow.

Does not know what a process does when its parent is gone.
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
    """Calls `on_gone` once, in a thread of its own, when the parent is gone. Takes over `fd`, the pipe's read end."""
    os.set_inheritable(fd, False)

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os.close(fd)
        on_gone()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def keep_descriptors() -> None:
    """Makes every open descriptor but standard input, output and error non-inheritable.

    Called first by web and worker. uvloop, unlike subprocess, closes no descriptors in the children that it starts: an
    engine that outlived its worker would go on holding the worker's lock.
    """
    for entry in Path("/dev/fd").iterdir():
        if int(entry.name) > 2:
            with contextlib.suppress(OSError):  # the descriptor of this directory listing is closed by now
                os.set_inheritable(int(entry.name), False)


def preexec_die_with_parent(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """A `preexec_fn`: the kernel then sends the signal to the child when the thread that started it ends.

    With SIGKILL a stopped or hung child dies too. Returns None on systems that cannot do this.
    """
    prctl = _prctl()
    parent = os.getpid()
    if prctl is None:
        return None

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            # The parent ended before the kernel was asked.
            os._exit(1)

    return ask_kernel


def die_with_parent() -> None:
    """Asks the kernel to kill this process, even if it is stopped or hung, when the thread that started it ends.

    Does nothing on systems that cannot do this. A parent that has ended before the call goes unnoticed.
    """
    if (prctl := _prctl()) is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl
