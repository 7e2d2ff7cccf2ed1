"""Follows the jobs that streams are open for: one transcript a job, whoever reads it.

Owns this process's one subscription to Redis and its one poll a second of the record. The record alone says that a job
has ended, so a lost message, or a Redis that is away, costs seconds and no event. A job that nobody reads any more is
forgotten. Knows no HTTP and no format of a reader; an `OpenStream` wakes each reader when there is news.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection
from datetime import UTC, datetime, timedelta

import msgspec
import structlog
from redis.asyncio import Redis

from llamalith_app.contracts.events import ProgressEvent
from llamalith_app.contracts.jobs import Job
from llamalith_app.errors import StorageUnavailable
from llamalith_app.store import conversation_list, conversations
from llamalith_app.store.conversation_list import Sidebar
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads
from llamalith_app.streams import publisher, wire
from llamalith_app.streams.subscriber import StreamSubscriber, history
from llamalith_app.streams.wire import UNAVAILABLE, Entry
from llamalith_app.web.live import Live, may_grow
from llamalith_app.web.transcript import FINAL, Cursor, JobEvent, Transcript

log = structlog.get_logger(__name__)

ENDED = ("done", "error", "cancelled")


class Timings(msgspec.Struct, frozen=True):
    """All in seconds."""

    poll_s: float = 1.0
    """How often the record is read for the jobs and conversations that are followed."""
    chats_s: float = 2.0
    """How often it is read for the lists of chats that are followed."""
    history_s: float = 0.5
    """How long the first reader of a job waits for what Redis holds of it."""
    last_entries_s: float = 0.5
    """How long what an attempt wrote last may be on its way when the record has the end of its job."""
    partial_s: float = 5.0
    """How long the final event of a job that was cancelled waits for its worker to store what it had written."""
    heartbeat_s: float = 15.0
    """After so long without an event a reader gets a heartbeat."""


TIMINGS = Timings()


class OpenStream:
    """How one open stream is woken, and ended before its time."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_over = False
        """Its client is gone, or this process ends."""
        self.client_left = False
        """The client is gone. No answer reaches it."""

    def end(self) -> None:
        self.is_over = True
        self.news.set()

    async def wait(self, seconds: float) -> bool:
        """Waits for news. False: none came in time."""
        try:
            async with asyncio.timeout(seconds):
                await self.news.wait()
        except TimeoutError:
            return False
        self.news.clear()
        return True


class Followed:
    """A job, or a conversation's next job, that open streams wait for."""

    def __init__(self) -> None:
        self.streams: set[OpenStream] = set()

    def wake(self) -> None:
        for stream in self.streams:
            stream.news.set()


class FollowedJob(Followed):
    def __init__(self, job: Job, owner_id: int) -> None:
        super().__init__()
        self.id = job.id
        self.model = job.model
        self.owner_id = owner_id
        self.transcript = Transcript(job.id)
        self.loaded = asyncio.Event()
        """What Redis held at the beginning is in the transcript, or Redis gave no answer."""
        self.is_behind = False
        """Redis has entries that are not in the transcript."""
        self.catching_up: asyncio.Task[None] | None = None
        self.ended_at: float | None = None
        """When its end was first seen, on this process's own clock."""

    @property
    def is_catching_up(self) -> bool:
        """Its history is being read."""
        return self.catching_up is not None and not self.catching_up.done()


class FollowedLane(Followed):
    def __init__(self, newest_job: int) -> None:
        super().__init__()
        self.newest_job = newest_job


