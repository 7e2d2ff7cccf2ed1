"""A digest of what a path of turns says, so that a caller who sends a whole history is recognised.

Pure: owns how messages become a digest, and knows no table. A digest runs on: that of a longer history is made from
that of its beginning and the messages behind it. Stored digests stay valid only as long as this stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec

from llamalith_app.contracts.conversations import Message


def extend(digest: str | None, messages: Iterable[Message]) -> str:
    """The digest of what `digest` stands for with these messages behind it; None: nothing stands before them."""
    *_, last = _running(digest, messages)
    return last


def beginnings(messages: Sequence[Message]) -> list[tuple[int, str]]:
    """Where these messages may leave a path that is stored, longest first: the number of messages up to there, and
    their digest.

    A stored path ends with a reply, and what goes on from it does not begin with a system message: that would be in
    force for all of the path, and no longer stand where it was sent.
    """
    digests = list(_running(None, messages))
    return [
        (n, digests[n])
        for n in range(len(messages), 0, -1)
        if messages[n - 1].role == "assistant" and (n == len(messages) or messages[n].role != "system")
    ]


def _running(digest: str | None, messages: Iterable[Message]) -> Iterator[str]:
    """The digest of nothing, of the first message, of the first two, …"""
    return accumulate(messages, _behind, initial=digest or "")


def _behind(digest: str, message: Message) -> str:
    # Keys of tool calls in one order: the same call is the same, however its JSON was spelled.
    said = msgspec.json.encode(
        (message.role, message.content, message.tool_calls, message.tool_call_id), order="deterministic"
    )
    return hashlib.sha256(digest.encode() + b"\0" + said).hexdigest()
