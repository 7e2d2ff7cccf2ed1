"""Waiting for what must happen, by looking at it; never for a time that is hoped to be enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_S, SELDOM_S = 0.01, 0.05
"""Between two looks, at first and at last: what takes long is looked at less often."""


async def eventually(look: Callable[[], Awaitable[T]], *, within_s: float = 20) -> T:
    """The first true thing that `look` returns. Fails the test when the time is over, with the last it saw."""
    deadline = time.monotonic() + within_s
    pause_s = LOOK_S
    while not (seen := await look()):
        assert time.monotonic() < deadline, f"not within {within_s} s; last seen: {seen!r}"
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.25, SELDOM_S)
    return seen
