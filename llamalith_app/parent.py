"""Notices that the process which started this one is gone, however it went.

The parent keeps the write end of a pipe and gives each child the read end: the kernel closes the write end
with the parent, also after kill -9. Knows nothing of what is done then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def watch(fd: int, on_gone: Callable[[], None]) -> None:
    """Calls `on_gone` once, in a thread of its own, when the parent is gone. `fd`: the read end, ours now."""
    os.set_inheritable(fd, False)

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os.close(fd)
        on_gone()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
