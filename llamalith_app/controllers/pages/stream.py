"""The one stream of a browser, for all windows of it: replies while they are written, in blocks of HTML, and how the
chats in the sidebar stand.

The same events as `controllers/events.py` has, in the page's own form. Owns the ids that a page resumes from. Another
set of conversations is another request: a browser comes again with the newest id that each of its windows has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

import msgspec
from litestar import Controller, Response, get
from litestar.params import QueryParameter

from llamalith_app.contracts.blocks import ChatsEvent
from llamalith_app.contracts.jobs import Job
from llamalith_app.errors import BadInput
from llamalith_app.guards.principal import BACKGROUND
from llamalith_app.store import conversations
from llamalith_app.web import html, merge, reply_blocks, sidebar, sse
from llamalith_app.web import lane as lane_stream
from llamalith_app.web.follow import OpenStream
from llamalith_app.web.markdown import before_reply
from llamalith_app.web.reply_blocks import BlockCursor, ReplyBlocks
from llamalith_app.web.request import AppRequest
from llamalith_app.web.transcript import Cursor
from llamalith_app.web.zone import zone_of

FOLLOWED = re.compile(r"([0-9]{1,18}):(?:([0-9]{1,18})\.([0-9]{1,9})-([0-9]{1,10})\.([0-9]{1,9}))?")
MAX_FOLLOWED = 16
"""Conversations in one stream; the scripts of pages keep to it."""


class Followed(NamedTuple):
    """A conversation that a window follows, and what the window has."""

    conversation_id: int
    from_job: int | None
    cursor: BlockCursor | None
    """Of that job. None: nothing."""


class StreamPage(Controller):
    path = ""
    include_in_schema = False

    @get("/stream", opt=BACKGROUND)
    async def stream(
        self,
        request: AppRequest,
        follow: Annotated[
            list[str] | None,
            QueryParameter(description="`7:` follows conversation 7 (its row's id), `7:12.1-42.3` behind this event."),
        ] = None,
        chats: Annotated[
            str, QueryParameter(max_length=40, description="The version of the chats that the browser shows.")
        ] = "",
    ) -> Response[Any]:
        """`to`: the events behind it are for the conversation at this place of `follow`, as in `0`. `chats`: the list
        of chats as it is now. What the caller does not have, or has deleted, has no events."""
        if len(follow or ()) > MAX_FOLLOWED:
            raise BadInput(f"follow: {len(follow or ())} conversations, at most {MAX_FOLLOWED} in one stream")
        followed = [_followed(given) for given in follow or ()]
        places = [(one.conversation_id, one.from_job) for one in followed]
        lanes = await request.parts.database.read(conversations.lanes, request.principal.user_id, places)
        return sse.EventStream(request, lambda stream: _chunks(request, followed, lanes, chats, stream))


def _followed(given: str) -> Followed:
    """Raises BadInput."""
    found = FOLLOWED.fullmatch(given)
    if found is None:
        raise BadInput("follow: expected a conversation with the id of its last event, such as 7: or 7:12.1-42.3")
    conversation_id, *position = found.groups()
    if position[0] is None:
        return Followed(int(conversation_id), None, None)
    job_id, attempt, n, n_blocks = map(int, position)
    return Followed(int(conversation_id), job_id, BlockCursor(Cursor(attempt, n), n_blocks) if n or n_blocks else None)


async def _chunks(
    request: AppRequest,
    followed: Sequence[Followed],
    lanes: Sequence[conversations.Lane | None],
    version: str,
    stream: OpenStream,
) -> sse.Chunks:
    sources: list[merge.Source] = [lambda own: _chats(request, version, own)]
    of_source: list[int | None] = [None]
    for n, (one, lane) in enumerate(zip(followed, lanes, strict=True)):
        if lane is not None:
            sources.append(_replies(request, one, lane))
            of_source.append(n)
    newest: int | None = None
    async with aclosing(merge.chunks(request.parts.followers, sources, stream)) as chunks:
        async for source, chunk in chunks:
            place = None if source is None else of_source[source]
            if place not in (None, newest):
                newest = place
                yield b"event: to\ndata: %d\n\n" % place
            yield chunk


async def _chats(request: AppRequest, version: str, stream: OpenStream) -> sse.Chunks:
    followers, owner_id = request.parts.followers, request.principal.user_id
    async with aclosing(sidebar.changes(followers, owner_id, version, zone_of(request), stream)) as changes:
        async for chats in changes:
            if chats is None:
                yield sse.HEARTBEAT
                continue
            event = ChatsEvent(chats.version, chats.at, html.part(request, "_chats", chats=chats))
            yield b"event: chats\ndata: %b\n\n" % msgspec.json.encode(event)


def _replies(request: AppRequest, followed: Followed, lane: conversations.Lane) -> merge.Source:
    parts, owner_id = request.parts, request.principal.user_id
    _, from_job, cursor = followed

    async def of_job(job: Job, stream: OpenStream) -> sse.Chunks:
        reply = ReplyBlocks(job.id, cursor if job.id == from_job else None, before_reply(job.parameters))
        events = parts.followers.events(job, owner_id, None, stream)
        async with aclosing(events), aclosing(reply_blocks.chunks(events, reply)) as chunks:
            async for chunk in chunks:
                yield chunk

    return lambda stream: lane_stream.chunks(
        parts,
        owner_id,
        lane,
        from_job,
        cursor.event if cursor is not None else None,
        stream,
        first_id=lambda job_id: b"%d.0-0.0" % job_id,
        of_job=lambda job: of_job(job, stream),
    )
