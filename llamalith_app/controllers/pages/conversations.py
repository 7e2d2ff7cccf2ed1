"""The list of conversations."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, get
from litestar.params import QueryParameter
from litestar.response import Template

from llamalith_app.controllers.pages import EXCERPT_CHARS
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.store import conversations
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest

CONVERSATIONS_ON_PAGE = 50

PageNumber = Annotated[int, QueryParameter(name="page", ge=1, le=100_000)]


class ConversationsPage(Controller):
    path = ""
    include_in_schema = False

    @get("/conversations", opt=PAGE)
    async def conversations(self, request: AppRequest, number: PageNumber = 1) -> Template:
        return await _render(request, "conversations", number)

    @get("/conversation/list", opt=BACKGROUND_PAGE)
    async def rows(self, request: AppRequest, number: PageNumber = 1) -> Template:
        """The list alone, for the script that polls it."""
        return await _render(request, "_conversations", number)


async def _render(request: AppRequest, template: str, number: int) -> Template:
    found = await request.parts.database.read(
        conversations.newest,
        request.principal.user_id,
        limit=CONVERSATIONS_ON_PAGE + 1,
        offset=(number - 1) * CONVERSATIONS_ON_PAGE,
        max_text=EXCERPT_CHARS,
    )
    shown, more = found[:CONVERSATIONS_ON_PAGE], len(found) > CONVERSATIONS_ON_PAGE
    return page(request, template, conversations=shown, number=number, more=more)
