"""What clients read of a conversation."""

from __future__ import annotations

from typing import Any

import msgspec

from llamalith_app.contracts.jobs import Job


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    """Of the assistant's: the tools that it asks to be called. Absent: none."""
    tool_call_id: str | None = None
    """Of a tool's: the call that this is the result of. Absent: it is no tool's."""


class Named(msgspec.Struct, kw_only=True):
    """The conversation that an answer is about."""

    conversation_id: str
    exists: bool
    """False: nothing was ever sent under this id, or all of it has expired."""


class MessageList(Named, kw_only=True):
    messages: list[Message]
    """In the order of the turns: each prompt is followed by its reply once that exists."""


class Latest(Named, kw_only=True):
    last_user: Message | None
    last_assistant: Message | None
    last_job: Job | None


class LegacyStatus(Named, kw_only=True):
    response: str | None
    """The reply to the newest prompt; null until it is there."""
