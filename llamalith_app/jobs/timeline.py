"""What happened to a job, step by step, from what the record holds of it.

Pure: no SQL and no clock. An attempt is one step, from its claim to its end, in phases as far as they are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from llamalith_app.contracts.jobs import Attempt, JobBrief

PhaseKind = Literal["loading", "reading", "starting", "writing"]
"""`starting`: from the prompt's last token to the reply's first."""


class Phase(NamedTuple):
    """A part of an attempt."""

    kind: PhaseKind
    started_at: datetime
    ended_at: datetime
    is_over: bool
    """It came to its own end. False: the attempt ended in it."""

    @property
    def seconds(self) -> float:
        """As that of a step."""
        return _seconds(self.started_at, self.ended_at)


class Step(NamedTuple):
    kind: Literal["waited", "attempt"]
    started_at: datetime
    ended_at: datetime | None
    """None: it goes on."""
    attempt: Attempt | None = None
    """Of an attempt."""

    def seconds(self, now: datetime) -> float:
        """How long it took, or has taken until now; not less than 0, whatever the clock did."""
        return _seconds(self.started_at, self.ended_at or now)

    @property
    def phases(self) -> list[Phase]:
        """Of an attempt, in their order, without the one that goes on. An attempt whose model did not become ready has
        none, and so has one of which nobody knows when it did."""
        return [] if self.attempt is None else _phases(self.attempt)


def _phases(attempt: Attempt) -> list[Phase]:
    found: list[Phase] = []
    at = attempt.started_at
    ends: tuple[tuple[PhaseKind, datetime | None], ...] = (
        ("loading", attempt.loaded_at),
        ("reading", attempt.prompt_read_at),
        ("starting", attempt.first_token_at),
        ("writing", attempt.ended_at if attempt.outcome == "done" else None),
    )
    for kind, until in ends:
        if until is None:
            if found and attempt.ended_at is not None:
                found.append(Phase(kind, at, attempt.ended_at, False))
            break
        found.append(Phase(kind, at, until, True))
        at = until
    return found


def _seconds(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


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
