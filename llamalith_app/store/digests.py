"""Digests of message histories, so that a stored path is found by the history that a caller sends.

Pure: owns how messages become a digest, and knows no table. Digests are chained: the digest of a longer history is
computed from the digest of its prefix and the messages after it. Digests are stored, so a change here needs a
migration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec

from llamalith_app.contracts.conversations import Message


def extend(digest: str | None, messages: Iterable[Message]) -> str:
    """The digest of the history that `digest` stands for, followed by these messages. None: an empty history."""
    *_, last = _digests_of_prefixes(digest, messages)
    return last


def prefix_digests(messages: Sequence[Message]) -> list[tuple[int, str]]:
    """The prefixes of these messages that a stored path may equal, longest first: (number of messages, digest). None of
    them counts a system message at the beginning: see `turns.longest_stored_prefix`.

    A stored path ends with a reply. A system message cannot come right after it: it would be in force for the whole
    path, and no longer stand where it was sent.
    """
    digests = list(_digests_of_prefixes(None, messages))
    return [
        (n, digests[n])
        for n in range(len(messages), 0, -1)
        if messages[n - 1].role == "assistant" and (n == len(messages) or messages[n].role != "system")
    ]


def _digests_of_prefixes(digest: str | None, messages: Iterable[Message]) -> Iterator[str]:
    """The digests of no message, of the first message, of the first two, …"""
    return accumulate(messages, _extend_by_one, initial=digest or "")


def _extend_by_one(digest: str, message: Message) -> str:
    # Sorted keys: the digest of a tool call does not depend on the order in which its JSON was sent.
    encoded = msgspec.json.encode(
        (message.role, message.content, message.tool_calls, message.tool_call_id), order="deterministic"
    )
    return hashlib.sha256(digest.encode() + b"\0" + encoded).hexdigest()
