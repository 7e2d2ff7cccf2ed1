"""The fields that the pages' forms send. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.conversation_list import MAX_TAG, Title
from llamalith_app.contracts.text import CONTROL_FREE, END, MAX_NAME, ConversationId, Name, Text

MAX_ONCE = 64
"""Characters of `JobForm.once`."""
MAX_ID_DIGITS = 18

Once = Annotated[
    str,
    Meta(
        max_length=MAX_ONCE,
        description="Random, new in each form: sent twice, it makes one job. Empty: two submits make two jobs.",
    ),
]
OptionalTurn = Annotated[
    str, Meta(title="the id of a turn, or nothing", max_length=MAX_ID_DIGITS, pattern=rf"^(?:[1-9][0-9]*)?{END}")
]


class JobForm(msgspec.Struct, kw_only=True):
    """A prompt: from the dashboard, from a conversation, or stored while its author logs in."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    system_prompt_was: Text = ""
    """The system prompt that the form showed. Where `system_prompt` equals it, the one in force stays."""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""
    once: Once = ""
    seen: OptionalTurn = ""
    """The last turn that the page showed: the prompt continues the branch through it. Empty: the head's."""
    beside: OptionalTurn = ""
    """The turn whose prompt this one edits: it becomes its sibling. Empty: none."""


class RegenerateForm(msgspec.Struct, kw_only=True):
    """Another reply to the prompt of a job."""

    conversation_id: ConversationId = ""
    """The conversation that shows it; empty: the job's own."""
    model: Name = ""
    """Empty: the job's."""
    once: Once = ""


class TurnForm(msgspec.Struct, kw_only=True):
    """What is to happen with a turn of a conversation."""

    conversation_id: ConversationId
    turn_id: Annotated[str, Meta(max_length=MAX_ID_DIGITS, pattern=rf"^[1-9][0-9]*{END}")]


class PromptForm(msgspec.Struct, kw_only=True):
    """The new text of a prompt that waits."""

    content: Text


SHORT_FIELDS = {
    "model": MAX_NAME,
    "conversation_id": MAX_NAME,
    "once": MAX_ONCE,
    "seen": MAX_ID_DIGITS,
    "beside": MAX_ID_DIGITS,
}
"""The short fields of a JobForm, each with its maximum number of characters."""


class ConversationsForm(msgspec.Struct, kw_only=True):
    """What is to become of the conversations whose ids the field `id` has, once for each."""

    action: Literal["rename", "pin", "unpin", "archive", "unarchive", "tag", "untag", "delete", "undo"]
    title: Title = ""
    """Of `rename`. Empty: none."""
    tag: Annotated[str, Meta(max_length=MAX_TAG, pattern=CONTROL_FREE)] = ""
    """Of `tag` and `untag`."""
    deleted: Annotated[str, Meta(pattern="^[0-9]{1,17}$")] = "0"
    """Of `undo`: when they were deleted, in microseconds since 1970."""


class LoginForm(msgspec.Struct, kw_only=True):
    """A password. The fields of a JobForm may come with it, unvalidated, where a session ended while it was typed."""

    password: str = ""
    next: str = ""
    """The path to go to after the login; ignored where it is none of Llamalith's."""
