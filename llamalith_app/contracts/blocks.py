"""The data of the events that pages read. Each docstring begins with the event's name.

A job's last event is `done`, `error` or `cancelled`, with an End. `progress` is that of `contracts/events.py`.
"""

from __future__ import annotations

import msgspec


class BlockEvent(msgspec.Struct, kw_only=True):
    """`block`: a block of the reply as it is now. It replaces the job's block of that number and all behind it."""

    job: int
    attempt: int
    block: int
    """Counted from 0."""
    within: str
    """`list`: an item of the newest list. `rows`: a row of the newest table. Empty: behind the other blocks."""
    html: str
    """Clean: may be put into the page."""
    finished: bool
    """It will not change, unless the job restarts."""


class MoreEvent(msgspec.Struct, kw_only=True):
    """`more`: text at the end of the job's newest block. Not HTML."""

    job: int
    attempt: int
    block: int
    text: str


class ThinkingEvent(msgspec.Struct, kw_only=True):
    """`thinking`: more of what is no part of the reply. Not HTML."""

    job: int
    attempt: int
    offset: int
    """How many characters (code points) of it come before."""
    text: str


class RestartEvent(msgspec.Struct, kw_only=True):
    """`restart`: discard the job's blocks and thinking. All of it follows, from the beginning."""

    job: int
    attempt: int


class EndEvent(msgspec.Struct, kw_only=True):
    """`done`, `error` or `cancelled`: all blocks have been sent. The page asks for the rest."""

    job: int
    attempt: int


class ChatsEvent(msgspec.Struct):
    """`chats`: the list of chats in the sidebar as it is now."""

    version: str
    """Of what it shows; a browser that has it need not get it again."""
    at: int
    """When it was read, in milliseconds since 1970. A page that was made later shows what is newer."""
    html: str
    """Clean: may be put into the page."""
