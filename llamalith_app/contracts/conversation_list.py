"""Lists of conversations, and what people change about one or many."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llamalith_app.contracts.jobs import StatusWord
from llamalith_app.contracts.text import AN_ID, CONTROL_FREE, MAX_NAME, NOT_BLANK

SourceWord = Literal["page", "api", "legacy", "import", "v1"]
ConversationStatusWord = Literal["processing", "queued", "error"]
"""A reply is being written, it waits for one, or the last one failed."""
ArchivedWord = Literal["false", "true", "any"]
MAX_AT_ONCE = 100
"""Conversations in one list, or in one request that changes several."""
MAX_TAGS = 20
MAX_TAG = 50

Title = Annotated[
    str,
    Meta(
        max_length=MAX_NAME,
        pattern=CONTROL_FREE,
        description=f"At most {MAX_NAME} characters on one line. Empty: none, so that lists show the first words of the"
        " prompt.",
    ),
]
Tag = Annotated[
    str,
    Meta(
        title=f"1 to {MAX_TAG} characters that are not all blank, without control characters",
        min_length=1,
        max_length=MAX_TAG,
        pattern=NOT_BLANK + CONTROL_FREE[1:],
        description=f"1 to {MAX_TAG} characters without control characters; blanks before and after them do not count.",
    ),
]
Tags = Annotated[list[Tag], Meta(max_length=MAX_TAGS)]
KnownId = Annotated[str, Meta(title=AN_ID, min_length=1, max_length=MAX_NAME, pattern=CONTROL_FREE)]


class Found(msgspec.Struct, kw_only=True):
    """The part of a message in which something was found, on one line."""

    text: str
    marks: list[Annotated[list[int], Meta(min_length=2, max_length=2)]]
    """Where in `text` the words stand: from, and the end after it, in characters (code points)."""


class ConversationBrief(msgspec.Struct, kw_only=True):
    """A conversation without its messages."""

    conversation_id: str
    title: str | None
    """Null: none yet."""
    first_prompt: str | None
    """The beginning of its first prompt; null: no prompt yet."""
    tags: list[str]
    """In alphabetical order."""
    pinned: bool
    archived: bool
    source: SourceWord | None
    """Where it was made; null: by an earlier version."""
    n_turns: int
    status: StatusWord | None
    """Of its first open job, or else of its newest; null: it has no job."""
    last_at: datetime
    """When its newest job ended, else was accepted."""
    found: Found | None = None
    """Null: nothing was searched for, or it stands in the title alone."""


class ConversationBriefs(msgspec.Struct, kw_only=True):
    conversations: list[ConversationBrief]
    """Those with the newest turns first."""
    next: int | None
    """The `before` of the next page; null: this is the last one."""


class ConversationChange(msgspec.Struct, kw_only=True):
    """What is to change about a conversation; what is absent stays."""

    title: Title | UnsetType | None = UNSET
    """Null or empty: none."""
    pinned: bool | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    """All of its tags from now on."""


class ConversationsChange(msgspec.Struct, kw_only=True):
    """What is to change about several conversations; what is absent stays."""

    conversation_ids: Annotated[list[KnownId], Meta(min_length=1, max_length=MAX_AT_ONCE)]
    pinned: bool | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    deleted: bool | UnsetType = UNSET
    """True: as DELETE. False: as restore, before anything else changes."""
    add_tags: Tags | UnsetType = UNSET
    remove_tags: Tags | UnsetType = UNSET


class ConversationsChanged(msgspec.Struct, kw_only=True):
    ok: bool
    changed: list[str]
    """The ids of the conversations that were changed; the others are not there."""
    cancelled: int
    """The number of jobs that were cancelled."""
