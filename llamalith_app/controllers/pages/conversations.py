"""The list of conversations: found, filtered, and changed one by one or many at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
from litestar import Controller, Response, get, post
from litestar.params import QueryParameter
from litestar.response import Redirect, Template
from sqlalchemy import Connection

from llamalith_app.contracts.forms import ConversationsFilter, ConversationsForm
from llamalith_app.contracts.jobs import MAX_ID
from llamalith_app.controllers.conversation_list import exported, import_conversation, restore
from llamalith_app.controllers.pages import CONVERSATION_STATUSES, SOURCES
from llamalith_app.controllers.pages.conversation import QueryId
from llamalith_app.controllers.pages.query import query_fields
from llamalith_app.controllers.pages.redirects import referring_page, see_other
from llamalith_app.errors import BadInput, FileTooLarge
from llamalith_app.guards.forms import listed_values
from llamalith_app.guards.principal import BACKGROUND_PAGE, PAGE
from llamalith_app.store import conversation_changes, conversation_list, search
from llamalith_app.store.conversation_changes import Change
from llamalith_app.store.conversation_list import Filter, Listed
from llamalith_app.web import download
from llamalith_app.web.download import ExportFormat
from llamalith_app.web.html import conversation_url, page
from llamalith_app.web.request import AppRequest
from llamalith_app.web.zone import zone_of

LIST = "/chat/conversations"
CONVERSATIONS_ON_PAGE = 40
"""Fewer than a form may have fields, so that all of a page can be chosen."""
ARCHIVED = {"": False, "true": True, "any": None}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

BeforeConversation = Annotated[int | None, QueryParameter(ge=1, le=MAX_ID)]
DeletedMoment = Annotated[int | None, QueryParameter(ge=0, le=10**17, description="Microseconds since 1970.")]


class _Shown(msgspec.Struct, frozen=True):
    """What one page shows."""

    pinned: list[Listed]
    others: list[Listed]
    tags: list[str]
    deleted: list[str]
    """The ids of those that were just deleted and can be restored."""


class ConversationsPage(Controller):
    path = ""
    include_in_schema = False

    @get("/conversations", opt=PAGE)
    async def conversations(
        self, request: AppRequest, before: BeforeConversation = None, deleted: DeletedMoment = None
    ) -> Template:
        return await _render(request, "conversations", before, deleted)

    @get("/conversation/list", opt=BACKGROUND_PAGE)
    async def rows(self, request: AppRequest, before: BeforeConversation = None) -> Template:
        """The list alone, for the script that polls it."""
        return await _render(request, "_conversations", before)

    @get("/conversation/export", opt=PAGE)
    async def export(
        self, request: AppRequest, public_id: QueryId, wanted: Annotated[ExportFormat, QueryParameter(name="format")]
    ) -> Response[Any]:
        return download.answer(await exported(request, public_id), wanted)

    @post("/conversation/import", opt=PAGE, status_code=303)
    async def make(self, request: AppRequest) -> Redirect | Template:
        """Leads to the new conversation. A file that cannot be used leads back to the list, with the reason."""
        try:
            given = download.parsed(await request.file("file"))
            made = await import_conversation(request.parts, request.principal.user_id, given)
        except (BadInput, FileTooLarge) as error:
            return await _render(
                request, "conversations", why=f"Nothing was imported. {error}", status_code=error.status
            )
        return see_other(conversation_url(made.conversation_id))

    @post("/conversation/change", opt=PAGE, status_code=303)
    async def change(self, request: AppRequest) -> Redirect:
        """Changes one conversation, or all whose boxes are checked, and leads back to the page of the button."""
        form = await request.form_as(ConversationsForm)
        ids = [public_id for public_id in await listed_values(request, "id") if public_id.strip()]
        owner_id, parts = request.principal.user_id, request.parts
        back = _without_notice(referring_page(request))
        if form.action == "undo":
            at = _moment(int(form.deleted))
            ids = await parts.database.read(conversation_changes.deleted_at, owner_id, at)
            await restore(parts, owner_id, ids)
            return see_other(back)
        if form.action == "delete":
            deletion = await parts.cancellations.delete_conversations(owner_id, ids)
            return see_other(_with_notice(back, deletion.at) if deletion.public_ids else back)
        await parts.database.write(conversation_changes.change, owner_id, ids, _wanted(form), datetime.now(UTC))
        return see_other(back)


def _wanted(form: ConversationsForm) -> Change:
    tag = form.tag.strip()
    match form.action:
        case "rename":
            return Change(title=form.title.strip())
        case "pin" | "unpin":
            return Change(is_pinned=form.action == "pin")
        case "archive" | "unarchive":
            return Change(is_archived=form.action == "archive")
        case _ if not tag:
            raise BadInput("tag: type one first")
        case "tag":
            return Change(add_tags=[tag])
        case _:
            return Change(remove_tags=[tag])


async def _render(
    request: AppRequest,
    template: str,
    before: int | None = None,
    deleted: int | None = None,
    *,
    why: str = "",
    status_code: int = 200,
) -> Template:
    """`why`: what went wrong."""
    form = query_fields(request, ConversationsFilter)
    is_filtered = any(value.strip() for value in msgspec.structs.astuple(form))
    which = Filter(
        form.q,
        ARCHIVED[form.archived],
        None if is_filtered else False,
        form.tag.strip() or None,
        form.source or None,
        form.status or None,
    )
    if form.q.strip():
        await search.catch_up(request.parts.database)
    shown = await request.parts.database.read(
        _read, request.principal.user_id, which, before, None if deleted is None else _moment(deleted)
    )
    others = shown.others[:CONVERSATIONS_ON_PAGE]
    return page(
        request,
        template,
        status_code=status_code,
        why=why,
        pinned=shown.pinned,
        days=conversation_list.by_day(others, datetime.now(UTC), zone_of(request)),
        more=others[-1].cursor if len(shown.others) > len(others) else None,
        filters=msgspec.structs.asdict(form),
        is_filtered=is_filtered,
        before=before,
        tags=shown.tags,
        sources=SOURCES,
        statuses=CONVERSATION_STATUSES,
        deleted=deleted,
        n_deleted=len(shown.deleted),
    )


def _read(connection: Connection, owner_id: int, which: Filter, before: int | None, deleted: datetime | None) -> _Shown:
    # Pinned ones stand on the first page alone, above the others.
    with_pinned = which.is_pinned is False and before is None
    return _Shown(
        conversation_list.pinned(connection, owner_id, CONVERSATIONS_ON_PAGE) if with_pinned else [],
        conversation_list.listed(connection, owner_id, which, limit=CONVERSATIONS_ON_PAGE + 1, before=before),
        conversation_list.tags(connection, owner_id),
        [] if deleted is None else conversation_changes.deleted_at(connection, owner_id, deleted),
    )


def _moment(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def _without_notice(path: str) -> str:
    address, _, query = path.partition("?")
    kept = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != "deleted"]
    return f"{address}?{urlencode(kept)}" if kept else address


def _with_notice(back: str, at: datetime) -> str:
    """The list as it was, with the way to undo; from any other page the list as a whole."""
    is_list = urlsplit(back).path == LIST
    moment = (at - _EPOCH) // timedelta(microseconds=1)
    return f"{back if is_list else LIST}{'&' if is_list and '?' in back else '?'}deleted={moment}"
