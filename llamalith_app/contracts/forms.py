"""What the forms of the pages send. Fields that a form does not have are ignored."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from llamalith_app.contracts.text import ConversationId, Name, Text


class JobForm(msgspec.Struct, kw_only=True):
    """A prompt, from the dashboard, from a conversation, or kept over a login."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    system_prompt_was: Text = ""
    """As the form showed it first; sent back unchanged, the one in force stays, if there is one."""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""
    once: Annotated[str, Meta(max_length=64)] = ""
    """Drawn for each form that is shown: what is sent twice under it makes one job. Empty: it may make two."""


class LoginForm(msgspec.Struct, kw_only=True):
    """A password. Beside it may stand a JobForm whose session had ended: kept as it was typed, good or not."""

    password: str = ""
    next: str = ""
    """Where its visitor was going: a path of ours, else it means nothing."""
