"""Who is next: pure functions over summaries of what is due. No SQL, no clock, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from llamalith_app.store.jobs import Due

MAX_WAIT_FOR_SWAP = timedelta(seconds=60)
"""How long the loaded model may keep jobs of another one waiting."""


def next_model(due: Sequence[Due], loaded: str | None, now: datetime) -> str | None:
    """Which model a free engine should work for; None: nothing is due.

    (1) The model whose oldest job has waited longer than MAX_WAIT_FOR_SWAP, the longest first;
    (2) else the loaded one while it has jobs; (3) else the one with the oldest job.
    """
    if not due:
        return None
    oldest = min(due, key=lambda one: one.oldest)
    if now - oldest.oldest > MAX_WAIT_FOR_SWAP:  # (1)
        return oldest.model
    if any(one.model == loaded for one in due):  # (2)
        return loaded
    return oldest.model  # (3)


def pause_before(attempt: int) -> timedelta:
    """Between a failed attempt (1 is the first) and the next: 0.25 s, 1 s, 4 s … at most a minute."""
    return timedelta(seconds=min(60.0, 0.25 * 4.0 ** min(attempt - 1, 10)))
