"""What people see on SAQ's monitor of the jobs that run: each chain of jobs mirrored in at most one task of SAQ.

Knows no job, no engine, and of SAQ the shape of a task's progress only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llamalith_app.contracts.jobs import Progress
from llamalith_app.jobs.queue import TaskProgress

Show = Callable[[TaskProgress], None]


class TaskMirror:
    """Jobs that run one after another in one place after another, and the task of SAQ that shows them, if any."""

    def __init__(self, model: str, show: Show | None) -> None:
        self.model = model
        """Of the job that runs now."""
        self.ended = asyncio.Event()
        self._show = show
        self._latest: TaskProgress | None = None

    @property
    def is_shown(self) -> bool:
        return self._show is not None

    def show_in(self, show: Show) -> None:
        """From now on in the task that `show` belongs to."""
        self._show = show
        if self._latest is not None:
            show(self._latest)

    def update(self, job_id: int, attempt: int, progress: Progress) -> None:
        self._latest = TaskProgress(
            _fraction_read(progress),
            {
                "job_id": job_id,
                "attempt": attempt,
                "phase": progress.phase,
                "prompt_tokens": progress.prompt_tokens,
                "prompt_tokens_done": progress.prompt_tokens_done,
                "completion_tokens": progress.completion_tokens,
            },
        )
        if self._show is not None:
            self._show(self._latest)


def _fraction_read(progress: Progress) -> float:
    """Of the prompt; how long a reply will be is not known before its end."""
    if not progress.prompt_tokens:
        return 0.0
    return round((progress.prompt_tokens_done or 0) / progress.prompt_tokens, 3)
