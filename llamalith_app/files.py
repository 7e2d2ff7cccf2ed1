"""Reads files whose paths people configure. Used by the settings, the grammars and the model files.

A configured path may name anything: a FIFO without a writer would block for ever, and a device has no end. So only
regular files are opened, and reads have a limit. Does not know what is in the files.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading without blocking. Raises OSError, also if the path is not a regular file."""
    # O_NONBLOCK: opening a FIFO would wait for its writer. It changes nothing for a regular file.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return open(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError, also if it is larger than `max_bytes` or not a regular file."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"More than {max_bytes} bytes, which is the limit", str(path))
    return content
