"""What the clients asked, what they were answered and what they saw: the half of the evidence that no product wrote.

Times are seconds of this process's monotonic clock. Judges nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import msgspec

Kind = Literal["submit", "retry", "cancel", "read"]
End = Literal["open", "ok", "fail", "unknown"]


class Operation(msgspec.Struct, kw_only=True):
    """One thing that a client wanted, however often it had to ask for it."""

    kind: Kind
    invoked: float
    """Before it was asked for the first time."""
    ended: float | None = None
    outcome: End = "open"
    """`unknown`: the client gave up without an answer, so that it may have happened or not."""
    key: str | None = None
    conversation_id: str | None = None
    content: str | None = None
    model: str | None = None
    subject: int | None = None
    """The job that it is about; of a submit, none."""
    job_ids: list[int] = msgspec.field(default_factory=list)
    """Of every answer that named a job, in order; more than one where it was asked again."""
    word: str | None = None
    """Of a cancel: the status that it was answered."""
    n_unanswered: int = 0
    """Times that it was asked for without an answer."""
    n_busy: int = 0
    """Times that the answer was to come again: 429 or 503."""
    refusal: str | None = None
    """Of a `fail`: status and text."""

    def end(self, outcome: End) -> None:
        self.outcome, self.ended = outcome, time.monotonic()

    @property
    def job_id(self) -> int | None:
        return self.job_ids[0] if self.job_ids else None


class Sighting(msgspec.Struct):
    """A job in a terminal state, as some answer showed it."""

    job_id: int
    status: str
    result: str | None
    by: str


class Heard(msgspec.Struct, kw_only=True):
    """What a client that keeps the rules made of a job's stream, over as many connections as it took."""

    job_id: int
    final: str | None = None
    """The last event's name; None: it never came."""
    text: str = ""
    n_connections: int = 0
    n_restarts: int = 0
    broken: str | None = None
    """The rule of streams that was broken, and where."""


class Lane(msgspec.Struct):
    """What the stream of a conversation told."""

    since: str
    """Wall clock when its first event came, in UTC and as the database writes it."""
    job_ids: list[int]
    """Those of which it told the end, in that order."""


class History:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.sightings: list[Sighting] = []
        """Each once, by whom it was seen first."""
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
        told = {"operations": self.operations, "sightings": self.sightings, "heard": self.heard, "lanes": self.lanes}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1))
