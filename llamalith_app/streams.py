"""What a running job tells of itself by Redis: its text as a stream that is kept for a while, its progress.

Owns the names and shapes in Redis: a stream `llamalith:events:{job}` whose ids are `{attempt}-{n}`, n = 1, 2, 3 …, and
a channel of the same name on which every entry is told as well. The worker writes, the web reads; all of it may be
lost at any moment. Nothing here knows SQL, HTTP or engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from llamalith_app import progress
from llamalith_app.contracts.events import Delta, ProgressEvent, Restart, Thinking
from llamalith_app.contracts.jobs import Progress

KEEP_S = 600
"""A stream outlives its last entry for so long; after that the record has the reply."""
JOIN_S = 0.04
"""What is written within so long goes as one event; the first goes at once."""
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


def _name(job_id: int) -> str:
    return f"llamalith:events:{job_id}"


def _message(entry: Entry) -> bytes:
    return b"%d-%d %s %s" % (entry.attempt, entry.n, entry.kind.encode(), entry.data)


def _entry(event_id: bytes, kind: bytes, data: bytes) -> Entry:
    attempt, _, n = event_id.partition(b"-")
    return Entry(int(attempt), int(n), kind.decode(), data)


async def tell_ended(redis: Redis, job_ids: Iterable[int]) -> None:
    """The end of these jobs is in the record: readers may look. Never raises for a Redis that is away."""
    pipeline = redis.pipeline(transaction=False)
    for job_id in job_ids:
        pipeline.publish(_name(job_id), _message(Entry(0, 0, "ended", b"")))
    with contextlib.suppress(*UNAVAILABLE):
        await pipeline.execute()


class _Joined(NamedTuple):
    """Text of one kind that is not an entry yet."""

    kind: Written
    texts: list[str]
    tokens: list[int]


class Writer:
    """What one attempt tells. Nobody waits for it and it raises nothing; what Redis did not take is told later."""

    def __init__(self, redis: Redis, job_id: int, attempt: int) -> None:
        self._redis = redis
        self._job_id = job_id
        self._attempt = attempt
        self._whole: list[_Joined] = []
        """All since the last restart, for a stream that was lost."""
        self._joined: list[_Joined] = []
        self._untold: list[Entry] = []
        self._tokens: list[int] = []
        """Of which there is no text yet."""
        self._progress: Progress | None = None
        self._n = 0
        self._offset = 0
        self._n_lost = 0
        """Entries that Redis had and has no more."""
        self._unsure = False
        """It is unknown which of the untold entries Redis took."""
        self._superseded = False
        """A later attempt writes."""
        self._next = 0.0
        self._closing = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        if attempt > 1:
            self.write("restart")

    def write(self, kind: Written, text: str = "") -> None:
        """Takes the tokens that were given before along."""
        if kind == "restart":
            self._whole.clear()
        else:
            _join(self._whole, kind, text, self._tokens)
        _join(self._joined, kind, text, self._tokens if kind != "restart" else [])
        if kind != "restart":
            self._tokens = []
        self._wake()

    def tokens(self, tokens: Iterable[int]) -> None:
        self._tokens += tokens

    def progress(self, progress: Progress) -> None:
        self._progress = progress
        self._wake()

    async def close(self) -> None:
        """Tells the rest, and that the attempt is over; tried once, within some hundred milliseconds."""
        self._closing.set()
        if self._pump is not None:
            await self._pump
        if self._tokens:
            _join(self._joined, "delta", "", self._tokens)
        await self._send(Entry(self._attempt, 0, "ended", b""))

    def _wake(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        while (self._joined or self._untold or self._progress is not None) and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next - time.monotonic()):
                    await self._closing.wait()
            if not self._closing.is_set():
                await self._send()

    async def _send(self, last: Entry | None = None) -> None:
        self._next = time.monotonic() + JOIN_S
        if not self._untold:
            self._number()
        pipeline = self._redis.pipeline(transaction=False)
        if self._progress is not None:
            self._add_progress(pipeline, self._progress)
            self._progress = None
        if not self._superseded:
            for entry in self._untold:
                self._add(pipeline, entry)
        if last is not None:
            pipeline.publish(_name(self._job_id), _message(last))
        pipeline.xlen(_name(self._job_id))
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except UNAVAILABLE:
            self._unsure = True
            self._next = time.monotonic() + RETRY_S
            return
        self._judge(answers)

    def _judge(self, answers: list[Any]) -> None:
        """What Redis took of the entries, and whether it still has those before."""
        refused = any(isinstance(answer, ResponseError) and "equal or smaller" in str(answer) for answer in answers)
        # An entry that was tried before may be refused because it is there.
        self._superseded |= refused and not self._unsure
        self._untold, self._unsure = [], False
        n_lost = self._n - answers[-1] if isinstance(answers[-1], int) else self._n_lost
        if n_lost > self._n_lost and not self._superseded:
            self._joined = [_Joined("restart", [], []), *(_copy(joined) for joined in self._whole)]
        self._n_lost = max(n_lost, self._n_lost)

    def _number(self) -> None:
        for joined in self._joined:
            self._n += 1
            text = "".join(joined.texts)
            event: Delta | Thinking | Restart
            if joined.kind == "delta":
                event = Delta(job_id=self._job_id, text=text, offset=self._offset, tokens=joined.tokens)
                self._offset += len(text)
            elif joined.kind == "thinking":
                event = Thinking(job_id=self._job_id, text=text, tokens=joined.tokens)
            else:
                event = Restart(job_id=self._job_id, attempt=self._attempt)
                self._offset = 0
            self._untold.append(Entry(self._attempt, self._n, joined.kind, msgspec.json.encode(event)))
        self._joined = []

    def _add(self, pipeline: Any, entry: Entry) -> None:
        name = _name(self._job_id)
        pipeline.xadd(
            name,
            {entry.kind: entry.data},
            id=f"{entry.attempt}-{entry.n}",
            # What earlier attempts wrote is nobody's any more.
            minid=f"{entry.attempt}-0",
            approximate=False,
        )
        pipeline.expire(name, KEEP_S)
        pipeline.publish(name, _message(entry))

    def _add_progress(self, pipeline: Any, told: Progress) -> None:
        progress.put(pipeline, self._job_id, self._attempt, told)
        data = msgspec.json.encode(as_event(told, self._job_id, self._attempt))
        pipeline.publish(_name(self._job_id), _message(Entry(self._attempt, 0, "progress", data)))


def as_event(progress: Progress, job_id: int, attempt: int) -> ProgressEvent:
    return ProgressEvent(**msgspec.structs.asdict(progress), job_id=job_id, attempt=attempt)


def _join(into: list[_Joined], kind: Written, text: str, tokens: list[int]) -> None:
    if into and into[-1].kind == kind != "restart":
        into[-1].texts.append(text)
        into[-1].tokens.extend(tokens)
    else:
        into.append(_Joined(kind, [text], list(tokens)))


def _copy(joined: _Joined) -> _Joined:
    return _Joined(joined.kind, list(joined.texts), list(joined.tokens))


async def history(redis: Redis, job_id: int, after: tuple[int, int] = (0, 0)) -> list[Entry]:
    """What the stream holds after that entry. Raises one of UNAVAILABLE."""
    found: list[Entry] = []
    while True:
        page: Any = await redis.xrange(_name(job_id), min=f"({after[0]}-{after[1]}", count=PAGE)
        for event_id, fields in page:
            ((kind, data),) = fields.items()
            found.append(_entry(event_id, kind, data))
        if len(page) < PAGE:
            return found
        after = found[-1][:2]


class Hearing:
    """Hears of all jobs that somebody follows, over one connection. Comes back by itself when Redis does.

    `hear` gets what is told, `ready` the job whose every later entry will be heard: what came before is history.
    Both are called in the event loop and must not wait.
    """

    def __init__(self, redis: Redis, hear: Callable[[int, Entry], None], ready: Callable[[int], None]) -> None:
        self._redis = redis
        self._hear = hear
        self._ready = ready
        self._wanted: set[int] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    def follow(self, job_id: int) -> None:
        self._wanted.add(job_id)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._listen_for_ever())

    def leave(self, job_id: int) -> None:
        self._wanted.discard(job_id)
        self._changed.set()

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
            except* UNAVAILABLE as errors:
                self.connected = False
                if pause == 0.0:
                    log.warning("streams are not heard: redis is away", reason=str(errors.exceptions[0]))
            pause = 0.0 if time.monotonic() - started > SILENCE_S else pause
            pause = min(max(2 * pause, LONGEST_PAUSE_S / 10), LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _listen(self) -> None:
        pubsub: Any = self._redis.pubsub()
        try:
            # There is always one channel, for nothing can be read before the first.
            await pubsub.subscribe(_name(0))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._subscribe(pubsub))
                tasks.create_task(self._read(pubsub))
        finally:
            with contextlib.suppress(*UNAVAILABLE):
                await pubsub.aclose()

    async def _subscribe(self, pubsub: Any) -> None:
        subscribed: set[int] = set()
        while True:
            self._changed.clear()
            if new := self._wanted - subscribed:
                await pubsub.subscribe(*map(_name, new))
            if old := subscribed - self._wanted:
                await pubsub.unsubscribe(*map(_name, old))
            subscribed = (subscribed | new) - old
            await self._changed.wait()

    async def _read(self, pubsub: Any) -> None:
        asked = False
        while True:
            message = await pubsub.get_message(timeout=SILENCE_S)
            if message is None:
                if asked:
                    raise TimeoutError("Redis is silent")
                await pubsub.ping()
                asked = True
                continue
            asked = False
            self.connected = True
            if message["type"] == "pong":
                continue
            job_id = int(message["channel"].rpartition(b":")[2])
            if message["type"] == "subscribe" and job_id in self._wanted:
                self._ready(job_id)
            elif message["type"] == "message" and job_id in self._wanted:
                event_id, kind, data = message["data"].split(b" ", 2)
                self._hear(job_id, _entry(event_id, kind, data))
