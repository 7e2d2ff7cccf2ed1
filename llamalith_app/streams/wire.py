"""The names and shapes that a job's events have in Redis.

Each job has a Redis stream `llamalith:events:{record}:{job}`. Its entries have the ids `{attempt}-{n}` with n = 1, 2,
3 …; an attempt that continues the text of an earlier one continues its numbers too. Each record has one channel. Every
entry of every job is published there as well, so that one subscription serves all readers. An entry's data is encoded
once, by the worker: the same bytes are in the stream, in the message, and in what the reader of a web process gets.
Knows no connection, no SQL, no HTTP and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec
from redis.exceptions import RedisError

from llamalith_app.contracts.events import ProgressEvent
from llamalith_app.contracts.jobs import Progress

UNAVAILABLE = (RedisError, OSError, TimeoutError)
"""What a call raises when Redis is away, refuses, or is too slow."""

TextKind = Literal["delta", "thinking", "restart"]

FIRST_ATTEMPT_FIELD = "since"
"""Its older name stays: a stream outlives an upgrade, and a web and a worker of two versions may share one Redis."""


class Entry(NamedTuple):
    """One event of an attempt."""

    attempt: int
    n: int
    """0: published only, not kept in the stream."""
    kind: str
    """`delta`, `thinking`, `restart`, `progress`; or `ended`: the job's end is in the record."""
    data: bytes
    """JSON on one line, as its reader gets it."""
    first_attempt: int
    """The attempt that began this text; most often `attempt` itself."""


class StreamMessage(NamedTuple):
    """An entry on the channel. One publish carries a list of them, encoded as msgpack."""

    job_id: int
    entry: Entry


encode_messages: Callable[[list[StreamMessage]], bytes] = msgspec.msgpack.Encoder().encode
decode_messages: Callable[[bytes], list[StreamMessage]] = msgspec.msgpack.Decoder(list[StreamMessage]).decode
"""Raises MsgspecError."""


def channel_name(record: str) -> str:
    # Channels are shared by all numbered databases of a Redis, so the record's name is part of it.
    return f"llamalith:events:{record}"


def stream_key(record: str, job_id: int) -> str:
    return f"{channel_name(record)}:{job_id}"


def entry_id(entry: Entry) -> str:
    return f"{entry.attempt}-{entry.n}"


def entry_fields(entry: Entry) -> dict[Any, Any]:
    """The fields of XADD."""
    fields: dict[Any, Any] = {entry.kind: entry.data}
    if entry.first_attempt != entry.attempt:
        fields[FIRST_ATTEMPT_FIELD] = entry.first_attempt
    return fields


def parse_entry(event_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    """An entry as XRANGE gives it. Raises ValueError for what is no entry of ours."""
    attempt, _, n = event_id.partition(b"-")
    first_attempt = fields.pop(FIRST_ATTEMPT_FIELD.encode(), attempt)
    ((kind, data),) = fields.items()
    return Entry(int(attempt), int(n), kind.decode(), data, int(first_attempt))


def progress_event(progress: Progress, job_id: int, attempt: int) -> ProgressEvent:
    return ProgressEvent(**msgspec.structs.asdict(progress), job_id=job_id, attempt=attempt)
