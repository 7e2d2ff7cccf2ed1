"""The branches of conversations over HTTP: read the tree, select a branch, fork, delete a turn, write a reply again."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter

from llamalith_app.contracts.conversations import ForkCreate, Head, TurnChoice, TurnTree
from llamalith_app.contracts.jobs import MAX_ID, JobAccepted, Regenerate
from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.jobs import JobIdInPath
from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.store import tree
from llamalith_app.web.request import AppRequest, IdempotencyKey

TurnIdInPath = Annotated[int, PathParameter(ge=1, le=MAX_ID)]


class BranchesOfConversation(Controller):
    path = "/conversations/{conversation_id:str}"
    tags = ("Branches",)

    @get("/tree", summary="List the turns of all branches")
    async def tree(
        self,
        request: AppRequest,
        conversation_id: PathId,
        limit: Annotated[int, QueryParameter(ge=1, le=500)] = 100,
        after: Annotated[
            int, QueryParameter(ge=0, le=MAX_ID, description="Only turns with a larger id: the next page.")
        ] = 0,
    ) -> TurnTree:
        """Oldest first. Of texts only the beginning; the whole ones are in the jobs."""
        return await request.parts.database.read(
            tree.tree,
            request.principal.user_id,
            conversation_id,
            limit=limit,
            after=after,
            max_text=EXCERPT_CHARS,
        )

    @post("/head", status_code=200, summary="Show another branch")
    async def head(self, request: AppRequest, conversation_id: PathId, data: JSONBody[TurnChoice]) -> Head:
        """The newest turn below the given one becomes the head, or that turn itself where nothing continues it. To go
        on from a turn in the middle, name it as `parent` of the next prompt."""
        return await request.parts.branches.select(request.principal.user_id, conversation_id, data.turn_id)

    @post(
        "/fork",
        status_code=200,
        summary="Continue a turn in a new conversation",
        opt={
            "conflict": "A job up to that turn has not ended, the id is taken, or the Idempotency-Key stands for"
            " another request.",
            "makes_no_job": True,
        },
    )
    async def fork(
        self,
        request: AppRequest,
        conversation_id: PathId,
        data: JSONBody[ForkCreate],
        idempotency_key: IdempotencyKey = None,
    ) -> Head:
        """The new conversation has the path to that turn before it, and the same system prompt in force. Nothing is
        copied but that: what expires or is deleted in the one is gone in the other."""
        return await request.parts.branches.fork(
            request.principal.user_id,
            conversation_id,
            data.turn_id,
            data.conversation_id,
            key=await request.key(idempotency_key),
        )

    @delete(
        "/turns/{turn_id:str}",
        status_code=200,
        summary="Delete a turn",
        opt={"conflict": "Its job has not ended: cancel it first. Or it is a system prompt that later turns have."},
    )
    async def delete_turn(self, request: AppRequest, conversation_id: PathId, turn_id: TurnIdInPath) -> Head:
        """Its prompt, reply and job are gone for good; later turns then continue the one before it. A system prompt
        that began with it stays in force for them. Where it was the head, the newest turn below its parent is next."""
        await request.takes_only()
        return await request.parts.branches.delete_turn(request.principal.user_id, conversation_id, turn_id)


class BranchesOfJob(Controller):
    path = "/jobs/{job_id:str}"
    tags = ("Branches",)

    @post(
        "/regenerate",
        status_code=200,
        summary="Write the reply again, on a branch of its own",
        opt={"conflict": "The Idempotency-Key stands for another request."},
    )
    async def regenerate(
        self,
        request: AppRequest,
        job_id: JobIdInPath,
        data: JSONBody[Regenerate],
        idempotency_key: IdempotencyKey = None,
    ) -> JobAccepted:
        """A new job with the same prompt and settings on a turn beside the old one, which stays; `{}` changes nothing
        else. The new turn becomes the head. For a job in any state."""
        return await request.parts.submissions.regenerate(
            request.principal, request.id, job_id, data, key=await request.key(idempotency_key)
        )
