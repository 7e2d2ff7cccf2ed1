"""A new chat: the form of its first message."""

from __future__ import annotations

from litestar import Controller, get
from litestar.response import Redirect, Template

from llamalith_app.contracts.forms import JobForm
from llamalith_app.controllers.models import engines
from llamalith_app.controllers.pages.redirects import HOME, see_other
from llamalith_app.guards.principal import OPEN, PAGE
from llamalith_app.store.jobs import reads
from llamalith_app.web.html import page
from llamalith_app.web.request import AppRequest


class NewChatPage(Controller):
    path = "/"
    include_in_schema = False

    @get(opt=PAGE)
    async def new_chat(self, request: AppRequest) -> Template:
        newest = await request.parts.database.read(reads.newest_briefs, request.principal.user_id, limit=1)
        return page(
            request,
            "new_chat",
            models=request.parts.models,
            engines=await engines(request.parts),
            form=JobForm(model=newest[0].model if newest else ""),
        )


@get("/", opt=OPEN, include_in_schema=False)
async def front_door() -> Redirect:
    """For people who type the host's address alone."""
    return see_other(HOME)
