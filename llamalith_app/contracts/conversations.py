"""The answers about a conversation."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from llamalith_app.contracts.jobs import Job, StatusWord, TurnId
from llamalith_app.contracts.text import ConversationId


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    """In an assistant's message: the tool calls that it asks for. Absent: none."""
    tool_call_id: str | None = None
    """In a tool's message: the id of the call that it answers. Absent: it is no tool's message."""
    thinking: str | None = None
    """What the model thought before this reply; no later prompt reads it. Absent: nothing, or nothing was kept."""
    thinking_s: float | None = None
    """Seconds that it thought. Absent: not known."""


class ConversationAnswer(msgspec.Struct, kw_only=True):
    """The conversation that an answer is about."""

    conversation_id: str
    exists: bool
    """False: nothing was sent under this id, or all of it has expired."""


class MessageList(ConversationAnswer, kw_only=True):
    messages: list[Message]
    """In the order of the turns: each prompt is followed by its reply once that exists."""


class Latest(ConversationAnswer, kw_only=True):
    last_user: Message | None
    last_assistant: Message | None
    last_job: Job | None


class TreeTurn(msgspec.Struct, kw_only=True):
    """One turn without its whole texts, which are cut to their first 300 characters."""

    id: int
    parent: int | None
    """The turn that it continues; null: it begins anew, or all before it has expired."""
    depth: int
    """Its number on its path, 0 for the first. Numbers of deleted turns are missing."""
    conversation_id: str
    """Another conversation's where this one was forked: its turns up to there are part of this tree."""
    created_at: datetime
    job_id: int | None
    """Null: it holds only a system prompt, or nothing, or its job has expired."""
    model: str | None
    status: StatusWord | None
    """Its job's."""
    system_prompt: str | None
    """The one that begins here; null: none does."""
    prompt: str | None
    reply: str | None


class TurnTree(msgspec.Struct, kw_only=True):
    conversation_id: str
    head: int
    """The turn that the next prompt continues; `/messages` and `/latest` read the path to it."""
    turns: list[TreeTurn]
    """Oldest first, so a parent stands before its children."""
    more: bool
    """There are more turns: continue with `after` set to the last id."""


class TurnChoice(msgspec.Struct, kw_only=True):
    turn_id: TurnId
    """A turn of the conversation's tree."""


class ForkCreate(msgspec.Struct, kw_only=True):
    turn_id: TurnId
    """The last turn that the fork shares: one of the conversation, or of the path to its head."""
    conversation_id: Annotated[ConversationId, Meta(description="The id of the fork; absent or empty: a UUID.")] = ""


class Head(msgspec.Struct, kw_only=True):
    """Where a conversation stands now."""

    ok: bool
    conversation_id: str
    head: int
    """The turn that the next prompt continues; `/messages` and `/latest` read the path to it."""


class LegacyStatus(ConversationAnswer, kw_only=True):
    response: str | None
    """The reply to the newest prompt; null until it is there."""
