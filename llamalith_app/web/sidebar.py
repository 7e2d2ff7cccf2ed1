"""The chats beside every page: read before the page's own handler runs, because `html.page` cannot wait for a database.

Knows which requests are for a page with a sidebar. `templates/_chats.html` shows what is read here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

from litestar import Request

from llamalith_app.store import conversation_list
from llamalith_app.store.conversation_list import Day, Listed
from llamalith_app.store.database import Database
from llamalith_app.web.zone import zone_of


class Chats(NamedTuple):
    pinned: list[Listed]
    days: list[Day]
    """The newest others, by day."""


async def read_chats(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before a handler: puts the chats into the request's state. Raises StorageUnavailable."""
    options = request.route_handler.opt
    if request.scope["method"] != "GET" or not options.get("page") or options.get("background"):
        return
    database: Database = request.app.state.parts.database
    found = await database.read(conversation_list.sidebar, request.state.principal.user_id)
    days = conversation_list.by_day(found.recent, datetime.now(UTC), zone_of(request))
    request.state.chats = Chats(found.pinned, days)
