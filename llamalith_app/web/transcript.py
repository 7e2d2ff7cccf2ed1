"""What this process knows of one job's events, in order, and which of them a reader still needs. Pure.

Readers share a transcript. Each of them is only a cursor: the id of the last event that it got. One rule serves
everything irregular (an attempt that restarts the reply, missing entries, an expired stream, a cursor of neither): a
`restart`, and then the whole from its beginning. An entry's data is passed on as it came, as bytes; it is decoded only
where the end of a job has to be compared with the record. Knows no Redis, no SQL, no HTTP and no format of a reader.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from llamalith_app.contracts.events import Delta, Restart
from llamalith_app.contracts.jobs import Job
from llamalith_app.streams.wire import Entry

STORED = 1_000_000_000
"""The n of a delta that the record gave. A reader with this id has the whole reply. No attempt counts so far."""
FINAL = STORED + 1
"""The n of `done`, `error` or `cancelled`."""
MAX_BATCH = 256
"""Events in one batch, so that a late and slow reader holds no long text in memory."""


class Cursor(NamedTuple):
    attempt: int
    n: int


class JobEvent(NamedTuple):
    """An event as a reader gets it, whatever format that reader wants."""

    attempt: int
    n: int
    kind: str
    """`delta`, `thinking`, `restart`, `done`, `error` or `cancelled`; or `progress`, which nobody resumes behind."""
    data: bytes
    """JSON on one line."""


class Transcript:
    def __init__(self, job_id: int) -> None:
        self.job_id = job_id
        self._attempt = 0
        """The attempt that published the last of these events; 0: there is none."""
        self._first_attempt = 0
        """The attempt that began their text."""
        self._first = 1
        """The n of the first event, present or to come."""
        self._next = 1
        """The n of the next entry."""
        self._events: list[JobEvent] = []
        self._incomplete = 0
        """The attempt whose entries are lost in part; 0: none."""
        self._final: JobEvent | None = None
        self._is_done = False
        self._progress: JobEvent | None = None
        self.n_progress = 0
        """How often the progress has changed."""

    @property
    def ended(self) -> bool:
        return self._final is not None

    @property
    def last(self) -> Cursor:
        return Cursor(self._attempt, self._next - 1)

    def add(self, entry: Entry) -> bool:
        """False: entries before this one are missing. A known or stale entry changes nothing."""
        begins = entry.n == 1 or entry.kind == "restart"
        is_known = entry.n < self._next if entry.attempt == self._attempt else entry.attempt < self._attempt
        if is_known or self.ended:
            return True
        if begins and (entry.attempt > self._attempt or entry.kind == "restart"):
            self._begin(entry.attempt, entry.n, entry.first_attempt)
        elif entry.attempt == self._incomplete:
            return True
        elif entry.first_attempt != self._first_attempt or entry.n != self._next:
            return False
        self._events.append(JobEvent(entry.attempt, entry.n, entry.kind, entry.data))
        self._attempt, self._next = entry.attempt, self._next + 1
        return True

    def mark_incomplete(self, attempt: int) -> None:
        """Entries of this attempt are lost. Its later ones are ignored: only a restart or the record helps."""
        self._incomplete = attempt

    def set_progress(self, data: bytes) -> bool:
        """False: it is the same as before."""
        if self._progress is not None and self._progress.data == data:
            return False
        self._progress = JobEvent(0, 0, "progress", data)
        self.n_progress += 1
        return True

    def finish(self, job: Job) -> None:
        """Completes the readers' text from the record and adds the final event; nothing follows that."""
        if self.ended:
            return
        if job.status == "done":
            self._is_done = True
            self._complete(job.attempt, job.result or "")
        self._final = JobEvent(job.attempt, FINAL, job.status, msgspec.json.encode(job))

    def _complete(self, attempt: int, reply: str) -> None:
        n_sent = self._n_sent(attempt, reply)
        if n_sent is None:
            n_sent = 0
            self._begin(attempt, STORED, attempt)
        if n_sent < len(reply):
            delta = Delta(job_id=self.job_id, text=reply[n_sent:], offset=n_sent, tokens=[])
            self._events.append(JobEvent(attempt, STORED, "delta", msgspec.json.encode(delta)))

    def _n_sent(self, attempt: int, reply: str) -> int | None:
        """How many characters of the reply the deltas have; None: there is no event, or they have another text."""
        if not self._events:
            return None
        deltas: Iterator[bytes] = (event.data for event in reversed(self._events) if event.kind == "delta")
        if self._events[0].attempt == self._events[-1].attempt == attempt:
            # One attempt wrote both the reply and all of these events, so the last delta says how far they go.
            deltas = itertools.islice(deltas, 1)
        try:
            found = [msgspec.json.decode(data, type=Delta) for data in deltas][::-1]
        except (msgspec.MsgspecError, ValueError):
            return None
        begin = found[0].offset if found else 0
        text = "".join(delta.text for delta in found)
        return begin + len(text) if reply.startswith(text, begin) else None

    def _begin(self, attempt: int, n: int, first_attempt: int) -> None:
        self._attempt, self._first_attempt, self._first, self._next = attempt, first_attempt, n, n
        self._incomplete = 0
        self._events = []

    def events_after(self, cursor: Cursor | None) -> tuple[list[JobEvent], Cursor | None]:
        """The next events for a reader, about MAX_BATCH at most, and its cursor behind them. `cursor` None: the reader
        has nothing."""
        if not self._events and not self.ended:
            return [], cursor
        batch: list[JobEvent] = []
        at = self._index_after(cursor)
        if at is None:
            at = 0
            cursor = Cursor(self._first_attempt, self._first - 1)
            if not (self._events and self._events[0].kind == "restart"):
                data = msgspec.json.encode(Restart(job_id=self.job_id, attempt=self._first_attempt))
                batch.append(JobEvent(*cursor, "restart", data))
        events = self._events[at : at + MAX_BATCH]
        batch += events
        if events:
            cursor = Cursor(events[-1].attempt, events[-1].n)
        if self._final is not None and at + len(events) == len(self._events):
            batch.append(self._final)
            cursor = Cursor(self._final.attempt, FINAL)
        return batch, cursor

    def _index_after(self, cursor: Cursor | None) -> int | None:
        """Where the events begin that the reader lacks; None: it must start again."""
        if not self._events and not self._is_done:
            return 0
        if cursor is None:
            return 1 if self._events and self._events[0].kind == "restart" else 0
        if cursor.n >= STORED:
            return len(self._events) if self._final and self._final.attempt == cursor.attempt else None
        at = cursor.n - self._first
        if self._first <= cursor.n < self._next:
            return at + 1 if self._events[at].attempt == cursor.attempt else None
        return 0 if (cursor.attempt, at) == (self._first_attempt, -1) else None

    def progress_after(self, n_progress: int) -> JobEvent | None:
        """The newest progress where it has changed since `n_progress` was read; nothing once the job has ended."""
        return self._progress if self.n_progress != n_progress and not self.ended else None
