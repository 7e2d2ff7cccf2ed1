"""How a worker publishes its attempts: one `StreamPublisher` a worker, one `AttemptStream` an attempt.

Owns what is coalesced into one entry, what is sent again after Redis was away, and what is repeated after Redis lost
it. All of it may be lost at any moment: the record alone counts. Knows no SQL, no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from llamalith_app.contracts.events import Delta, Restart, Thinking
from llamalith_app.contracts.jobs import Progress
from llamalith_app.streams import progress, wire
from llamalith_app.streams.resume import ResumePoint, TextChunk, append_text, text_beyond
from llamalith_app.streams.wire import UNAVAILABLE, Entry, StreamMessage, TextKind


class Timings(msgspec.Struct, frozen=True):
    """All in seconds."""

    coalesce_s: float = 0.04
    """Text within so long becomes one entry a job, sent for all jobs in one pipeline. The first text after a pause is
    sent at once."""
    retry_s: float = 0.5
    """The pause before the next try while Redis is away."""
    check_s: float = 1.0
    """How often Redis is asked whether it still holds all of a stream."""
    stream_ttl_s: int = 600
    """A stream's TTL after its last entry. The record has the reply from then on."""
    ttl_refresh_s: float = 60
    """How often the stream's TTL is refreshed."""


TIMINGS = Timings()


async def publish_ended(redis: Redis, record: str, job_ids: Iterable[int]) -> None:
    """Publishes that the end of these jobs is in the record. Never raises for a Redis that is away."""
    messages = [StreamMessage(job_id, Entry(0, 0, "ended", b"", 0)) for job_id in job_ids]
    with contextlib.suppress(*UNAVAILABLE):
        await redis.publish(wire.channel_name(record), wire.encode_messages(messages))


class StreamPublisher:
    """Publishes for all attempts of one worker, in one pipeline. Nobody waits for it and it raises nothing. What Redis
    did not take is sent again."""

    def __init__(self, redis: Redis, record: str, timings: Timings = TIMINGS) -> None:
        self._redis = redis
        self._record = record
        self._timings = timings
        self._pending: dict[AttemptStream, None] = {}
        """The streams that have something to send, in their order."""
        self._next_send = 0.0
        self._flush_now = asyncio.Event()
        """An attempt waits until what it has is sent."""
        self._sending: asyncio.Task[None] | None = None

    def open_attempt(self, job_id: int, attempt: int, resume_from: ResumePoint | None = None) -> AttemptStream:
        return AttemptStream(self._record, job_id, attempt, self._wake, resume_from, self._timings)

    def _wake(self, stream: AttemptStream) -> None:
        self._pending[stream] = None
        if stream.is_flushing:
            self._flush_now.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_pending())

    async def _send_pending(self) -> None:
        while self._pending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_send - time.monotonic()):
                    await self._flush_now.wait()
            self._flush_now.clear()
            streams = list(self._pending)
            self._pending.clear()
            await self._send(streams)

    async def _send(self, streams: list[AttemptStream]) -> None:
        self._next_send = time.monotonic() + self._timings.coalesce_s
        pipeline = self._redis.pipeline(transaction=False)
        messages: list[StreamMessage] = []
        ends = [0]
        for stream in streams:
            messages += stream.add_to(pipeline)
            ends.append(len(pipeline))
        pipeline.publish(wire.channel_name(self._record), wire.encode_messages(messages))
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except UNAVAILABLE:
            replies = None
            self._next_send = time.monotonic() + self._timings.retry_s
        for stream, (start, end) in zip(streams, itertools.pairwise(ends), strict=True):
            stream.apply_redis_replies(None if replies is None else replies[start:end])
            if stream.has_pending:
                self._pending[stream] = None


