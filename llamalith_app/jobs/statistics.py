"""What the jobs that ended lately say: how many in which time, and how long each class waited for its start.

Pure functions over rows of `store/jobs/statistics.py`: no SQL and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from llamalith_app.store.jobs.statistics import EndedJob
from llamalith_app.store.tables import Priority

SPANS = (timedelta(hours=24), timedelta(hours=6), timedelta(hours=1), timedelta(minutes=10), timedelta(minutes=1))
"""The times that throughput is shown for, the longest first."""
N_BUCKETS = 24


class Bucket(NamedTuple):
    start: datetime
    n_done: int
    n_failed: int
    n_cancelled: int


class Throughput(NamedTuple):
    """Ended jobs by the time of their end."""

    bucket: timedelta
    buckets: list[Bucket]
    """Oldest first; the last one is not over yet."""

    @property
    def n_done(self) -> int:
        return sum(bucket.n_done for bucket in self.buckets)

    @property
    def n_failed(self) -> int:
        return sum(bucket.n_failed for bucket in self.buckets)


class Wait(NamedTuple):
    """How long the jobs of a class waited for their first start and its first token, in seconds."""

    priority: int
    n_jobs: int
    p50_s: float
    p95_s: float
    token_p50_s: float | None
    """Until the first token. None: of no job it is known when that came."""


def throughput(ended: Sequence[EndedJob], *, is_whole: bool, now: datetime) -> Throughput:
    """`ended`: newest first. `is_whole`: nothing of the longest time is missing; else the longest time is taken that
    they cover."""
    span = SPANS[0]
    if not is_whole and ended:
        covered = now - ended[-1].ended_at
        span = next((one for one in SPANS if one <= covered), SPANS[-1])
    bucket = span / N_BUCKETS
    # Buckets begin at round times, so that a chart changes when a bucket is over and not with each look.
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    first = epoch + bucket * ((now - epoch) // bucket - N_BUCKETS + 1)
    counts = [{"done": 0, "error": 0, "cancelled": 0} for _ in range(N_BUCKETS)]
    for job in ended:
        number = (job.ended_at - first) // bucket
        if 0 <= number < N_BUCKETS:
            counts[number][job.status] += 1
    return Throughput(
        bucket,
        [
            Bucket(first + bucket * number, count["done"], count["error"], count["cancelled"])
            for number, count in enumerate(counts)
        ],
    )


def waits(ended: Sequence[EndedJob]) -> list[Wait]:
    """For each class of which some were started, the most urgent first."""
    found = []
    for priority in Priority:
        mine = [job for job in ended if job.priority == priority.value]
        seconds = _seconds((job.created_at, job.first_started_at) for job in mine)
        to_token = _seconds((job.created_at, job.first_token_at) for job in mine)
        if seconds:
            p50, p95 = (percentile(seconds, percent) for percent in (50, 95))
            found.append(Wait(priority.value, len(seconds), p50, p95, percentile(to_token, 50) if to_token else None))
    return found


def _seconds(spans: Iterable[tuple[datetime, datetime | None]]) -> list[float]:
    """Of those spans that have an end, ascending and none below 0."""
    return sorted(max(0.0, (end - start).total_seconds()) for start, end in spans if end is not None)


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that so many of the values do not exceed."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]
