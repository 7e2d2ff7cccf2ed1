"""What earlier attempts at a job have published, and from where on a later attempt continues it.

Owns the text of a reply as chunks of one kind, and how the chunks of two attempts are compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import structlog

from llamalith_app.streams import wire
from llamalith_app.streams.subscriber import history
from llamalith_app.streams.wire import UNAVAILABLE, Entry, TextKind

RESUME_TIMEOUT_S = 2.0
"""How long an attempt waits for what Redis holds of earlier ones. Its Redis client must wait for so long too."""

log = structlog.get_logger(__name__)


class TextChunk(NamedTuple):
    """Text of one kind in a row, with its tokens."""

    kind: TextKind
    texts: list[str]
    tokens: list[int]

    @property
    def piece(self) -> tuple[TextKind, str]:
        return self.kind, "".join(self.texts)

    def copy(self) -> TextChunk:
        return TextChunk(self.kind, list(self.texts), list(self.tokens))


class ResumePoint(NamedTuple):
    """What Redis holds of a reply that earlier attempts wrote."""

    first_attempt: int
    """The attempt that began the text."""
    n: int
    """Of the last entry."""
    n_entries: int
    chunks: list[TextChunk]

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def text(self) -> str:
        """The reply, without thinking."""
        return self._joined("delta")

    @property
    def thinking(self) -> str:
        return self._joined("thinking")

    def _joined(self, kind: TextKind) -> str:
        return "".join(chunk.piece[1] for chunk in self.chunks if chunk.kind == kind)


async def resume_point(redis: Any, record: str, job_id: int, attempt: int, timeout_s: float) -> ResumePoint | None:
    """What earlier attempts have published of the reply; they can add nothing to the stream from now on. None: there is
    nothing, some of it is missing or unreadable, or Redis gave no answer in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await redis.execute_command("XSETID", wire.stream_key(record, job_id), f"{attempt}-0")
            return _from_entries(await history(redis, record, job_id))
    except UNAVAILABLE:
        return None
    except (ValueError, msgspec.MsgspecError) as error:
        log.warning("a stream's entry has an unknown form; is every process of one version?", reason=str(error))
        return None


def append_text(chunks: list[TextChunk], kind: TextKind, text: str, tokens: Sequence[int]) -> None:
    """Adds the text to the last chunk where that has the same kind. A restart is always a chunk of its own."""
    if chunks and chunks[-1].kind == kind != "restart":
        chunks[-1].texts.append(text)
        chunks[-1].tokens.extend(tokens)
    else:
        chunks.append(TextChunk(kind, [text], list(tokens)))


def text_beyond(
    published: list[TextChunk], pieces: Sequence[tuple[TextKind, str]]
) -> list[tuple[TextKind, str]] | None:
    """The rest of the pieces behind the text that is published. None: their text does not begin with that."""
    before, again = _runs(chunk.piece for chunk in published), _runs(pieces)
    if not before:
        return again
    *whole, (kind, text) = before
    n_whole = len(whole)
    if again[:n_whole] != whole or len(again) <= n_whole:
        return None
    kind_again, text_again = again[n_whole]
    if kind_again != kind or not text_again.startswith(text):
        return None
    rest = text_again[len(text) :]
    return [*([(kind, rest)] if rest else []), *again[n_whole + 1 :]]


def _runs(pieces: Iterable[tuple[TextKind, str]]) -> list[tuple[TextKind, str]]:
    """Texts of one kind in a row become one."""
    runs: list[TextChunk] = []
    for kind, text in pieces:
        if text:
            append_text(runs, kind, text, [])
    return [run.piece for run in runs]


def _from_entries(entries: list[Entry]) -> ResumePoint | None:
    """None: there is no entry, or one is missing."""
    entries = [entry for entry in entries if entry.first_attempt == entries[-1].first_attempt]
    begins = max((at for at, entry in enumerate(entries) if entry.n == 1 or entry.kind == "restart"), default=None)
    if begins is None:
        return None
    last = entries[begins:]
    if [entry.n for entry in last] != list(range(last[0].n, last[-1].n + 1)):
        return None
    chunks: list[TextChunk] = []
    for entry in last:
        if entry.kind != "restart":
            event = msgspec.json.decode(entry.data, type=_TextEvent)
            append_text(chunks, cast(TextKind, entry.kind), event.text, event.tokens)
    return ResumePoint(last[0].first_attempt, last[-1].n, len(entries), chunks)


class _TextEvent(msgspec.Struct):
    """What `delta` and `thinking` have in common."""

    text: str
    tokens: list[int]
