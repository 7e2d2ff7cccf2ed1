"""What the forms of the pages send. Fields that a form does not have are ignored."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from llamalith_app.contracts.text import MAX_NAME, ConversationId, Name, Text

MAX_ONCE = 64


class JobForm(msgspec.Struct, kw_only=True):
    """A prompt, from the dashboard, from a conversation, or kept over a login."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    system_prompt_was: Text = ""
    """As the form showed it first; sent back unchanged, the one in force stays, if there is one."""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""
    once: Annotated[str, Meta(max_length=MAX_ONCE)] = ""
    """Drawn for each form that is shown: what is sent twice under it makes one job. Empty: it may make two."""


SHORT_FIELDS = {"model": MAX_NAME, "conversation_id": MAX_NAME, "once": MAX_ONCE}
"""Of a JobForm, with the most characters of each."""


class LoginForm(msgspec.Struct, kw_only=True):
    """A password. Beside it may stand a JobForm whose session had ended: kept as it was typed, good or not."""

    password: str = ""
    next: str = ""
    """Where its visitor was going: a path of ours, else it means nothing."""
