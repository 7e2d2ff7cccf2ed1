"""The data of a stream's events. Each docstring begins with the event's name.

The last event of a job is none of these but `done`, `error` or `cancelled`. Its data is the Job as `GET /api/jobs/{id}`
answers it.
"""

from __future__ import annotations

import msgspec

from llamalith_app.contracts.jobs import Progress


class ProgressEvent(Progress, kw_only=True):
    """`progress`: where the job stands. Only the newest counts. It is never sent again, so it has no id."""

    job_id: int
    attempt: int


class Delta(msgspec.Struct, kw_only=True):
    """`delta`: more of the reply. All deltas of a job, joined, are exactly the stored reply."""

    job_id: int
    text: str
    """May be empty at the end, for last tokens that have no text."""
    offset: int
    """The number of characters of the reply before this text."""
    tokens: list[int]
    """Ids of the tokens that were written since the previous event. Their text may come a little later. Empty where the
    text comes from the stored reply."""


class Thinking(msgspec.Struct, kw_only=True):
    """`thinking`: more of what the model wrote before its reply, between markers such as `<think>` and `</think>`."""

    job_id: int
    text: str
    tokens: list[int]


class Restart(msgspec.Struct, kw_only=True):
    """`restart`: discard the job's text and thinking so far. All of it follows, from the beginning."""

    job_id: int
    attempt: int


Event = ProgressEvent | Delta | Thinking | Restart
