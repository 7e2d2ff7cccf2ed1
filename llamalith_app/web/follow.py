"""Follows the jobs that streams are open for: one transcript a job, whoever reads it.

Owns this process's one hearing of Redis and its one look a second into the record, which alone says that a job has
ended: so a lost word, or a Redis that is away, costs seconds and no event. What nobody reads any more is forgotten.
Knows no HTTP; readers are told by a `Line` that there is news.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

import msgspec
import structlog
from redis.asyncio import Redis

from llamalith_app.contracts.events import ProgressEvent
from llamalith_app.contracts.jobs import Job
from llamalith_app.errors import StorageUnavailable
from llamalith_app.store import conversations, job_reads
from llamalith_app.store.database import Database
from llamalith_app.streams import streams
from llamalith_app.streams.streams import Entry, StreamSubscriber
from llamalith_app.web.live import Live, may_grow
from llamalith_app.web.transcript import Transcript

log = structlog.get_logger(__name__)

LOOK_S = 1.0
HISTORY_S = 0.5
"""How long the first reader of a job waits for what Redis has of it."""
GROW_S = 5.0
"""How long the last event of a job that was cancelled waits for its worker to store what it had written."""
ENDED = ("done", "error", "cancelled")


class Line:
    """How one stream is woken, and ended before its time."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_over = False
        """Its client is gone, or this process ends."""

    def end(self) -> None:
        self.is_over = True
        self.news.set()

    async def wait(self, seconds: float) -> bool:
        """Until there is news; False: there was none."""
        try:
            async with asyncio.timeout(seconds):
                await self.news.wait()
        except TimeoutError:
            return False
        self.news.clear()
        return True


class Followed:
    """A job, or a conversation's next job, that lines wait for."""

    def __init__(self) -> None:
        self.lines: set[Line] = set()

    def wake(self) -> None:
        for line in self.lines:
            line.news.set()


class FollowedJob(Followed):
    def __init__(self, job: Job, owner_id: int) -> None:
        super().__init__()
        self.id = job.id
        self.model = job.model
        self.owner_id = owner_id
        self.transcript = Transcript(job.id)
        self.loaded = asyncio.Event()
        """What Redis had at the beginning is in the transcript, or Redis did not say."""
        self.is_behind = False
        """Redis has entries that are not in the transcript."""
        self.catching_up: asyncio.Task[None] | None = None
        self.seems_ended = False
        self.ended_at: float | None = None
        """When its end was first seen, on this process's own clock."""


class FollowedLane(Followed):
    def __init__(self, newest_job: int) -> None:
        super().__init__()
        self.newest_job = newest_job


