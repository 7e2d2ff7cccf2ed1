"""Runs short-lived programs of ours on what others have made, each in a process of its own.

What such a program reads can be malicious, so it limits itself (`limits.py`). Does not know what a program computes.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import NamedTuple

from llamalith_app.settings.environment import child_environ

FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals of an administrator, a supervisor or a terminal. A program that one of them ended says nothing about what it
read."""


class ProgramResult(NamedTuple):
    stdout: bytes
    """What it had written until it ended, however it ended."""
    stderr: bytes
    returncode: int
    """Negative: the number of the signal that ended it."""

    @property
    def is_ended_from_outside(self) -> bool:
        return -self.returncode in FROM_OUTSIDE

    @property
    def complaint(self) -> str:
        """The end of what it says of its failure, for the log."""
        return self.stderr.decode(errors="replace")[-1000:]


async def run(module: str, text: bytes, *arguments: str) -> ProgramResult:
    """Runs `python -m module` with this text as its standard input. Raises OSError if it cannot be started.

    Kills it when the caller is cancelled.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        env=child_environ({}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await process.communicate(text)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return ProgramResult(stdout, stderr, process.returncode or 0)
