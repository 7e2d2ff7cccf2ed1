"""What the forms of the pages send. Fields that a form does not have are ignored."""

from __future__ import annotations

import msgspec

from llamalith_app.contracts.text import ConversationId, Name, Text


class JobForm(msgspec.Struct, kw_only=True):
    """A prompt, from the dashboard, from a conversation, or kept over a login."""

    content: Text = ""
    model: Name = ""
    system_prompt: Text = ""
    conversation_id: ConversationId = ""
    """Empty: a new conversation."""


class LoginForm(JobForm, kw_only=True):
    """A password, and what was typed into a form whose session had ended."""

    password: str = ""
    next: str = ""
    """Where its visitor was going: a path of ours, else it means nothing."""