class Followers:
    def __init__(self, database: Database, live: Live, redis: Redis, record: str) -> None:
        self._database = database
        self._live = live
        self._redis = redis
        self._record = record
        self._jobs: dict[int, FollowedJob] = {}
        self._lanes: dict[int, FollowedLane] = {}
        self._hearing = StreamSubscriber(redis, record, self._hear, self._catch_up)
        self._looking: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._ended_now: set[int] = set()
        """Of which Redis said that they ended."""
        self.lines: set[Line] = set()
        """Of every open stream."""
        self._telling: set[asyncio.Task[None]] = set()
        self._is_over = False

    def open(self) -> Line:
        line = Line()
        self.lines.add(line)
        if self._is_over:
            line.end()
        return line

    def end(self) -> None:
        """Tells every stream to end now; those that come later end at once."""
        self._is_over = True
        for line in self.lines:
            line.end()

    async def close(self) -> None:
        self.end()
        tasks = [self._looking, *(followed.catching_up for followed in self._jobs.values())]
        running = [*self._telling, *(task for task in tasks if task is not None)]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._hearing.close()

    async def follow(self, job: Job, owner_id: int, line: Line) -> FollowedJob:
        """The job with what is known of it. Every `follow` needs its `leave`, whatever happens."""
        followed = self._jobs.get(job.id)
        if followed is None:
            followed = self._jobs[job.id] = FollowedJob(job, owner_id)
            self._tell_progress(followed, job)
            self._hearing.follow(job.id)
            self._look_on()
        followed.lines.add(line)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HISTORY_S):
                await followed.loaded.wait()
        followed.loaded.set()
        if job.status in ENDED and not (may_grow(job) and _ended_just_now(job)):
            followed.transcript.finish(job)
            followed.wake()
        return followed

    def leave(self, job_id: int, line: Line) -> None:
        followed = self._jobs.get(job_id)
        if followed is None:
            return
        followed.lines.discard(line)
        if not followed.lines:
            del self._jobs[job_id]
            self._hearing.leave(job_id)

    def tell_ended(self, job_ids: Collection[int]) -> None:
        """Where this process ended them: its own readers look at once, those of others once Redis tells them."""
        self._ended_now.update(self._jobs.keys() & set(job_ids))
        if self._ended_now:
            self._look_now.set()
        telling = asyncio.create_task(streams.tell_ended(self._redis, self._record, job_ids))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def follow_lane(self, lane: conversations.Lane, line: Line) -> FollowedLane:
        followed = self._lanes.setdefault(lane.conversation_id, FollowedLane(lane.newest_job))
        followed.lines.add(line)
        self._look_on()
        return followed

    def leave_lane(self, conversation_id: int, line: Line) -> None:
        followed = self._lanes[conversation_id]
        followed.lines.discard(line)
        if not followed.lines:
            del self._lanes[conversation_id]

    def _hear(self, job_id: int, entry: Entry) -> None:
        followed = self._jobs.get(job_id)
        if followed is None:
            return
        if entry.kind == "ended":
            self._ended_now.add(job_id)
            self._look_now.set()
        elif entry.kind == "progress":
            if entry.attempt >= followed.transcript.last.attempt:
                told = msgspec.json.decode(entry.data, type=ProgressEvent)
                self._live.add_eta(told, followed.model)
                if followed.transcript.tell_progress(msgspec.json.encode(told)):
                    followed.wake()
        elif followed.transcript.take(entry):
            followed.wake()
        else:
            self._catch_up(job_id)

    def _catch_up(self, job_id: int) -> None:
        if (followed := self._jobs.get(job_id)) is not None:
            followed.is_behind = True
            if followed.catching_up is None or followed.catching_up.done():
                followed.catching_up = asyncio.create_task(self._read_history(followed))

    async def _read_history(self, followed: FollowedJob) -> None:
        while followed.is_behind:
            followed.is_behind = False
            try:
                for entry in await streams.history(self._redis, self._record, followed.id, followed.transcript.last):
                    if not followed.transcript.take(entry):
                        followed.transcript.give_up(entry.attempt)
            except streams.UNAVAILABLE:
                return  # the next word of this job, or the next connection, tries again
            except (ValueError, msgspec.MsgspecError) as error:
                log.warning("kept in a form that is not known; is every process of one version?", reason=str(error))
                return
            followed.loaded.set()
            followed.wake()

    def _look_on(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_while_followed())

    async def _look_while_followed(self) -> None:
        next_look = time.monotonic() + LOOK_S
        while self._jobs or self._lanes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_look - time.monotonic()):
                    await self._look_now.wait()
            self._look_now.clear()
            told, self._ended_now = self._ended_now, set()
            try:
                for job_id in told:
                    if (followed := self._jobs.get(job_id)) is not None:
                        await self._finish(followed)
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_S
                    await self._look_at_jobs()
                    await self._look_at_lanes()
            except StorageUnavailable as error:
                log.warning("followed jobs cannot be looked at now", reason=str(error))
            except Exception:
                log.exception("the look at followed jobs failed unexpectedly")

    async def _look_at_jobs(self) -> None:
        wanted = [job_id for job_id, followed in self._jobs.items() if not followed.transcript.ended]
        found = await self._database.read(job_reads.some, wanted, 1) if wanted else []
        await self._live.add(found)
        for job_id in set(wanted) - {job.id for job in found}:
            # Expired before its end was seen here: who comes again hears that it is gone.
            if (followed := self._jobs.get(job_id)) is not None:
                for line in followed.lines:
                    line.end()
        for job in found:
            followed = self._jobs.get(job.id)
            if followed is None:
                continue
            if job.status not in ENDED:
                self._tell_progress(followed, job)
            elif followed.seems_ended or not self._hearing.connected:
                await self._finish(followed)
            else:
                # Its last words are on their way, most likely.
                followed.seems_ended = True

    async def _finish(self, followed: FollowedJob) -> None:
        """If it has ended."""
        job = await self._database.read(job_reads.one, followed.owner_id, followed.id)
        if job is None or job.status not in ENDED:
            return
        followed.ended_at = followed.ended_at or time.monotonic()
        if may_grow(job) and time.monotonic() - followed.ended_at < GROW_S:
            followed.seems_ended = True
            return
        followed.transcript.finish(job)
        followed.wake()

    async def _look_at_lanes(self) -> None:
        newest = await self._database.read(conversations.newest_jobs, list(self._lanes)) if self._lanes else {}
        for conversation_id, job_id in newest.items():
            lane = self._lanes.get(conversation_id)
            if lane is not None and job_id > lane.newest_job:
                lane.newest_job = job_id
                lane.wake()

    def _tell_progress(self, followed: FollowedJob, job: Job) -> None:
        if job.progress is not None and (job.status == "queued" or not followed.transcript.n_progress):
            data = msgspec.json.encode(streams.as_event(job.progress, job.id, job.attempt))
            if followed.transcript.tell_progress(data):
                followed.wake()


def _ended_just_now(job: Job) -> bool:
    """Wall clocks may be wrong: then its readers wait for GROW_S, or a part of the reply is not told."""
    return job.processed_at is not None and datetime.now(UTC) - job.processed_at < timedelta(seconds=GROW_S)
