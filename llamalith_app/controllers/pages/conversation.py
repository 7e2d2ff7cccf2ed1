"""A conversation: its turns, and the form of the next message."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, get
from litestar.params import QueryParameter
from litestar.response import Template

from llamalith_app.contracts.forms import JobForm
from llamalith_app.contracts.jobs import MAX_ID
from llamalith_app.contracts.parameters import texts_of
from llamalith_app.controllers.conversations import PathId
from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.errors import NotFound
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.store import conversation_list, conversations
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest

TURNS_ON_PAGE = 30

BeforeTurn = Annotated[int | None, QueryParameter(ge=0, le=MAX_ID)]
LastTurn = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID, description="The last turn of that page.")]
KnownTurns = Annotated[int, QueryParameter(ge=0, le=MAX_ID, description="The page has the turns before this one.")]
FromTurn = Annotated[int | None, QueryParameter(name="from", ge=0, le=MAX_ID)]
SeenTurn = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID, description="The last turn that the page shows.")]
QueryId = Annotated[str, QueryParameter(name="id", min_length=1, max_length=200)]


class ConversationPage(Controller):
    path = ""
    include_in_schema = False

    @get("/conversations/{conversation_id:str}", opt=PAGE)
    async def conversation(
        self, request: AppRequest, conversation_id: PathId, before: BeforeTurn = None, last: LastTurn = None
    ) -> Template:
        return await _render(request, conversation_id, before, last)

    @get("/conversation", opt=PAGE)
    async def conversation_by_query(
        self, request: AppRequest, public_id: QueryId, before: BeforeTurn = None, last: LastTurn = None
    ) -> Template:
        """For ids that cannot stand in a path."""
        return await _render(request, public_id, before, last)

    @get("/conversation/turns", opt=BACKGROUND_PAGE)
    async def turns(
        self,
        request: AppRequest,
        public_id: QueryId,
        first: FromTurn = None,
        known: KnownTurns = 0,
        seen: SeenTurn = None,
        before: BeforeTurn = None,
        last: LastTurn = None,
    ) -> Template:
        """Turns of the branch that the page shows: those from `first` on, for the script that polls them; or those
        before `before`, for the script that shows more of them."""
        thread = await _thread(request, public_id, first=first, before=before, last=last, seen=seen)
        return page(
            request,
            "_turns" if before is None else "_before",
            thread=thread,
            public_id=public_id,
            is_newest=before is None,
            known=known,
            first=first,
        )


async def _render(request: AppRequest, public_id: str, before: int | None, last: int | None) -> Template:
    thread = await _thread(request, public_id, before=before, last=last)
    listed = await request.parts.database.read(conversation_list.conversation, request.principal.user_id, public_id)
    if listed is None:
        raise NotFound("There is no such conversation.")
    newest = next((turn.job for turn in reversed(thread.turns) if turn.job is not None), None)
    form = JobForm(
        model=newest.model if newest is not None and newest.model in request.parts.models else "",
        system_prompt=thread.system_prompt,
        system_prompt_was=thread.system_prompt,
        conversation_id=public_id,
        **texts_of(newest.parameters if newest is not None else None),
        seen=str(thread.last_turn_id),
    )
    return page(
        request,
        "conversation",
        thread=thread,
        listed=listed,
        public_id=public_id,
        is_newest=before is None,
        known=0,
        first=None,
        form=form,
        models=request.parts.models,
    )


async def _thread(
    request: AppRequest,
    public_id: str,
    *,
    first: int | None = None,
    before: int | None = None,
    last: int | None = None,
    seen: int | None = None,
) -> conversations.Thread:
    """With the live progress of its jobs. Raises NotFound."""
    thread = await request.parts.database.read(
        conversations.thread,
        request.principal.user_id,
        public_id,
        limit=TURNS_ON_PAGE,
        max_text=EXCERPT_CHARS,
        first=first,
        before=before,
        last=last,
        seen=seen,
    )
    if thread is None:
        raise NotFound("There is no such conversation.")
    await request.parts.live.add([job for turn in thread.turns for job in turn.jobs])
    return thread
