"""A conversation in a file: what an export writes as JSON and an import reads."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.conversation_list import Tags, Title
from llamalith_app.contracts.text import NUL_FREE

MAX_TURNS = 2000
"""They are stored in one transaction, about a second, in which nothing else is."""
MAX_MESSAGES = 1000
"""Of one turn."""

Moment = Annotated[datetime, Meta(tz=True, title="a date and time with its zone, such as 2026-11-30T09:15:02Z")]
# As long as it may be: the request's own limit bounds it.
FileText = Annotated[str, Meta(pattern=NUL_FREE)]


class ExportedMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: FileText
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: FileText | None = None
    is_reply: bool = False
    """Whether the turn's job wrote it; an import does not need it."""
    thinking: FileText | None = None
    """What the model thought before an assistant's message; no prompt reads it. An import ignores that of others."""
    thinking_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Seconds that it thought; absent: not known."""


class ExportedTurn(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A prompt with what stands before it, and its reply."""

    id: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    """Unique in the file."""
    parent: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None
    """The turn that it continues, which stands before it in the file; null: it is a first one. Turns with the same
    parent are branches."""
    messages: Annotated[list[ExportedMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    created_at: Moment | None = None
    model: str | None = None
    status: str | None = None
    """Of its job; absent: it has none."""


class ConversationExport(msgspec.Struct, kw_only=True, omit_defaults=True):
    format: Literal["llamalith-conversation-1"]
    conversation_id: str | None = None
    """An import does not use it: the new conversation gets an id of its own."""
    title: Title | None = None
    tags: Tags = []
    created_at: Moment | None = None
    head: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """The last turn of the branch that people see; absent: the last in the file."""
    turns: Annotated[list[ExportedTurn], Meta(min_length=1, max_length=MAX_TURNS)]


class Imported(msgspec.Struct, kw_only=True):
    ok: bool
    conversation_id: str
    n_turns: int
    """The turns that were stored."""
    n_left_out: int
    """The turns without a reply, which later prompts would not have read either."""
