"""Responses, as OpenAI clients make, read, follow, cancel and delete them. A response is a job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Controller, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody, PathParameter, QueryParameter
from sqlalchemy import Connection

from llamalith_app.contracts import responses as contract
from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import MAX_ID, Job
from llamalith_app.contracts.responses import (
    InputItemList,
    InputMessage,
    InputText,
    ResponseCreate,
    ResponseDeleted,
)
from llamalith_app.controllers.v1 import calls
from llamalith_app.errors import BadInput, NoPreviousResponse, NotFound
from llamalith_app.store import calls as call_rows
from llamalith_app.store import turns
from llamalith_app.store.calls import Call
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads
from llamalith_app.web.follow import ENDED
from llamalith_app.web.openai import responses
from llamalith_app.web.openai.answers import stream_answer
from llamalith_app.web.openai.asked import Asked
from llamalith_app.web.openai.responses import ResponseTelling, Told
from llamalith_app.web.problems import NAMES_MODEL
from llamalith_app.web.request import AppRequest, IdempotencyKey

ANSWER = ResponseSpec(
    contract.Response,
    generate_examples=False,
    description="The response. With `stream`, Server-Sent Events, as OpenAI names them.",
)
ResponseInPath = Annotated[
    str, PathParameter(max_length=64, description="The id of a response: `resp_` and its job's number.")
]


class Responses(Controller):
    path = "/responses"
    tags = ("OpenAI",)

    @post(status_code=200, summary="Make a response", responses={200: ANSWER}, opt=NAMES_MODEL)
    async def make(
        self, request: AppRequest, data: JSONBody[ResponseCreate], idempotency_key: IdempotencyKey = None
    ) -> Response[Any]:
        """A job like every other; its number stands in the id. With `background` the answer comes at once and the job
        goes on; otherwise it is as for chat completions."""
        asked = responses.asked(data)
        database, owner_id = request.parts.database, request.principal.user_id
        previous = None if asked.previous is None else await _previous(database, owner_id, asked.previous)
        history = [await _resolved(database, owner_id, message) for message in asked.messages]
        if data.instructions:
            history.insert(0, Message(role="system", content=data.instructions))
        told = Told(bool(data.background), data.store is not False, asked.previous, data.metadata or {})
        job = await calls.submit(
            request,
            Asked(asked.request, history),
            is_stored=told.store,
            is_background=told.background,
            behind=None if previous is None else previous.turn_id,
            idempotency_key=idempotency_key,
        )
        if told.background and not data.stream:
            return Response(responses.response(job, told))
        return calls.answer(request, job, ResponseTelling(job, told), streams=bool(data.stream))

    @get("/{response_id:str}", summary="Read or follow a response", responses={200: ANSWER})
    async def one(
        self,
        request: AppRequest,
        response_id: ResponseInPath,
        stream: Annotated[bool, QueryParameter(description="As a stream of events, from its beginning.")] = False,
        starting_after: Annotated[
            int | None,
            QueryParameter(ge=0, le=MAX_ID, description="Only the events after the one with this number."),
        ] = None,
    ) -> Response[Any]:
        job = await _job(request, response_id)
        told = await _told(request.parts.database, job)
        if not stream:
            return Response(responses.response(job, told))
        after = -1 if starting_after is None else starting_after
        if job.status == "done" and after >= responses.last_number(job):
            last = responses.last_number(job)
            raise BadInput(f"starting_after: the last event of this response has the number {last}")
        await request.parts.live.add([job])
        return stream_answer(request, job, ResponseTelling(job, told, after=after), left=lambda _: None)

    @delete("/{response_id:str}", status_code=200, summary="Delete a response")
    async def delete(self, request: AppRequest, response_id: ResponseInPath) -> ResponseDeleted:
        """With its job and the messages of its turn. A job that has not ended is cancelled first."""
        owner_id, parts = request.principal.user_id, request.parts
        job = await _job(request, response_id)
        if job.status not in ENDED:
            await parts.cancellations.cancel_job(owner_id, job.id)
        await parts.branches.delete_turn(owner_id, job.conversation_id, job.turn_id)
        return ResponseDeleted(id=response_id, deleted=True)

    @post("/{response_id:str}/cancel", status_code=200, summary="Cancel a response")
    async def cancel(self, request: AppRequest, response_id: ResponseInPath) -> contract.Response:
        """Answers with the response in its final state: cancelled, or another one if it had ended before."""
        job = await _job(request, response_id)
        await request.parts.cancellations.cancel_job(request.principal.user_id, job.id)
        job = await _job(request, response_id)
        return responses.response(job, await _told(request.parts.database, job))

    @get("/{response_id:str}/input_items", summary="List what a response was asked")
    async def input_items(
        self,
        request: AppRequest,
        response_id: ResponseInPath,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], QueryParameter(description="Of the messages.")] = "desc",
        after: Annotated[
            str | None, QueryParameter(max_length=64, description="The id of the item before the first wanted one.")
        ] = None,
    ) -> InputItemList:
        """The messages that came with it, without those before."""
        job = await _job(request, response_id)
        inputs = await request.parts.database.read(turns.inputs, job.turn_id)
        items = [_item(job, at, message) for at, message in enumerate(inputs)]
        if order == "desc":
            items.reverse()
        if after is not None:
            known = [item.id for item in items]
            if after not in known:
                raise BadInput(f"after: expected the id of one of these items, such as {known[0]}")
            items = items[known.index(after) + 1 :]
        page = items[:limit]
        return InputItemList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(items) > len(page),
        )


def _item(job: Job, at: int, message: Message) -> InputMessage:
    kind: Literal["input_text", "output_text"] = "output_text" if message.role == "assistant" else "input_text"
    role: Any = message.role
    return InputMessage(id=f"msg_{job.id}_{at}", role=role, content=[InputText(type=kind, text=message.content)])


async def _job(request: AppRequest, response_id: str) -> Job:
    """Raises NotFound."""
    job = await _found(request.parts.database, request.principal.user_id, responses.job_id(response_id))
    if job is None:
        raise NotFound("There is no such response.")
    return job


async def _found(database: Database, owner_id: int, job_id: int) -> Job | None:
    return await database.read(reads.job_by_id, owner_id, job_id) if job_id else None


async def _previous(database: Database, owner_id: int, job_id: int) -> Job:
    """Raises NoPreviousResponse."""
    job = await _found(database, owner_id, job_id)
    if job is None:
        raise NoPreviousResponse("previous_response_id: there is no such response")
    if job.status in ("error", "cancelled"):
        raise NoPreviousResponse(f"previous_response_id: that response has no reply, it is {job.status}")
    return job


async def _resolved(database: Database, owner_id: int, message: Message | int) -> Message:
    """Raises BadInput."""
    if isinstance(message, Message):
        return message
    job = await _found(database, owner_id, message)
    if job is None or job.status != "done":
        raise BadInput(f"input: there is no message msg_{message}")
    return Message(role="assistant", content=job.result or "")


async def _told(database: Database, job: Job) -> Told:
    def read(connection: Connection) -> tuple[Call | None, int | None]:
        return call_rows.find(connection, job.id), turns.job_before(connection, job.turn_id)

    call, previous = await database.read(read)
    return Told(
        background=call is not None and call.is_background,
        store=call is None or call.is_stored,
        previous=previous,
        metadata={},
    )
