"""The data of Server-Sent Events, a struct for each event; the event has the name in its docstring.

Beside these, `done`, `error` or `cancelled` is the last event of a job; its data is the Job as `GET /api/jobs/{id}`
shows it.
"""

from __future__ import annotations

import msgspec

from llamalith_app.contracts.jobs import Progress


class ProgressEvent(Progress, kw_only=True):
    """`progress`: where the job stands. The newest counts; none is repeated, so it has no id."""

    job_id: int
    attempt: int


class Delta(msgspec.Struct, kw_only=True):
    """`delta`: more of the reply. All of a job, one after another, are the stored reply to the character."""

    job_id: int
    text: str
    """May be empty at the end, where tokens are left that show as nothing."""
    offset: int
    """Characters of the reply before it."""
    tokens: list[int]
    """Ids of the tokens that were written since the event before it; their text may come a little later. Empty where
    the text comes from the stored reply."""


class Thinking(msgspec.Struct, kw_only=True):
    """`thinking`: more of what the model wrote at first, between `<think>` and `</think>`; no part of the reply."""

    job_id: int
    text: str
    tokens: list[int]


class Restart(msgspec.Struct, kw_only=True):
    """`restart`: throw away the job's text and thinking so far; what follows is the whole from its beginning."""

    job_id: int
    attempt: int


Event = ProgressEvent | Delta | Thinking | Restart
