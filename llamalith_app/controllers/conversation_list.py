"""Conversations as a whole over HTTP: list, search, rename, pin, archive, tag, delete and restore them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from litestar import Controller, Response, delete, get, patch, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody, QueryParameter
from msgspec import UNSET, UnsetType
from sqlalchemy import Connection

from llamalith_app.contracts.conversation_list import (
    MAX_AT_ONCE,
    MAX_TAG,
    ArchivedWord,
    ConversationBrief,
    ConversationBriefs,
    ConversationChange,
    ConversationsChange,
    ConversationsChanged,
    ConversationStatusWord,
    Found,
    SourceWord,
)
from llamalith_app.contracts.export import ConversationExport, Imported
from llamalith_app.contracts.jobs import MAX_ID
from llamalith_app.contracts.text import CONTROL_FREE, NUL_FREE
from llamalith_app.controllers.conversations import PathId
from llamalith_app.errors import BadInput, NotFound
from llamalith_app.store import conversation_changes, conversation_list, keys, search, transfer
from llamalith_app.store.conversation_changes import Change
from llamalith_app.store.conversation_list import Filter, Listed
from llamalith_app.store.keys import Key
from llamalith_app.store.search import MAX_QUERY
from llamalith_app.web import download
from llamalith_app.web.download import ExportFormat
from llamalith_app.web.request import AppRequest, IdempotencyKey, Parts

IS_TAKEN = "Another conversation began under this id meanwhile."
IMPORT = "import"
NO_CHANGE = "Nothing is to change: send at least one of "
ARCHIVED = {"false": False, "true": True, "any": None}

Query = Annotated[
    str,
    QueryParameter(
        max_length=MAX_QUERY,
        pattern=NUL_FREE,
        description="Words, or phrases in quotation marks, that stand in the title or in one message. A word of three"
        " letters also finds longer words that begin with it, unless it is very frequent. Empty: all.",
    ),
]
OfTag = Annotated[
    str, QueryParameter(max_length=MAX_TAG, pattern=CONTROL_FREE, description="Only those with this tag. Empty: all.")
]
BeforeConversation = Annotated[
    int | None, QueryParameter(ge=1, le=MAX_ID, description="The `next` of the page before.")
]


class ConversationList(Controller):
    path = "/conversations"
    tags = ("Conversations",)

    @get(summary="List and search conversations")
    async def conversations(
        self,
        request: AppRequest,
        q: Query = "",
        archived: Annotated[
            ArchivedWord, QueryParameter(description="`false`: without archived ones; `true`: these alone.")
        ] = "false",
        tag: OfTag = "",
        source: Annotated[SourceWord | None, QueryParameter(description="Only those that were made there.")] = None,
        status: Annotated[
            ConversationStatusWord | None,
            QueryParameter(
                description="`processing`: a reply is being written; `queued`: one is waited for; `error`: none is, and"
                " the last one failed."
            ),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_AT_ONCE)] = 50,
        before: BeforeConversation = None,
    ) -> ConversationBriefs:
        """Those with the newest turns first. A search looks at the first 100,000 characters of each message, and finds
        the conversations of the 2,000 newest messages that match."""
        which = Filter(q, ARCHIVED[archived], None, tag.strip() or None, source, status)
        if q.strip():
            await search.catch_up(request.parts.database)
        found = await request.parts.database.read(
            conversation_list.listed, request.principal.user_id, which, limit=limit + 1, before=before
        )
        shown = found[:limit]
        return ConversationBriefs(
            conversations=[_brief(one) for one in shown], next=shown[-1].cursor if len(found) > limit else None
        )

    @patch(status_code=200, summary="Change several conversations", opt={"conflict": IS_TAKEN})
    async def change_several(self, request: AppRequest, data: JSONBody[ConversationsChange]) -> ConversationsChanged:
        """All of them in one transaction. Ids without a conversation are left out of `changed`."""
        return await change_several(request.parts, request.principal.user_id, data)

    @get("/{conversation_id:str}", summary="Read what a list says of a conversation")
    async def one(self, request: AppRequest, conversation_id: PathId) -> ConversationBrief:
        return await _read(request, conversation_id)

    @patch("/{conversation_id:str}", status_code=200, summary="Rename, pin, archive or tag a conversation")
    async def change(
        self, request: AppRequest, conversation_id: PathId, data: JSONBody[ConversationChange]
    ) -> ConversationBrief:
        return await _change(request, conversation_id, data)

    @delete("/{conversation_id:str}", status_code=200, summary="Delete a conversation")
    async def delete(self, request: AppRequest, conversation_id: PathId) -> ConversationsChanged:
        """Cancels its open jobs. It is gone at once for everybody, and its rows are removed after `restore_days`; until
        then it can be restored. A new prompt under its id begins another conversation."""
        return await _delete(request, conversation_id)

    @get(
        "/{conversation_id:str}/export",
        summary="Save a conversation as a file",
        responses={
            200: ResponseSpec(
                ConversationExport,
                generate_examples=False,
                description="JSON with all branches, or, as `text/markdown`, the branch that people see.",
            )
        },
    )
    async def export(
        self,
        request: AppRequest,
        conversation_id: PathId,
        wanted: Annotated[
            ExportFormat,
            QueryParameter(name="format", description="`json` can be imported again; `md` is for reading."),
        ] = "json",
    ) -> Response[Any]:
        return download.answer(await exported(request, conversation_id), wanted)

    @post(
        f"/{IMPORT}",
        status_code=200,
        summary="Make a conversation of an exported file",
        opt={"makes_no_job": True, "conflict": "The Idempotency-Key stands for another request."},
    )
    async def make(
        self, request: AppRequest, data: JSONBody[ConversationExport], idempotency_key: IdempotencyKey = None
    ) -> Imported:
        """The JSON of an export, with all of its branches, becomes a new conversation with an id of its own. Its turns
        have no jobs. A turn without a reply is left out, since later prompts would not read it."""
        return await import_conversation(
            request.parts, request.principal.user_id, data, await request.key(idempotency_key)
        )

    @post(
        "/{conversation_id:str}/restore",
        status_code=200,
        summary="Restore a deleted conversation",
        opt={"conflict": IS_TAKEN},
    )
    async def restore(self, request: AppRequest, conversation_id: PathId) -> ConversationBrief:
        """The jobs that were cancelled with it stay cancelled; they can be retried. A conversation that was not deleted
        is answered as it is. 409: another conversation began under its id meanwhile."""
        await request.takes_only()
        if not await restore(request.parts, request.principal.user_id, [conversation_id]):
            raise NotFound("Conversation not found")
        return await _read(request, conversation_id)


class NamedImport(Controller):
    """The conversation whose id is `import`, which would be hidden behind the route that imports one."""

    path = f"/conversations/{IMPORT}"
    include_in_schema = False

    @get()
    async def one(self, request: AppRequest) -> ConversationBrief:
        return await _read(request, IMPORT)

    @patch(status_code=200)
    async def change(self, request: AppRequest, data: JSONBody[ConversationChange]) -> ConversationBrief:
        return await _change(request, IMPORT, data)

    @delete(status_code=200)
    async def delete(self, request: AppRequest) -> ConversationsChanged:
        return await _delete(request, IMPORT)


async def change_several(parts: Parts, owner_id: int, data: ConversationsChange) -> ConversationsChanged:
    """Raises BadInput, ConversationExists, StorageUnavailable."""
    wanted = Change(
        is_pinned=_or_none(data.pinned),
        is_archived=_or_none(data.archived),
        add_tags=[] if isinstance(data.add_tags, UnsetType) else _trimmed(data.add_tags),
        remove_tags=[] if isinstance(data.remove_tags, UnsetType) else _trimmed(data.remove_tags),
    )
    changes_more = wanted != Change(add_tags=[], remove_tags=[])
    if isinstance(data.deleted, UnsetType) and not changes_more:
        raise BadInput(NO_CHANGE + "pinned, archived, deleted, add_tags and remove_tags")
    ids = data.conversation_ids
    if data.deleted is True:
        if changes_more:
            raise BadInput("deleted: nothing else changes about conversations that are deleted")
        deletion = await parts.cancellations.delete_conversations(owner_id, ids)
        return ConversationsChanged(ok=True, changed=deletion.public_ids, cancelled=len(deletion.cancelled))
    changed = ids if isinstance(data.deleted, UnsetType) else await restore(parts, owner_id, ids)
    if changes_more:
        now = datetime.now(UTC)
        changed = await parts.database.write(conversation_changes.change, owner_id, changed, wanted, now)
    return ConversationsChanged(ok=True, changed=changed, cancelled=0)


async def restore(parts: Parts, owner_id: int, public_ids: list[str]) -> list[str]:
    """The ids of those that are readable now. Raises ConversationExists, StorageUnavailable."""
    since = datetime.now(UTC) - parts.restorable
    return await parts.database.write(conversation_changes.restore, owner_id, public_ids, since)


async def exported(request: AppRequest, conversation_id: str) -> ConversationExport:
    """Raises NotFound."""
    found = await request.parts.database.read(transfer.export, request.principal.user_id, conversation_id)
    if found is None:
        raise NotFound("Conversation not found")
    return found


async def import_conversation(
    parts: Parts, owner_id: int, given: ConversationExport, key: Key | None = None
) -> Imported:
    """Raises BadInput, KeyReused, StorageUnavailable; nothing is stored then."""

    def make(connection: Connection, now: datetime) -> Imported:
        made = transfer.make(connection, owner_id, given, now)
        return Imported(ok=True, conversation_id=made.public_id, n_turns=made.n_turns, n_left_out=made.n_left_out)

    def make_once(connection: Connection, now: datetime) -> Imported:
        return keys.answer_once(connection, key, now, Imported, lambda: make(connection, now))

    return await parts.database.write(make_once, datetime.now(UTC))


async def _change(request: AppRequest, public_id: str, data: ConversationChange) -> ConversationBrief:
    wanted = Change(
        title=UNSET if isinstance(data.title, UnsetType) else (data.title or "").strip(),
        is_pinned=_or_none(data.pinned),
        is_archived=_or_none(data.archived),
        tags=None if isinstance(data.tags, UnsetType) else _trimmed(data.tags),
    )
    if wanted == Change():
        raise BadInput(NO_CHANGE + "title, pinned, archived and tags")
    now = datetime.now(UTC)
    await request.parts.database.write(conversation_changes.change, request.principal.user_id, [public_id], wanted, now)
    return await _read(request, public_id)


async def _delete(request: AppRequest, public_id: str) -> ConversationsChanged:
    await request.takes_only()
    deletion = await request.parts.cancellations.delete_conversations(request.principal.user_id, [public_id])
    if not deletion.public_ids:
        raise NotFound("Conversation not found")
    return ConversationsChanged(ok=True, changed=deletion.public_ids, cancelled=len(deletion.cancelled))


async def _read(request: AppRequest, conversation_id: str) -> ConversationBrief:
    found = await request.parts.database.read(
        conversation_list.conversation, request.principal.user_id, conversation_id
    )
    if found is None:
        raise NotFound("Conversation not found")
    return _brief(found)


def _brief(listed: Listed) -> ConversationBrief:
    return ConversationBrief(
        conversation_id=listed.public_id,
        title=listed.title,
        first_prompt=listed.first_prompt,
        tags=list(listed.tags),
        pinned=listed.is_pinned,
        archived=listed.is_archived,
        source=listed.source,  # type: ignore[arg-type]
        n_turns=listed.n_turns,
        status=listed.status,  # type: ignore[arg-type]
        last_at=listed.last_at,
        found=None
        if listed.snippet is None
        else Found(text=listed.snippet.text, marks=[list(mark) for mark in listed.snippet.marks]),
    )


def _or_none(given: bool | UnsetType) -> bool | None:
    return None if isinstance(given, UnsetType) else given


def _trimmed(tags: list[str]) -> list[str]:
    return [tag.strip() for tag in tags]