class FollowedChats(Followed):
    """The chats of one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: Sidebar | None = None
        """None: not read yet."""
        self.read_at = datetime.now(UTC)
        """When `newest` was read first as it is."""


class Followers:
    def __init__(self, database: Database, live: Live, redis: Redis, record: str, timings: Timings = TIMINGS) -> None:
        self._database = database
        self._live = live
        self._redis = redis
        self._record = record
        self.timings = timings
        self._jobs: dict[int, FollowedJob] = {}
        self._lanes: dict[int, FollowedLane] = {}
        self._chats: dict[int, FollowedChats] = {}
        """By owner."""
        self._subscriber = StreamSubscriber(redis, record, self._on_entry, self._catch_up)
        self._polling: asyncio.Task[None] | None = None
        self._poll_now = asyncio.Event()
        self._ended_now: set[int] = set()
        """The jobs whose end a message has announced."""
        self._just_followed: set[int] = set()
        """The jobs whose end may have been announced before this process listened for it."""
        self._streams: set[OpenStream] = set()
        """All that are open."""
        self._publishing: set[asyncio.Task[None]] = set()
        self._is_over = False

    def open(self) -> OpenStream:
        """Every `open` needs its `forget`."""
        stream = OpenStream()
        self._streams.add(stream)
        if self._is_over:
            stream.end()
        return stream

    def forget(self, stream: OpenStream) -> None:
        self._streams.discard(stream)

    def end(self) -> None:
        """Ends every open stream, and each one that is opened later."""
        self._is_over = True
        for stream in self._streams:
            stream.end()

    async def close(self) -> None:
        self.end()
        tasks = [self._polling, *(followed.catching_up for followed in self._jobs.values())]
        running = [*self._publishing, *(task for task in tasks if task is not None)]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._subscriber.close()

    async def events(
        self, job: Job, owner_id: int, cursor: Cursor | None, stream: OpenStream
    ) -> AsyncGenerator[list[JobEvent], None]:
        """Batches of the events behind `cursor`, up to the job's last event or the stream's end. An empty batch: there
        was none for `heartbeat_s`."""
        n_progress = 0
        try:
            transcript = (await self._follow(job, owner_id, stream)).transcript
            while not stream.is_over:
                batch, cursor = transcript.events_after(cursor)
                progress, n_progress = transcript.progress_after(n_progress), transcript.n_progress
                if progress is not None:
                    yield [progress, *batch]
                elif batch:
                    yield batch
                if cursor is not None and cursor.n == FINAL:
                    return
                if not batch and not await stream.wait(self.timings.heartbeat_s):
                    yield []
        finally:
            self._unfollow(job.id, stream)

    async def _follow(self, job: Job, owner_id: int, stream: OpenStream) -> FollowedJob:
        """The job with what is known of it. Every `_follow` needs its `_unfollow`, whatever happens."""
        followed = self._jobs.get(job.id)
        if followed is None:
            followed = self._jobs[job.id] = FollowedJob(job, owner_id)
            self._set_progress(followed, job)
            self._subscriber.follow(job.id)
            self._start_polling()
        followed.streams.add(stream)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timings.history_s):
                await followed.loaded.wait()
        followed.loaded.set()
        if job.status in ENDED and not (may_grow(job) and self._ended_just_now(job)):
            followed.transcript.finish(job)
            followed.wake()
        return followed

    def _unfollow(self, job_id: int, stream: OpenStream) -> None:
        followed = self._jobs.get(job_id)
        if followed is None:
            return
        followed.streams.discard(stream)
        if not followed.streams:
            del self._jobs[job_id]
            self._subscriber.unfollow(job_id)

    def publish_ended(self, job_ids: Collection[int]) -> None:
        """For jobs that this process ended: its own readers read the record at once, those of other processes when the
        message reaches them. Does not wait."""
        self._ended_now.update(self._jobs.keys() & set(job_ids))
        if self._ended_now:
            self._poll_now.set()
        publishing = asyncio.create_task(publisher.publish_ended(self._redis, self._record, job_ids))
        self._publishing.add(publishing)
        publishing.add_done_callback(self._publishing.discard)

    def follow_lane(self, lane: conversations.Lane, stream: OpenStream) -> FollowedLane:
        """Every `follow_lane` needs its `unfollow_lane`."""
        followed = self._lanes.setdefault(lane.conversation_id, FollowedLane(lane.newest_job))
        followed.streams.add(stream)
        self._start_polling()
        return followed

    def unfollow_lane(self, conversation_id: int, stream: OpenStream) -> None:
        followed = self._lanes[conversation_id]
        followed.streams.discard(stream)
        if not followed.streams:
            del self._lanes[conversation_id]

    def follow_chats(self, owner_id: int, stream: OpenStream) -> FollowedChats:
        """Every `follow_chats` needs its `unfollow_chats`."""
        followed = self._chats.setdefault(owner_id, FollowedChats())
        followed.streams.add(stream)
        self._start_polling()
        return followed

    def unfollow_chats(self, owner_id: int, stream: OpenStream) -> None:
        followed = self._chats[owner_id]
        followed.streams.discard(stream)
        if not followed.streams:
            del self._chats[owner_id]

    def _on_entry(self, job_id: int, entry: Entry) -> None:
        followed = self._jobs.get(job_id)
        if followed is None:
            return
        if entry.kind == "ended":
            self._finish_soon(job_id)
        elif entry.kind == "progress":
            if entry.attempt >= followed.transcript.last.attempt:
                progress = msgspec.json.decode(entry.data, type=ProgressEvent)
                self._live.add_eta(progress, followed.model)
                if followed.transcript.set_progress(msgspec.json.encode(progress)):
                    followed.wake()
        elif followed.is_catching_up or not followed.transcript.add(entry):
            # The history holds it too. One that fits by its number alone may stand behind an entry that does not.
            self._catch_up(job_id)
        else:
            followed.wake()

    def _finish_soon(self, job_id: int) -> None:
        """Reads the end of this job out of the record, and not only at the next poll."""
        self._ended_now.add(job_id)
        self._poll_now.set()

    def _catch_up(self, job_id: int) -> None:
        if (followed := self._jobs.get(job_id)) is not None:
            followed.is_behind = True
            if not followed.is_catching_up:
                followed.catching_up = asyncio.create_task(self._read_history(followed))

    async def _read_history(self, followed: FollowedJob) -> None:
        while followed.is_behind:
            followed.is_behind = False
            try:
                for entry in await history(self._redis, self._record, followed.id, followed.transcript.last):
                    if not followed.transcript.add(entry):
                        followed.transcript.mark_incomplete(entry.attempt)
            except UNAVAILABLE:
                return  # the next entry of this job, or the next connection, tries again
            except ValueError as error:
                log.warning("a stream's entry has an unknown form; is every process of one version?", reason=str(error))
                return
            followed.loaded.set()
            followed.wake()
        self._just_followed.add(followed.id)
        self._poll_now.set()

    def _start_polling(self) -> None:
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll_while_followed())

    async def _poll_while_followed(self) -> None:
        next_poll = time.monotonic() + self.timings.poll_s
        next_chats = time.monotonic()
        while self._jobs or self._lanes or self._chats:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_poll - time.monotonic()):
                    await self._poll_now.wait()
            self._poll_now.clear()
            ended, self._ended_now = self._ended_now, set()
            followed_now, self._just_followed = self._just_followed, set()
            try:
                for job_id in ended:
                    if (followed := self._jobs.get(job_id)) is not None:
                        await self._finish_if_ended(followed)
                if followed_now:
                    await self._poll_jobs(followed_now)
                if time.monotonic() >= next_poll:
                    next_poll = time.monotonic() + self.timings.poll_s
                    await self._poll_jobs(self._jobs)
                    await self._poll_lanes()
                if time.monotonic() >= next_chats:
                    next_chats = time.monotonic() + self.timings.chats_s
                    await self._poll_chats()
            except StorageUnavailable as error:
                log.warning("followed jobs cannot be read now", reason=str(error))
            except Exception:
                log.exception("the poll of followed jobs failed unexpectedly")

    async def _poll_jobs(self, job_ids: Collection[int]) -> None:
        wanted = [job_id for job_id in job_ids if job_id in self._jobs and not self._jobs[job_id].transcript.ended]
        found = await self._database.read(reads.jobs_by_id, wanted, 1) if wanted else []
        await self._live.add(found)
        for job_id in set(wanted) - {job.id for job in found}:
            # Expired before its end was seen here. A reader that connects again learns that it is gone.
            if (followed := self._jobs.get(job_id)) is not None:
                for stream in followed.streams:
                    stream.end()
        for job in found:
            followed = self._jobs.get(job.id)
            if followed is None:
                continue
            if job.status not in ENDED:
                self._set_progress(followed, job)
            elif self._subscriber.connected:
                asyncio.get_running_loop().call_later(self.timings.last_entries_s, self._finish_soon, job.id)
            else:
                await self._finish_if_ended(followed)

    async def _finish_if_ended(self, followed: FollowedJob) -> None:
        # Who follows a job learns that it was cancelled, though with its conversation it is gone for everybody else.
        job = await self._database.read(reads.job_by_id, followed.owner_id, followed.id, or_deleted=True)
        if job is None or job.status not in ENDED:
            return
        followed.ended_at = followed.ended_at or time.monotonic()
        if may_grow(job) and time.monotonic() - followed.ended_at < self.timings.partial_s:
            return
        followed.transcript.finish(job)
        followed.wake()

    async def _poll_lanes(self) -> None:
        newest = await self._database.read(conversations.newest_jobs, list(self._lanes)) if self._lanes else {}
        for conversation_id, job_id in newest.items():
            lane = self._lanes.get(conversation_id)
            if lane is not None and job_id > lane.newest_job:
                lane.newest_job = job_id
                lane.wake()

    async def _poll_chats(self) -> None:
        for owner_id in list(self._chats):
            read_at = datetime.now(UTC)
            found = await self._database.read(conversation_list.sidebar, owner_id)
            followed = self._chats.get(owner_id)
            if followed is not None and found != followed.newest:
                followed.newest, followed.read_at = found, read_at
                followed.wake()

    def _set_progress(self, followed: FollowedJob, job: Job) -> None:
        if job.progress is not None and (job.status == "queued" or not followed.transcript.n_progress):
            data = msgspec.json.encode(wire.progress_event(job.progress, job.id, job.attempt))
            if followed.transcript.set_progress(data):
                followed.wake()

    def _ended_just_now(self, job: Job) -> bool:
        """Wall clocks may be wrong. Then its readers wait for `partial_s`, or a part of the reply is not sent."""
        limit = timedelta(seconds=self.timings.partial_s)
        return job.processed_at is not None and datetime.now(UTC) - job.processed_at < limit
