"""What this process knows of one job's events, in order; and from where on a reader needs them. Pure.

Readers share it: each is only a cursor, the id of the last event that it got. One rule for everything irregular (an
attempt that begins anew, entries that are missing, a stream that has expired, a cursor of neither): a `restart`, and
the whole from its beginning. Knows no Redis, no SQL and no HTTP.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from llamalith_app.contracts.events import Delta, Restart
from llamalith_app.contracts.jobs import Job
from llamalith_app.streams.streams import Entry

STORED = 1_000_000_000
"""The n of a delta that the record gave: who has it has the whole reply. Beyond what any attempt writes."""
FINAL = STORED + 1
"""The n of `done`, `error` or `cancelled`."""
MAX_FRAMES = 256
"""Events in one write, so that a late and slow reader holds no long text in memory."""


class Cursor(NamedTuple):
    attempt: int
    n: int


class Frame(NamedTuple):
    """An event as readers get it, but for what stands before its id."""

    attempt: int
    n: int
    text: bytes
    is_restart: bool = False

    def sent(self, prefix: bytes) -> bytes:
        return b"id: " + prefix + self.text


def _frame(attempt: int, n: int, kind: str, data: bytes) -> Frame:
    return Frame(attempt, n, b"%d-%d\nevent: %s\ndata: %s\n\n" % (attempt, n, kind.encode(), data), kind == "restart")


class Transcript:
    def __init__(self, job_id: int) -> None:
        self.job_id = job_id
        self._attempt = 0
        """Who told the last of these events; 0: none has told anything."""
        self._since = 0
        """Who told the first of them."""
        self._first = 1
        """The n of the first frame, present or to come."""
        self._next = 1
        """The n of the next entry."""
        self._frames: list[Frame] = []
        self._reply: list[str] = []
        """What the deltas come to."""
        self._hopeless = 0
        """The attempt of which entries are missing; 0: none."""
        self._final: Frame | None = None
        self._is_done = False
        self._progress = b""
        self.n_progress = 0
        """Changes of the progress so far."""

    @property
    def ended(self) -> bool:
        return self._final is not None

    @property
    def last(self) -> Cursor:
        return Cursor(self._attempt, self._next - 1)

    def take(self, entry: Entry) -> bool:
        """False: entries before this one are missing here. What is known or stale already changes nothing."""
        begins = entry.n == 1 or entry.kind == "restart"
        is_known = entry.n < self._next if entry.attempt == self._attempt else entry.attempt < self._attempt
        if is_known or self.ended:
            return True
        if begins and (entry.attempt > self._attempt or entry.kind == "restart"):
            self._begin(entry.attempt, entry.n, entry.since)
        elif entry.attempt == self._hopeless:
            return True
        elif entry.since != self._since or entry.n != self._next:
            return False
        self._frames.append(_frame(entry.attempt, entry.n, entry.kind, entry.data))
        self._attempt, self._next = entry.attempt, self._next + 1
        if entry.kind == "delta":
            self._reply.append(msgspec.json.decode(entry.data, type=Delta).text)
        return True

    def give_up(self, attempt: int) -> None:
        """Entries of this attempt are lost: it is asked for no more, since only a restart or the record helps."""
        self._hopeless = attempt

    def tell_progress(self, data: bytes) -> bool:
        """False: that is known."""
        text = b"event: progress\ndata: " + data + b"\n\n"
        is_new = text != self._progress
        if is_new:
            self._progress = text
            self.n_progress += 1
        return is_new

    def finish(self, job: Job) -> None:
        """What the readers have becomes what the record has, and nothing follows."""
        if self.ended:
            return
        if job.status == "done":
            self._is_done = True
            self._complete(job.attempt, job.result or "")
        self._final = _frame(job.attempt, FINAL, job.status, msgspec.json.encode(job))

    def _complete(self, attempt: int, reply: str) -> None:
        told = "".join(self._reply)
        if not self._frames or not reply.startswith(told):
            told = ""
            self._begin(attempt, STORED, attempt)
        if len(told) < len(reply):
            delta = Delta(job_id=self.job_id, text=reply[len(told) :], offset=len(told), tokens=[])
            self._frames.append(_frame(attempt, STORED, "delta", msgspec.json.encode(delta)))

    def _begin(self, attempt: int, n: int, since: int) -> None:
        self._attempt, self._since, self._first, self._next, self._hopeless = attempt, since, n, n, 0
        self._frames, self._reply = [], []

    def read(self, cursor: Cursor | None, prefix: bytes) -> tuple[list[bytes], Cursor | None]:
        """What comes next for a reader, MAX_FRAMES at most, and its cursor after that. `cursor` None: it has nothing;
        beyond that of the final event: it has all."""
        if not self._frames and not self.ended:
            return [], cursor
        sent: list[bytes] = []
        at = self._place(cursor)
        if at is None:
            at = 0
            cursor = Cursor(self._since, self._first - 1)
            if not (self._frames and self._frames[0].is_restart):
                data = msgspec.json.encode(Restart(job_id=self.job_id, attempt=self._since))
                sent.append(_frame(*cursor, "restart", data).sent(prefix))
        frames = self._frames[at : at + MAX_FRAMES]
        sent += [frame.sent(prefix) for frame in frames]
        if frames:
            cursor = Cursor(frames[-1].attempt, frames[-1].n)
        if self._final is not None and at + len(frames) == len(self._frames):
            sent.append(self._final.sent(prefix))
            cursor = Cursor(self._final.attempt, FINAL)
        return sent, cursor

    def _place(self, cursor: Cursor | None) -> int | None:
        """The first frame that the reader lacks; None: it must start again."""
        if not self._frames and not self._is_done:
            return 0
        if cursor is None:
            return 1 if self._frames and self._frames[0].is_restart else 0
        if cursor.n >= STORED:
            return len(self._frames) if self._final and self._final.attempt == cursor.attempt else None
        at = cursor.n - self._first
        if self._first <= cursor.n < self._next:
            return at + 1 if self._frames[at].attempt == cursor.attempt else None
        return 0 if (cursor.attempt, at) == (self._since, -1) else None

    def progress_after(self, n_progress: int) -> bytes:
        """The newest progress, where it changed since."""
        return self._progress if self.n_progress != n_progress and not self.ended else b""
