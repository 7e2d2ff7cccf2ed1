"""The chats beside every page: read before the page's own handler runs, because `html.page` cannot wait for a database;
and read again for as long as a browser follows them.

Knows which requests are for a page with a sidebar. `templates/_chats.html` shows what is read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, tzinfo
from typing import Any, NamedTuple

from litestar import Request

from llamalith_app.store import conversation_list
from llamalith_app.store.conversation_list import Day, Listed, Sidebar
from llamalith_app.store.database import Database
from llamalith_app.web.follow import Followers, OpenStream
from llamalith_app.web.zone import zone_of


class Chats(NamedTuple):
    pinned: list[Listed]
    days: list[Day]
    """The newest others, by day."""
    at: int
    """When they were read, in milliseconds since 1970: of two versions the later one is shown."""

    @property
    def version(self) -> str:
        """The same for the same looks."""
        groups = [("pinned", self.pinned), *((f"{day.key} {day.first}", day.conversations) for day in self.days)]
        looks = [(name, [(one.public_id, one.name, one.status, one.cursor) for one in found]) for name, found in groups]
        return hashlib.sha256(repr(looks).encode()).hexdigest()[:12]


async def read_chats(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before a handler: puts the chats into the request's state. Raises StorageUnavailable."""
    options = request.route_handler.opt
    if request.scope["method"] != "GET" or not options.get("page") or options.get("background"):
        return
    database: Database = request.app.state.parts.database
    read_at = datetime.now(UTC)
    found = await database.read(conversation_list.sidebar, request.state.principal.user_id)
    request.state.chats = _grouped(found, read_at, zone_of(request))


async def changes(
    followers: Followers, owner_id: int, version: str, zone: tzinfo, stream: OpenStream
) -> AsyncGenerator[Chats | None, None]:
    """The owner's chats whenever they look otherwise than in this version, then than before; until the stream is over.
    None: they did not change for `heartbeat_s`."""
    followed = followers.follow_chats(owner_id, stream)
    try:
        while not stream.is_over:
            if (
                followed.newest is not None
                and (chats := _grouped(followed.newest, followed.read_at, zone)).version != version
            ):
                version = chats.version
                yield chats
            if not await stream.wait(followers.timings.heartbeat_s):
                yield None
    finally:
        followers.unfollow_chats(owner_id, stream)


def _grouped(found: Sidebar, read_at: datetime, zone: tzinfo) -> Chats:
    days = conversation_list.by_day(found.recent, datetime.now(UTC), zone)
    return Chats(found.pinned, days, int(read_at.timestamp() * 1000))
