"""A conversation as its page reads it while replies are written: their blocks as HTML, sent as they change.

The same events as `controllers/events.py` has, in the page's own form. Owns the ids that a page resumes from.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from typing import Annotated, Any

from litestar import Controller, Response, get
from litestar.params import HeaderParameter, QueryParameter

from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.pages.conversation import QueryId
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.guards.principal import BACKGROUND
from llamalith_app.store import conversations
from llamalith_app.store.jobs import reads
from llamalith_app.web import lane as lane_stream
from llamalith_app.web import reply_blocks, sse
from llamalith_app.web.follow import ENDED, OpenStream
from llamalith_app.web.markdown import before_reply
from llamalith_app.web.reply_blocks import BlockCursor, ReplyBlocks
from llamalith_app.web.request import AppRequest, Parts
from llamalith_app.web.transcript import FINAL, Cursor

ID = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})-([0-9]{1,10})\.([0-9]{1,9})")

After = Annotated[str | None, QueryParameter(description="The id of the last event that the page has.")]
Last = Annotated[str | None, HeaderParameter(name="Last-Event-ID", description="The same; it takes precedence.")]


class BlocksPage(Controller):
    path = ""
    include_in_schema = False

    @get("/conversations/{conversation_id:str}/blocks", opt=BACKGROUND)
    async def blocks(
        self, request: AppRequest, conversation_id: PathId, after: After = None, last_event_id: Last = None
    ) -> Response[Any]:
        return await _stream(request, conversation_id, last_event_id, after)

    @get("/conversation/blocks", opt=BACKGROUND)
    async def blocks_by_query(
        self, request: AppRequest, public_id: QueryId, after: After = None, last_event_id: Last = None
    ) -> Response[Any]:
        """For ids that cannot stand in a path."""
        return await _stream(request, public_id, last_event_id, after)


async def _stream(request: AppRequest, public_id: str, last_event_id: str | None, after: str | None) -> Response[Any]:
    cursor, from_job = _cursor("Last-Event-ID", last_event_id) if last_event_id else _cursor("after", after)
    owner_id, parts = request.principal.user_id, request.parts
    lane = await parts.database.read(conversations.lane, owner_id, public_id, from_job)
    if lane is None:
        raise NotFound("There is no such conversation.")
    return sse.EventStream(
        request,
        lambda stream: lane_stream.chunks(
            parts,
            lane,
            from_job,
            stream,
            first_id=lambda job_id: b"%d.0-0.0" % job_id,
            of_job=lambda job_id: _chunks(parts, owner_id, job_id, cursor if job_id == from_job else None, stream),
        ),
    )


def _cursor(name: str, given: str | None) -> tuple[BlockCursor | None, int | None]:
    """What the page has, and of which job. Raises BadInput."""
    if not given:
        return None, None
    found = ID.fullmatch(given)
    if found is None:
        raise BadInput(f"{name}: expected the id of an event of this stream, such as 7.1-42.3")
    job_id, attempt, n, n_blocks = map(int, found.groups())
    return (BlockCursor(Cursor(attempt, n), n_blocks) if n else None), job_id


async def _chunks(
    parts: Parts, owner_id: int, job_id: int, cursor: BlockCursor | None, stream: OpenStream
) -> sse.Chunks:
    job = await parts.database.read(reads.job_by_id, owner_id, job_id)
    if job is None or (cursor is not None and cursor.event == (job.attempt, FINAL) and job.status in ENDED):
        return
    await parts.live.add([job])
    events = parts.followers.events(job, owner_id, None, stream)
    reply = ReplyBlocks(job_id, cursor, before_reply(job.parameters))
    async with aclosing(events), aclosing(reply_blocks.chunks(events, reply)) as chunks:
        async for chunk in chunks:
            yield chunk
