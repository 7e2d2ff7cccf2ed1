"""What a running job tells of itself by Redis: its text as a stream that is kept for a while, its progress.

Owns the names and shapes in Redis: a stream `llamalith:events:{record}:{job}` whose ids are `{attempt}-{n}`, n = 1, 2,
3 …, and a channel of the record's on which the entries of all jobs are told as well, those of one moment together. An
attempt that goes on where the one before it ended counts on from its n. The worker writes, the web reads; all of it
may be lost at any moment. Nothing here knows SQL, HTTP or engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from llamalith_app.contracts.events import Delta, ProgressEvent, Restart, Thinking
from llamalith_app.contracts.jobs import Progress
from llamalith_app.streams import progress

STREAM_TTL_S = 600
"""A stream outlives its last entry for so long; after that the record has the reply."""
TTL_REFRESH_S = 60
"""So often it is said anew that a stream is kept."""
CHECK_S = 1.0
"""So often Redis is asked whether it has all of a stream."""
COALESCE_S = 0.04
"""What is written within so long goes as one event a job, for all jobs together; the first after a pause, at once."""
BEFORE_S = 2.0
"""How long an attempt waits for what Redis has of those before it; its client has to wait for so long too."""
RETRY_S = 0.5
"""Between tries to tell while Redis is away."""
PAGE = 1000
"""Entries of one XRANGE."""
SILENCE_S = 15.0
"""After so long without a message the connection is asked whether it still is one."""
LONGEST_PAUSE_S = 2.0
"""Between tries to hear while Redis is away; the first comes after a tenth of it."""

UNAVAILABLE = (RedisError, OSError, TimeoutError)

log = structlog.get_logger(__name__)

Written = Literal["delta", "thinking", "restart"]


class Entry(NamedTuple):
    """One event of an attempt."""

    attempt: int
    n: int
    """0: only told, not kept."""
    kind: str
    """`delta`, `thinking`, `restart`, `progress`; or `ended`: the record has something new to say."""
    data: bytes
    """JSON."""
    since: int
    """The attempt that began the text which this goes on with; most often its own."""


class StreamMessage(NamedTuple):
    """What a message on the channel is made of."""

    job_id: int
    entry: Entry


_encode: Callable[[list[StreamMessage]], bytes] = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], list[StreamMessage]] = msgspec.msgpack.Decoder(list[StreamMessage]).decode


def channel(record: str) -> str:
    """Of all databases of one Redis: their numbers part no channels."""
    return f"llamalith:events:{record}"


def _name(record: str, job_id: int) -> str:
    return f"{channel(record)}:{job_id}"


async def tell_ended(redis: Redis, record: str, job_ids: Iterable[int]) -> None:
    """The end of these jobs is in the record: readers may look. Never raises for a Redis that is away."""
    with contextlib.suppress(*UNAVAILABLE):
        await redis.publish(
            channel(record), _encode([StreamMessage(job_id, Entry(0, 0, "ended", b"", 0)) for job_id in job_ids])
        )


class TextChunk(NamedTuple):
    """Text of one kind that is not an entry yet."""

    kind: Written
    texts: list[str]
    tokens: list[int]

    @property
    def piece(self) -> tuple[Written, str]:
        return self.kind, "".join(self.texts)


class ResumePoint(NamedTuple):
    """What Redis has of a reply that earlier attempts wrote."""

    since: int
    n: int
    """Of its last entry."""
    n_entries: int
    whole: list[TextChunk]

    @property
    def tokens(self) -> list[int]:
        return [token for joined in self.whole for token in joined.tokens]

    @property
    def text(self) -> str:
        return "".join(joined.piece[1] for joined in self.whole if joined.kind == "delta")


class StreamPublisher:
    """Tells what the attempts of one worker tell, all in one go. Nobody waits for it and it raises nothing; what Redis
    did not take is told later."""

    def __init__(self, redis: Redis, record: str) -> None:
        self._redis = redis
        self._record = record
        self._news: dict[Writer, None] = {}
        """Those that have something to tell, in their order."""
        self._next = 0.0
        self._hurry = asyncio.Event()
        """Something ends, and waits."""
        self._pump: asyncio.Task[None] | None = None

    def writer(self, job_id: int, attempt: int, before: ResumePoint | None = None) -> Writer:
        return Writer(self._record, job_id, attempt, self._wake, before)

    def _wake(self, writer: Writer) -> None:
        self._news[writer] = None
        if writer.is_over:
            self._hurry.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        while self._news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next - time.monotonic()):
                    await self._hurry.wait()
            self._hurry.clear()
            writers = list(self._news)
            self._news.clear()
            await self._send(writers)

    async def _send(self, writers: list[Writer]) -> None:
        self._next = time.monotonic() + COALESCE_S
        pipeline = self._redis.pipeline(transaction=False)
        told: list[StreamMessage] = []
        ends = [0]
        for writer in writers:
            told += writer.add(pipeline)
            ends.append(len(pipeline))
        pipeline.publish(channel(self._record), _encode(told))
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except UNAVAILABLE:
            answers = None
            self._next = time.monotonic() + RETRY_S
        for writer, (start, end) in zip(writers, itertools.pairwise(ends), strict=True):
            writer.take(None if answers is None else answers[start:end])
            if writer.has_news:
                self._news[writer] = None


class Writer:
    """What one attempt tells; made by a Teller. `wake` hears when there is something to tell.

    With `before`, the first tokens that it is given are those again, or the reply begins anew.
    """

    def __init__(
        self,
        record: str,
        job_id: int,
        attempt: int,
        wake: Callable[[Writer], None],
        before: ResumePoint | None = None,
    ) -> None:
        self._record = record
        self._name = _name(record, job_id)
        self._job_id = job_id
        self._attempt = attempt
        self._since = attempt
        self._before = before
        self._wake = wake
        self._whole: list[TextChunk] = []
        """All since the last restart, for a stream that was lost."""
        self._joined: list[TextChunk] = []
        self._untold: list[Entry] = []
        self._tokens: list[int] = []
        """Of which there is no text yet."""
        self._progress: Progress | None = None
        self._n = 0
        self._offset = 0
        self._is_begun = False
        """There is a stream, as far as is known; one that has vanished is not begun anew in its middle."""
        self._n_lost = 0
        """Entries that Redis had and has no more."""
        self._unsure = False
        """It is unknown which of the untold entries Redis took."""
        self._superseded = False
        """A later attempt writes."""
        self._extended_at = self._checked_at = 0.0
        self._told: asyncio.Future[None] | None = None
        """Waited for by `close`."""
        self._says_ended = False
        """The end is part of what was added; what was on its way when `close` came lacks it."""
        if before is not None:
            self._since, self._n, self._is_begun = before.since, before.n, True
            self._n_lost = before.n - before.n_entries
            self._whole = [_copy(joined) for joined in before.whole]
            self._offset = sum(len(text) for kind, text in (joined.piece for joined in before.whole) if kind == "delta")
        elif attempt > 1:
            self._begin_again()

    def write(self, pieces: Sequence[tuple[Written, str]], tokens: Sequence[int] = ()) -> bool:
        """What one step of the engine made certain, and its tokens, whose text may come a little later.

        False: the tokens of `before` are given again, but their text is another one now: they are of another model.
        Only a restart was told then, and the reply has to begin anew.
        """
        if self._before is not None and tokens:
            before, self._before = self._before, None
            n_before = len(before.tokens)
            rest = _behind(before.whole, pieces)
            if list(tokens[:n_before]) != before.tokens:
                self._begin_again()
            elif rest is None:
                self._begin_again()
                return False
            else:
                pieces, tokens = rest, tokens[n_before:]
        self._tokens += tokens
        for kind, text in pieces:
            self._write(kind, text)
        return True

    def _write(self, kind: Written, text: str) -> None:
        _join(self._whole, kind, text, self._tokens)
        _join(self._joined, kind, text, self._tokens)
        self._tokens = []
        self._wake(self)

    def _begin_again(self) -> None:
        self._whole.clear()
        _join(self._joined, "restart", "", [])
        self._wake(self)

    def progress(self, progress: Progress) -> None:
        self._progress = progress
        self._wake(self)

    async def close(self) -> None:
        """Tells the rest, and that the attempt is over; tried once, within some hundred milliseconds."""
        if self._tokens:
            _join(self._joined, "delta", "", self._tokens)
        self._told = asyncio.get_running_loop().create_future()
        self._wake(self)
        await self._told

    @property
    def is_over(self) -> bool:
        """`close` waits."""
        return self._told is not None

    @property
    def has_news(self) -> bool:
        return bool(self._joined or self._untold or self._progress) and not self.is_over

    def add(self, pipeline: Any) -> list[StreamMessage]:
        """Adds what Redis is to keep to a pipeline; returns what is to be told at once."""
        now = time.monotonic()
        if not self._untold:
            self._number()
        told = []
        if self._progress is not None:
            progress.put(pipeline, self._record, self._job_id, self._attempt, self._progress)
            data = msgspec.json.encode(as_event(self._progress, self._job_id, self._attempt))
            told.append(Entry(self._attempt, 0, "progress", data, self._since))
            self._progress = None
        if self.is_over:
            progress.forget(pipeline, self._record, self._job_id, self._attempt)
        if self._untold and not self._superseded:
            for entry in self._untold:
                self._add_entry(pipeline, entry, must_exist=self._is_begun or entry is not self._untold[0])
            told += self._untold
            if not self._is_begun or self.is_over or now - self._extended_at > TTL_REFRESH_S:
                self._extended_at = now
                pipeline.expire(self._name, STREAM_TTL_S)
        if self._is_begun and (self.is_over or now - self._checked_at > CHECK_S):
            self._checked_at = now
            pipeline.xlen(self._name)
        if self.is_over:
            self._says_ended = True
            told.append(Entry(self._attempt, 0, "ended", b"", self._since))
        return [StreamMessage(self._job_id, entry) for entry in told]

    def take(self, answers: list[Any] | None) -> None:
        """What Redis answered to all that was added; None: it is unknown what it did."""
        if answers is None:
            self._unsure = True
        else:
            self._judge(answers)
        if self._told is not None and self._says_ended:
            self._told.set_result(None)

    def _judge(self, answers: list[Any]) -> None:
        """What Redis took of the entries, and whether it still has those before."""
        refused = any(isinstance(answer, ResponseError) and "equal or smaller" in str(answer) for answer in answers)
        # An entry that was tried before may be refused because it is there.
        self._superseded |= refused and not self._unsure
        vanished = any(answer is None for answer in answers)
        self._is_begun = (self._is_begun or bool(self._untold)) and not vanished
        self._untold, self._unsure = [], False
        # Only the check answers with a count that is no truth value of EXPIRE, and it comes last.
        n_there = answers[-1] if answers and self._is_begun and type(answers[-1]) is int else None
        n_lost = self._n if vanished else self._n - n_there if n_there is not None else self._n_lost
        if n_lost > self._n_lost and not self._superseded:
            self._joined = [TextChunk("restart", [], []), *(_copy(joined) for joined in self._whole)]
        self._n_lost = max(n_lost, self._n_lost)

    def _number(self) -> None:
        for joined in self._joined:
            self._n += 1
            kind, text = joined.piece
            event: Delta | Thinking | Restart
            if kind == "delta":
                event = Delta(job_id=self._job_id, text=text, offset=self._offset, tokens=joined.tokens)
                self._offset += len(text)
            elif kind == "thinking":
                event = Thinking(job_id=self._job_id, text=text, tokens=joined.tokens)
            else:
                event = Restart(job_id=self._job_id, attempt=self._attempt)
                self._offset = 0
            data = msgspec.json.encode(event)
            self._untold.append(Entry(self._attempt, self._n, kind, data, self._since))
        self._joined = []

    def _add_entry(self, pipeline: Any, entry: Entry, *, must_exist: bool) -> None:
        fields: dict[str, Any] = {entry.kind: entry.data}
        if entry.since != entry.attempt:
            fields["since"] = entry.since
        pipeline.xadd(
            self._name,
            fields,
            id=f"{entry.attempt}-{entry.n}",
            nomkstream=must_exist,
            # What was written before is nobody's any more.
            minid=f"{entry.since}-0",
            approximate=False,
        )


def as_event(progress: Progress, job_id: int, attempt: int) -> ProgressEvent:
    return ProgressEvent(**msgspec.structs.asdict(progress), job_id=job_id, attempt=attempt)


def _join(into: list[TextChunk], kind: Written, text: str, tokens: list[int]) -> None:
    if into and into[-1].kind == kind != "restart":
        into[-1].texts.append(text)
        into[-1].tokens.extend(tokens)
    else:
        into.append(TextChunk(kind, [text], list(tokens)))


def _copy(joined: TextChunk) -> TextChunk:
    return TextChunk(joined.kind, list(joined.texts), list(joined.tokens))


def _runs(pieces: Iterable[tuple[Written, str]]) -> list[tuple[Written, str]]:
    """Texts of one kind in a row as one."""
    runs: list[TextChunk] = []
    for kind, text in pieces:
        if text:
            _join(runs, kind, text, [])
    return [run.piece for run in runs]


def _behind(told: list[TextChunk], pieces: Sequence[tuple[Written, str]]) -> list[tuple[Written, str]] | None:
    """What the pieces have more than was told; None: they differ from it."""
    before, again = _runs(run.piece for run in told), _runs(pieces)
    if not before:
        return again
    *whole, (kind, text) = before
    n_whole = len(whole)
    if again[:n_whole] != whole or len(again) <= n_whole:
        return None
    kind_again, text_again = again[n_whole]
    if kind_again != kind or not text_again.startswith(text):
        return None
    rest = text_again[len(text) :]
    return [*([(kind, rest)] if rest else []), *again[n_whole + 1 :]]


async def before(redis: Any, record: str, job_id: int, attempt: int) -> ResumePoint | None:
    """What Redis has whole of the reply that earlier attempts wrote, and those can write no more from now on. None:
    nothing, or nothing that can be understood, or Redis did not say in time."""
    try:
        async with asyncio.timeout(BEFORE_S):
            await redis.execute_command("XSETID", _name(record, job_id), f"{attempt}-0")
            return _whole(await history(redis, record, job_id))
    except UNAVAILABLE:
        return None
    except (ValueError, msgspec.MsgspecError) as error:
        log.warning("told in a form that is not known; is every process of one version?", reason=str(error))
        return None


def _whole(entries: list[Entry]) -> ResumePoint | None:
    """What a stream comes to; None: something of it is missing."""
    entries = [entry for entry in entries if entry.since == entries[-1].since]
    begins = max((at for at, entry in enumerate(entries) if entry.n == 1 or entry.kind == "restart"), default=None)
    if begins is None:
        return None
    last = entries[begins:]
    if [entry.n for entry in last] != list(range(last[0].n, last[-1].n + 1)):
        return None
    whole: list[TextChunk] = []
    for entry in last:
        if entry.kind != "restart":
            told = msgspec.json.decode(entry.data, type=_TextMessage)
            _join(whole, cast(Written, entry.kind), told.text, told.tokens)
    return ResumePoint(last[0].since, last[-1].n, len(entries), whole)


class _TextMessage(msgspec.Struct):
    """What a delta and thinking have in common."""

    text: str
    tokens: list[int]


async def history(redis: Redis, record: str, job_id: int, after: tuple[int, int] = (0, 0)) -> list[Entry]:
    """What the stream holds after that entry. Raises one of UNAVAILABLE."""
    found: list[Entry] = []
    while True:
        page: Any = await redis.xrange(_name(record, job_id), min=f"({after[0]}-{after[1]}", count=PAGE)
        for event_id, fields in page:
            attempt, _, n = event_id.partition(b"-")
            since = fields.pop(b"since", attempt)
            ((kind, data),) = fields.items()
            found.append(Entry(int(attempt), int(n), kind.decode(), data, int(since)))
        if len(page) < PAGE:
            return found
        after = found[-1][:2]


class StreamSubscriber:
    """Hears of the jobs that somebody follows, over one connection. Comes back by itself when Redis does.

    `hear` gets what is told, and may raise MsgspecError for what it cannot read; `ready` gets the job whose every later
    entry will be heard: what came before is history. Both are called in the event loop and must not wait.
    """

    def __init__(
        self, redis: Redis, record: str, hear: Callable[[int, Entry], None], ready: Callable[[int], None]
    ) -> None:
        self._redis = redis
        self._record = record
        self._hear = hear
        self._ready = ready
        self._wanted: set[int] = set()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    def follow(self, job_id: int) -> None:
        self._wanted.add(job_id)
        if self.connected:
            self._ready(job_id)
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen_for_ever())

    def leave(self, job_id: int) -> None:
        self._wanted.discard(job_id)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _listen_for_ever(self) -> None:
        pause = 0.0
        while True:
            started = time.monotonic()
            try:
                await self._listen()
            except UNAVAILABLE as error:
                self.connected = False
                if pause == 0.0:
                    log.warning("streams are not heard: redis is away", reason=str(error))
            pause = 0.0 if time.monotonic() - started > SILENCE_S else pause
            pause = min(max(2 * pause, LONGEST_PAUSE_S / 10), LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _listen(self) -> None:
        """Until the connection is lost; then one of UNAVAILABLE."""
        pubsub: Any = self._redis.pubsub()
        asked = False
        try:
            await pubsub.subscribe(channel(self._record))
            while True:
                message = await pubsub.get_message(timeout=SILENCE_S)
                if message is None:
                    if asked:
                        raise TimeoutError("Redis is silent")
                    await pubsub.ping()
                asked = message is None
                if message is not None:
                    self._take(message)
        finally:
            self.connected = False
            with contextlib.suppress(*UNAVAILABLE):
                await pubsub.aclose()

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self.connected = True
            for job_id in self._wanted:
                self._ready(job_id)
        elif message["type"] == "message" and self._wanted:
            try:
                for job_id, entry in _decode(message["data"]):
                    if job_id in self._wanted:
                        self._hear(job_id, entry)
            except msgspec.MsgspecError as error:
                log.warning("told in a form that is not known; is every process of one version?", reason=str(error))
