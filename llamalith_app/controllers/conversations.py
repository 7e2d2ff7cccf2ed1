"""Conversations over HTTP: queue a reply, read the messages or the newest state, cancel the open jobs."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, get, post
from litestar.params import JSONBody, PathParameter

from llamalith_app.contracts.conversations import Latest, MessageList
from llamalith_app.contracts.jobs import Cancelled, JobAccepted, ReplyCreate
from llamalith_app.contracts.text import AN_ID, CONTROL_FREE, MAX_NAME, NOT_BLANK
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.store import conversations
from llamalith_app.web.problems import TAKES_UNKNOWN
from llamalith_app.web.request import AppRequest, IdempotencyKey

PathId = Annotated[
    str,
    PathParameter(
        title=f"1 to {MAX_NAME} characters that are not all blank, without control characters",
        min_length=1,
        max_length=MAX_NAME,
        pattern=NOT_BLANK + CONTROL_FREE[1:],
        description=f"A conversation's id, percent-encoded (a slash is %2F): {AN_ID}. Blanks before and after it do not"
        " count.",
    ),
]


class Conversations(Controller):
    path = "/conversations/{conversation_id:str}"
    tags = ("Conversations",)

    @post("/reply", status_code=200, summary="Queue the next prompt", opt=TAKES_UNKNOWN)
    async def reply(
        self,
        request: AppRequest,
        conversation_id: PathId,
        data: JSONBody[ReplyCreate],
        idempotency_key: IdempotencyKey = None,
    ) -> JobAccepted:
        """Creates the conversation if it does not exist."""
        if not data.content.strip():
            raise BadInput("content is required")
        return await request.parts.submissions.submit(
            request.principal,
            request.id,
            data,
            conversation_id=conversation_id,
            key=await request.key(idempotency_key),
        )

    @post("/cancel", status_code=200, summary="Cancel all its open jobs")
    async def cancel(self, request: AppRequest, conversation_id: PathId) -> Cancelled:
        await request.takes_only()
        user_id = request.principal.user_id
        if not await request.parts.database.read(conversations.exists, user_id, conversation_id):
            raise NotFound("Conversation not found")
        n_cancelled = await request.parts.cancellations.cancel_matching(user_id, conversation_id=conversation_id)
        return Cancelled(ok=True, cancelled=n_cancelled)

    @get("/messages", summary="Read the messages, in the order of the turns", opt=TAKES_UNKNOWN)
    async def messages(self, request: AppRequest, conversation_id: PathId) -> MessageList:
        return await request.parts.database.read(conversations.message_list, request.principal.user_id, conversation_id)

    @get("/latest", summary="Read the newest prompt, reply and job", opt=TAKES_UNKNOWN)
    async def latest(self, request: AppRequest, conversation_id: PathId) -> Latest:
        found = await request.parts.database.read(conversations.latest, request.principal.user_id, conversation_id)
        if found.last_job is not None:
            await request.parts.live.add([found.last_job])
        return found
