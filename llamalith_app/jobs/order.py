"""Who is next: pure functions over summaries of what is due. No SQL, no clock, no engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from llamalith_app.config_file import MaxWait
from llamalith_app.store.jobs import Due
from llamalith_app.store.tables import Priority

RELIEF = 8
"""Of so many places one goes to late jobs of other classes than the most urgent."""


class Room(NamedTuple):
    """How a model stands in the pool."""

    n_free: int
    """Places that would be given now, also by loading it."""
    since: datetime | None = None
    """When it was loaded, or began to be; None: it is not."""
    waits_for: frozenset[str] = frozenset()
    """Models at work that must end before it can be loaded."""


def next_start(
    due: Iterable[Due], rooms: Mapping[str, Room], max_wait: Mapping[int, timedelta], n_started: int, now: datetime
) -> Due | None:
    """Whose job a place is given to next; None: nothing that is due can start now. `max_wait` is by priority;
    `n_started` counts the places given so far.

    What is due is ranked:
    (1) A job that has waited longer than the bound of its class is late, and late ones go before all others:
        (1.1) the most urgent class first, but last for each RELIEF-th place, so that a flood of it starves no other;
        (1.2) in a class a loaded model with jobs from before it was loaded, so that one load serves all that had
              gathered, and two models that are always late do not take turns job by job;
        (1.3) then the model with the oldest job.
    (2) Then loaded models: the most urgent class first, the oldest job in it.
    (3) Then the others, likewise.
    The place goes to the first in this rank whose model has one, but
    (4) a late job whose model waits for others to end holds these back: they get no new place, and nothing else is
        loaded before it.
    """

    def is_late(one: Due) -> bool:
        return now - one.oldest > max_wait[one.priority]

    groups = list(due)
    late = {one.priority for one in groups if is_late(one)}
    last = min(late) if len(late) > 1 and n_started % RELIEF == RELIEF - 1 else None

    def rank(one: Due) -> tuple[int, bool, int, bool, datetime]:
        since = rooms[one.model].since
        if is_late(one):  # (1)
            gathered = since is not None and one.oldest <= since
            return 1, one.priority == last, one.priority, not gathered, one.oldest  # (1.1), (1.2), (1.3)
        return 2 if since else 3, False, one.priority, False, one.oldest  # (2), (3)

    held_back: frozenset[str] = frozenset()
    for one in sorted(groups, key=rank):
        room = rooms[one.model]
        if room.n_free > 0 and one.model not in held_back and not (held_back and room.since is None):
            return one
        if is_late(one) and room.waits_for and not held_back:  # (4)
            held_back = room.waits_for
    return None


def without_one(due: Sequence[Due], started: Due) -> list[Due]:
    """The same after one job of a group has been given a place."""
    return [
        one._replace(n_jobs=one.n_jobs - 1) if one is started else one
        for one in due
        if one is not started or one.n_jobs > 1
    ]


def bounds(max_wait: MaxWait) -> dict[int, timedelta]:
    """By priority, as `next_start` takes them."""
    return {one: timedelta(seconds=getattr(max_wait, one.name.lower())) for one in Priority}


def pause_before(attempt: int) -> timedelta:
    """Between a failed attempt (1 is the first) and the next: 0.25 s, 1 s, 4 s … at most a minute."""
    return timedelta(seconds=min(60.0, 0.25 * 4.0 ** min(attempt - 1, 10)))
