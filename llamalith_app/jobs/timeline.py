"""What happened to a job, step by step, from what the record holds of it.

Pure: no SQL and no clock. When a model was loaded, when a prompt had been read and when the first token came is not in
the record: an attempt is one step, from its claim to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from llamalith_app.contracts.jobs import Attempt, JobBrief


class Step(NamedTuple):
    kind: Literal["waited", "attempt"]
    started_at: datetime
    ended_at: datetime | None
    """None: it goes on."""
    attempt: Attempt | None = None
    """Of an attempt."""

    def seconds(self, now: datetime) -> float:
        """How long it took, or has taken until now; not less than 0, whatever the clock did."""
        return max(0.0, ((self.ended_at or now) - self.started_at).total_seconds())


def steps(job: JobBrief, attempts: Sequence[Attempt]) -> list[Step]:
    """Waits and attempts in turn, oldest first."""
    found: list[Step] = []
    free_at: datetime | None = job.created_at
    for attempt in attempts:
        if free_at is not None:
            found.append(Step("waited", free_at, attempt.started_at))
        found.append(Step("attempt", attempt.started_at, attempt.ended_at, attempt))
        free_at = attempt.ended_at
    if job.status == "queued" and free_at is not None:
        found.append(Step("waited", free_at, None))
    elif not attempts and job.processed_at is not None:
        found.append(Step("waited", job.created_at, job.processed_at))
    return found
