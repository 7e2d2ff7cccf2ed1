"""Delays this process at random: each event loop and thread of it may stand still where the machine could let it.

Python runs this at the start of each process that has this folder in its PYTHONPATH; it acts where DELAYS_SEED is set.
It changes only what nothing may rely on: how long a step takes, which of several ready sockets comes first, how late a
timer is, and where one thread gives way to another. The order of callbacks within a loop stays: asyncio promises it.
"""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures.thread  # noqa: F401 - its locks are made at import, and are to stay plain ones
import logging  # noqa: F401 - the same
import os
import queue
import random
import selectors
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

SHORT_S, LONG_S = 0.003, 0.05
OFTEN, SELDOM = 0.05, 0.001

# The test and the kind of process, but no port, pid or folder, which are others in each run.
CHANCE = random.Random(f"{os.environ.get('DELAYS_SEED')} {os.environ.get('PYTEST_CURRENT_TEST')} {sys.orig_argv[1:4]}")


def pause() -> None:
    """Mostly none, often a short one, seldom one as a busy machine makes."""
    drawn = CHANCE.random()
    if drawn < SELDOM:
        time.sleep(CHANCE.random() * LONG_S)
    elif drawn < OFTEN:
        time.sleep(CHANCE.random() ** 2 * SHORT_S)


def before(function: Callable[..., Any]) -> Callable[..., Any]:
    def delayed(*args: Any, **kwargs: Any) -> Any:
        pause()
        return function(*args, **kwargs)

    return delayed


class SimpleQueue(queue.SimpleQueue):
    def put(self, *args: Any, **kwargs: Any) -> None:
        pause()
        super().put(*args, **kwargs)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        got = super().get(*args, **kwargs)
        pause()
        return got


class Lock:
    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        pause()
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()
        pause()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def install() -> None:
    # Two threads that both have work change places after each of a few hundred bytecodes.
    sys.setswitchinterval(0.0001)
    queue.SimpleQueue = SimpleQueue  # type: ignore[misc]
    threading.Lock = Lock  # type: ignore[assignment]
    for kind, names in (
        (asyncio.Handle, ["_run"]),
        (asyncio.BaseEventLoop, ["call_soon_threadsafe"]),
        (queue.Queue, ["put", "get"]),
        (threading.Event, ["set"]),
        (threading.Condition, ["notify"]),
        (threading.Thread, ["_bootstrap_inner"]),
    ):
        for name in names:
            setattr(kind, name, before(getattr(kind, name)))

    select = selectors.DefaultSelector.select
    call_at = asyncio.BaseEventLoop.call_at

    def select_in_any_order(self: Any, timeout: float | None = None) -> list[Any]:
        ready = select(self, timeout)
        CHANCE.shuffle(ready)
        return ready

    def call_late(self: Any, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        return call_at(self, when + (CHANCE.random() ** 4) * SHORT_S * 3, *args, **kwargs)

    # uvloop's loop is not written in Python: asyncio's takes its place.
    uvloop = types.ModuleType("uvloop")
    uvloop.run = asyncio.run  # type: ignore[attr-defined]
    uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[attr-defined]
    sys.modules["uvloop"] = uvloop

    selectors.DefaultSelector.select = select_in_any_order  # type: ignore[method-assign]
    asyncio.BaseEventLoop.call_at = call_late  # type: ignore[assignment, method-assign]


if "DELAYS_SEED" in os.environ:
    install()