class AttemptStream:
    """What one attempt publishes; opened by a StreamPublisher. `wake` is called when there is something to send.

    With `resume_from`, the first tokens that it is given must repeat those; otherwise the reply restarts.
    """

    def __init__(
        self,
        record: str,
        job_id: int,
        attempt: int,
        wake: Callable[[AttemptStream], None],
        resume_from: ResumePoint | None = None,
        timings: Timings = TIMINGS,
    ) -> None:
        self._record = record
        self._key = wire.stream_key(record, job_id)
        self._job_id = job_id
        self._attempt = attempt
        self._first_attempt = attempt
        self._resume_from = resume_from
        self._wake = wake
        self._timings = timings
        self._chunks: list[TextChunk] = []
        """All text since the last restart, for a stream that Redis lost."""
        self._new_chunks: list[TextChunk] = []
        """Those without a number."""
        self._unconfirmed: list[Entry] = []
        """Numbered and encoded; Redis has not acknowledged them."""
        self._tokens: list[int] = []
        """Tokens whose text has not come yet."""
        self._progress: Progress | None = None
        self._n = 0
        self._offset = 0
        self._exists = False
        """Redis holds the stream, as far as is known. A stream that has vanished must not be created in its middle."""
        self._n_lost = 0
        """Entries that Redis held and holds no more."""
        self._may_be_taken = False
        """It is unknown which of the unconfirmed entries Redis took."""
        self._superseded = False
        """A later attempt publishes, or may do so from now on: this one publishes no more text."""
        self._ttl_refreshed_at = self._checked_at = 0.0
        self._is_ending = False
        self._flushed: asyncio.Future[None] | None = None
        """`_flush` waits for it."""
        self._flush_is_added = False
        """What `_flush` waits for is in the pipeline. A pipeline that was on its way when `_flush` came lacks it."""
        if resume_from is not None:
            self._first_attempt, self._n, self._exists = resume_from.first_attempt, resume_from.n, True
            self._n_lost = resume_from.n - resume_from.n_entries
            self._chunks = [chunk.copy() for chunk in resume_from.chunks]
            self._offset = len(resume_from.text)
        elif attempt > 1:
            self._restart()

    def append(self, pieces: Sequence[tuple[TextKind, str]], tokens: Sequence[int] = ()) -> bool:
        """Publishes what one step of the engine made certain. The text of its tokens may come a little later.

        False: the tokens of `resume_from` were repeated but their text differs, so they are of another model. Only a
        restart was published then, and the reply must restart.
        """
        if self._resume_from is not None and tokens:
            resumed, self._resume_from = self._resume_from, None
            resumed_tokens = resumed.tokens
            rest = text_beyond(resumed.chunks, pieces)
            if list(tokens[: len(resumed_tokens)]) != resumed_tokens:
                self._restart()
            elif rest is None:
                self._restart()
                return False
            else:
                pieces, tokens = rest, tokens[len(resumed_tokens) :]
        self._tokens += tokens
        for kind, text in pieces:
            self._append_piece(kind, text)
        return True

    def _append_piece(self, kind: TextKind, text: str) -> None:
        append_text(self._chunks, kind, text, self._tokens)
        append_text(self._new_chunks, kind, text, self._tokens)
        self._tokens = []
        self._wake(self)

    def _restart(self) -> None:
        self._chunks.clear()
        append_text(self._new_chunks, "restart", "", [])
        self._wake(self)

    def publish_progress(self, progress: Progress) -> None:
        self._progress = progress
        self._wake(self)

    async def publish_rest(self, timeout_s: float) -> None:
        """Publishes the rest of the text, and none after this returns: what Redis does not take now is dropped. Tries
        once and waits at most `timeout_s` seconds. For an attempt that another one may follow."""
        if self._tokens or self._new_chunks or self._unconfirmed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._flush()
        self._superseded = True
        self._new_chunks, self._unconfirmed, self._progress = [], [], None

    async def publish_end(self) -> None:
        """Publishes the rest, and that the attempt is over. Tries once and returns within some hundred milliseconds."""
        self._is_ending = True
        await self._flush()

    async def _flush(self) -> None:
        """Waits until all that there is was sent once, whether or not Redis took it."""
        if self._tokens:
            append_text(self._new_chunks, "delta", "", self._tokens)
            self._tokens = []
        self._flushed, self._flush_is_added = asyncio.get_running_loop().create_future(), False
        self._wake(self)
        try:
            await self._flushed
        finally:
            self._flushed = None

    @property
    def is_flushing(self) -> bool:
        """`publish_rest` or `publish_end` waits."""
        return self._flushed is not None

    @property
    def has_pending(self) -> bool:
        return bool(self._new_chunks or self._unconfirmed or self._progress) and not self.is_flushing

    def add_to(self, pipeline: Any) -> list[StreamMessage]:
        """Adds the commands that keep the entries to a pipeline; returns what is to be published beside them."""
        now = time.monotonic()
        if not self._unconfirmed:
            self._encode_new_chunks()
        entries = []
        if self._progress is not None:
            progress.put(pipeline, self._record, self._job_id, self._attempt, self._progress)
            data = msgspec.json.encode(wire.progress_event(self._progress, self._job_id, self._attempt))
            entries.append(Entry(self._attempt, 0, "progress", data, self._first_attempt))
            self._progress = None
        if self._is_ending:
            progress.delete(pipeline, self._record, self._job_id, self._attempt)
        if self._unconfirmed and not self._superseded:
            for entry in self._unconfirmed:
                self._add_entry(pipeline, entry, must_exist=self._exists or entry is not self._unconfirmed[0])
            entries += self._unconfirmed
            if not self._exists or self.is_flushing or now - self._ttl_refreshed_at > self._timings.ttl_refresh_s:
                self._ttl_refreshed_at = now
                pipeline.expire(self._key, self._timings.stream_ttl_s)
        if self._exists and (self.is_flushing or now - self._checked_at > self._timings.check_s):
            self._checked_at = now
            pipeline.xlen(self._key)
        self._flush_is_added = self.is_flushing
        if self._is_ending:
            entries.append(Entry(self._attempt, 0, "ended", b"", self._first_attempt))
        return [StreamMessage(self._job_id, entry) for entry in entries]

    def apply_redis_replies(self, replies: list[Any] | None) -> None:
        """Learns from the replies to all that was added what Redis holds. None: it is unknown what Redis did."""
        if replies is None:
            self._may_be_taken = True
        else:
            self._learn(replies)
        if self._flushed is not None and self._flush_is_added and not self._flushed.done():
            self._flushed.set_result(None)

    def _learn(self, replies: list[Any]) -> None:
        is_refused = any(isinstance(reply, ResponseError) and "equal or smaller" in str(reply) for reply in replies)
        # An entry that was sent before may be refused because Redis has it.
        self._superseded |= is_refused and not self._may_be_taken
        has_vanished = any(reply is None for reply in replies)
        self._exists = (self._exists or bool(self._unconfirmed)) and not has_vanished
        self._unconfirmed, self._may_be_taken = [], False
        # Only XLEN is answered by a count (EXPIRE by a bool), and it comes last.
        n_held = replies[-1] if replies and self._exists and type(replies[-1]) is int else None
        n_lost = self._n if has_vanished else self._n - n_held if n_held is not None else self._n_lost
        if n_lost > self._n_lost and not self._superseded:
            self._new_chunks = [TextChunk("restart", [], []), *(chunk.copy() for chunk in self._chunks)]
        self._n_lost = max(n_lost, self._n_lost)

    def _encode_new_chunks(self) -> None:
        for chunk in self._new_chunks:
            self._n += 1
            kind, text = chunk.piece
            event: Delta | Thinking | Restart
            if kind == "delta":
                event = Delta(job_id=self._job_id, text=text, offset=self._offset, tokens=chunk.tokens)
                self._offset += len(text)
            elif kind == "thinking":
                event = Thinking(job_id=self._job_id, text=text, tokens=chunk.tokens)
            else:
                event = Restart(job_id=self._job_id, attempt=self._attempt)
                self._offset = 0
            data = msgspec.json.encode(event)
            self._unconfirmed.append(Entry(self._attempt, self._n, kind, data, self._first_attempt))
        self._new_chunks = []

    def _add_entry(self, pipeline: Any, entry: Entry, *, must_exist: bool) -> None:
        pipeline.xadd(
            self._key,
            wire.entry_fields(entry),
            id=wire.entry_id(entry),
            nomkstream=must_exist,
            # Entries from before this text are of no use to anybody.
            minid=f"{entry.first_attempt}-0",
            approximate=False,
        )
