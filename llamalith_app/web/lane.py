"""The jobs of one conversation as one stream: one after another, then those that are added later.

Knows no event and no format: the caller says what a job's chunks are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import aclosing

from llamalith_app.contracts.jobs import Job
from llamalith_app.store import conversations
from llamalith_app.store.jobs import reads
from llamalith_app.web import sse
from llamalith_app.web.follow import ENDED, OpenStream
from llamalith_app.web.request import Parts
from llamalith_app.web.transcript import FINAL, Cursor


async def chunks(
    parts: Parts,
    owner_id: int,
    lane: conversations.Lane,
    from_job: int | None,
    last: Cursor | None,
    stream: OpenStream,
    *,
    first_id: Callable[[int], bytes],
    of_job: Callable[[Job], sse.Chunks],
) -> sse.Chunks:
    """The chunks of the jobs of a lane, until the stream is over. `first_id`: the id from which a client resumes before
    it has any event of this job. `from_job`: the job that it resumes in, behind the event `last`, if it has any."""
    waiting = deque(lane.job_ids)
    last_id = max(lane.newest_job, *waiting, 0)
    followed = parts.followers.follow_lane(lane, stream)
    try:
        if from_job is None:
            # A client that resumes before any event misses no job that ended in between.
            yield sse.id_alone(first_id(waiting[0] if waiting else last_id + 1))
        while not stream.is_over:
            if not waiting and followed.newest_job > last_id:
                waiting.extend(await parts.database.read(conversations.jobs_after, lane.conversation_id, last_id))
                last_id = max(followed.newest_job, *waiting)
            if waiting:
                job = await parts.database.read(reads.job_by_id, owner_id, waiting.popleft())
                if job is None or (job.id == from_job and last and last.n == FINAL and job.status in ENDED):
                    continue
                await parts.live.add([job])
                async with aclosing(of_job(job)) as of_one:
                    async for chunk in of_one:
                        yield chunk
            elif not await stream.wait(parts.followers.timings.heartbeat_s):
                yield sse.HEARTBEAT
    finally:
        parts.followers.unfollow_lane(lane.conversation_id, stream)
