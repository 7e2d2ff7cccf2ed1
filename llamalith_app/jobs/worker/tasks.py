"""Tasks that go on by themselves and that somebody waits for at the end. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class TaskSet:
    """Holds its tasks until they end: asyncio itself holds a task too weakly to keep it alive."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def all_end(self, within_s: float | None = None) -> bool:
        """Waits for the tasks of this moment; returns False if one still runs, or a new one does, after `within_s`
        seconds (None: no limit). Raises nothing of what they raise."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        return not self._tasks
