"""How tasks of the event loop are ended for certain. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any


async def cancel_until_ended(tasks: Collection[asyncio.Task[Any]], *, within_s: float, again_s: float = 0.05) -> None:
    """Cancels these tasks until they have ended, every `again_s` seconds, for `within_s` seconds at most.

    One cancel is not enough: redis-py sends by `asyncio.wait_for`, which before Python 3.12 loses a cancel that comes
    when the command is sent. Such a task would go on, and connect again.
    """
    late = {task for task in tasks if not task.done()}
    deadline = time.monotonic() + within_s
    while late and time.monotonic() < deadline:
        for task in late:
            task.cancel()
        _, late = await asyncio.wait(late, timeout=again_s)
