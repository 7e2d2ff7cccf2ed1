"""The clients' history: what they asked, were answered and saw. The evidence that the product did not write itself.

Times are seconds of this process's monotonic clock. `checker.py` compares it with the database.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import msgspec

Kind = Literal["submit", "retry", "cancel", "read"]
End = Literal["open", "ok", "fail", "unknown"]


class Operation(msgspec.Struct, kw_only=True):
    """One thing that a client wanted, which may take several requests."""

    kind: Kind
    invoked: float
    """Just before the first request."""
    ended: float | None = None
    outcome: End = "open"
    """`unknown`: the client gave up without an answer, so it may or may not have happened."""
    key: str | None = None
    conversation_id: str | None = None
    content: str | None = None
    model: str | None = None
    subject: int | None = None
    """The job that a retry or cancel is about."""
    job_ids: list[int] = msgspec.field(default_factory=list)
    """The job named by each answer, in order; more than one after repeated requests."""
    word: str | None = None
    """The status in the answer to a cancel."""
    n_unanswered: int = 0
    """Requests without an answer."""
    n_busy: int = 0
    """Answers 429 or 503."""
    refusal: str | None = None
    """Status and text of the answer of a `fail`."""

    def end(self, outcome: End) -> None:
        self.outcome, self.ended = outcome, time.monotonic()

    @property
    def job_id(self) -> int | None:
        return self.job_ids[0] if self.job_ids else None


class Sighting(msgspec.Struct):
    """A job in a terminal state, as an answer showed it."""

    job_id: int
    status: str
    result: str | None
    by: str


class Heard(msgspec.Struct, kw_only=True):
    """What a client that keeps the rules read from a job's stream, over all its connections."""

    job_id: int
    final: str | None = None
    """The last event's name; None if it never came."""
    text: str = ""
    n_connections: int = 0
    n_restarts: int = 0
    broken: str | None = None
    """The rule of streams that was broken, and where."""


class Lane(msgspec.Struct):
    """What a client read from a conversation's stream."""

    since: str
    """Wall clock when its first event came, in UTC and as the database writes it."""
    job_ids: list[int]
    """The jobs whose end it showed, in that order."""


class History:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.sightings: list[Sighting] = []
        """Each state once, with the request that showed it first."""
        self.heard: list[Heard] = []
        self.lanes: list[Lane] = []
        self._seen: set[tuple[int, str, str | None]] = set()

    def invoke(self, kind: Kind, **fields: Any) -> Operation:
        operation = Operation(kind=kind, invoked=time.monotonic(), **fields)
        self.operations.append(operation)
        return operation

    def see(self, sighting: Sighting) -> None:
        thing = (sighting.job_id, sighting.status, sighting.result)
        if thing not in self._seen:
            self._seen.add(thing)
            self.sightings.append(sighting)

    def write(self, path: Path) -> None:
        history = {"operations": self.operations, "sightings": self.sightings, "heard": self.heard, "lanes": self.lanes}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(history), indent=1))
