"""A job's events as a page reads them: its reply in blocks of HTML. `ReplyBlocks` is pure; `chunks` tells it the time.

The events go in as a transcript has them, from the job's beginning; frames of Server-Sent Events come out. A reader
that resumes gets what it lacks: an id says, beside the newest event, how many finished blocks the reader has. A stream
holds the text of the open block, and no more of the reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable
from typing import NamedTuple

import msgspec

from llamalith_app.contracts.blocks import BlockEvent, EndEvent, MoreEvent, RestartEvent, ThinkingEvent
from llamalith_app.contracts.events import Delta, Thinking
from llamalith_app.web import sse
from llamalith_app.web.markdown_stream import INTERVAL_S, Block, BlockStream, More
from llamalith_app.web.transcript import MAX_BATCH, Cursor, JobEvent

LONG_CHARS = 4_000
"""So much new text is rendered in a thread of its own, beside what else this process does."""


class BlockCursor(NamedTuple):
    """What a reader has."""

    event: Cursor
    """Of n 0: some blocks of that attempt, and no event as a whole."""
    n_blocks: int


class ReplyBlocks:
    """One reader's stream of one job. `cursor` None: it has nothing. `before`: Markdown that begins the reply."""

    def __init__(self, job_id: int, cursor: BlockCursor | None, before: str = "") -> None:
        self._job_id = job_id
        self._resumes_at = cursor
        """Where the reader is, as long as that event has not come by."""
        self._had = cursor or BlockCursor(Cursor(0, 0), 0)
        """What the reader has."""
        self._restarts = False
        """What it has is to be discarded."""
        self._newest = self._had.event
        self._before = before
        self._has_text = False
        self._blocks = BlockStream()
        self._thinking: list[str] = []
        """What the reader has not got of it."""
        self._n_thinking = 0
        """How many characters it has."""
        self._progress: bytes | None = None
        self._end: str | None = None

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    @property
    def is_behind(self) -> bool:
        """There is text that `frames` kept back, because it was asked too early."""
        return self._blocks.has_new and not self.has_ended

    @property
    def is_long(self) -> bool:
        """The next frames take some time."""
        return self._blocks.n_unfinished > LONG_CHARS

    def add(self, event: JobEvent) -> None:
        if event.kind == "progress":
            self._progress = event.data
            return
        if self._resumes_at is not None and self._resumes_at.event == (event.attempt, 0):
            self._resumes_at = None
        if event.kind == "restart":
            self._blocks, self._thinking, self._n_thinking = BlockStream(), [], 0
            self._has_text = False
            self._restarts = True
        elif event.kind == "delta":
            if not self._has_text:
                self._blocks.add(self._before)
            self._has_text = True
            self._blocks.add(msgspec.json.decode(event.data, type=Delta).text)
        elif event.kind == "thinking":
            self._thinking.append(msgspec.json.decode(event.data, type=Thinking).text)
        else:
            self._end = event.kind
        self._newest = Cursor(event.attempt, event.n)
        if self._resumes_at is not None and self._resumes_at.event == self._newest:
            self._resumes_at, self._restarts = None, False
            self._n_thinking += sum(map(len, self._thinking))
            self._thinking = []

    def frames(self, now: float) -> bytes:
        """What the reader lacks of the events so far. Of the reply it may lack some still: see `is_behind`."""
        if self._resumes_at is not None:
            # Its event is not among those of this job any more.
            self._resumes_at, self._restarts = None, True
        out: list[tuple[str, bytes, int]] = []
        """Each with the finished blocks that the reader has behind it."""
        n_blocks = self._had.n_blocks
        if self._restarts:
            self._restarts, n_blocks = False, 0
            self._had = BlockCursor(Cursor(0, 0), 0)
            out.append(("restart", self._encoded(RestartEvent), n_blocks))
        if self._thinking:
            text = "".join(self._thinking)
            out.append(("thinking", self._encoded(ThinkingEvent, offset=self._n_thinking, text=text), n_blocks))
            self._n_thinking += len(text)
            self._thinking = []
        for change in self._blocks.finish() if self.has_ended else self._blocks.update(now):
            if change.number < n_blocks:
                continue
            if isinstance(change, More):
                out.append(("more", self._encoded(MoreEvent, block=change.number, text=change.text), n_blocks))
                continue
            n_blocks += change.finished
            out.append(("block", self._encoded_block(change), n_blocks))
        if self._end is not None:
            out.append((self._end, self._encoded(EndEvent), n_blocks))
        framed = [self._frame(kind, data, n, is_last=False) for kind, data, n in out[:-1]]
        if out:
            self._had = BlockCursor(self._newest, n_blocks)
            framed.append(self._frame(*out[-1]))
        if self._progress is not None:
            framed.insert(0, b"event: progress\ndata: %b\n\n" % self._progress)
            self._progress = None
        return b"".join(framed)

    def _encoded_block(self, block: Block) -> bytes:
        return self._encoded(
            BlockEvent, block=block.number, within=block.within, html=block.html, finished=block.finished
        )

    def _encoded(self, event: type[msgspec.Struct], **fields: object) -> bytes:
        return msgspec.json.encode(event(job=self._job_id, attempt=self._newest.attempt, **fields))

    def _frame(self, kind: str, data: bytes, n_blocks: int, *, is_last: bool = True) -> bytes:
        """Behind the last frame the reader has all events; behind each other one, only more blocks."""
        attempt, n = self._newest if is_last else self._had.event
        attempt = attempt if n else self._newest.attempt
        event_id = b"%d.%d-%d.%d" % (self._job_id, attempt, n, n_blocks)
        return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id, kind.encode(), data)


async def chunks(batches: AsyncIterable[list[JobEvent]], reply: ReplyBlocks) -> sse.Chunks:
    """The frames of the events in `batches`, every INTERVAL_S at most; a heartbeat for an empty batch."""
    async for batch in batches:
        for event in batch:
            reply.add(event)
        if len(batch) >= MAX_BATCH and not reply.has_ended:
            # More of the past follows at once.
            continue
        while True:
            now = time.monotonic()
            frames = await asyncio.to_thread(reply.frames, now) if reply.is_long else reply.frames(now)
            if frames or not batch:
                yield frames or sse.HEARTBEAT
            if not reply.is_behind:
                break
            await asyncio.sleep(INTERVAL_S)
