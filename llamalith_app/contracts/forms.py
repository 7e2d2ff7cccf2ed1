"""The fields that the pages' forms send. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llamalith_app.contracts.text import MAX_NAME, ConversationId, Name, Text

MAX_ONCE = 64
"""Characters of `JobForm.once`."""


class JobForm(msgspec.Struct, kw_only=True):
    """A prompt: from the dashboard, from a conversation, or stored while its author logs in."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    system_prompt_was: Text = ""
    """The system prompt that the form showed. Where `system_prompt` equals it, the one in force stays."""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""
    once: Annotated[str, Meta(max_length=MAX_ONCE)] = ""
    """Random, new in each form: sent twice, it makes one job. Empty: two submits make two jobs."""


SHORT_FIELDS = {"model": MAX_NAME, "conversation_id": MAX_NAME, "once": MAX_ONCE}
"""The short fields of a JobForm, each with its maximum number of characters."""


class LoginForm(msgspec.Struct, kw_only=True):
    """A password. The fields of a JobForm may come with it, unvalidated, where a session ended while it was typed."""

    password: str = ""
    next: str = ""
    """The path to go to after the login; ignored where it is none of Llamalith's."""


class LookForm(msgspec.Struct, kw_only=True):
    """How the pages look in this browser. What is absent stays as it is."""

    theme: Literal["light", "dark", "system"] | None = None
    sidebar: Literal["open", "closed"] | None = None
