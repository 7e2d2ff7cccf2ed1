"""The state of one attempt while it runs: what it wrote, how far it is, and whether it is to stop.

Does nothing by itself: `attempt.py` runs it. Knows no database, no Redis and no SAQ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from enum import Enum, auto
from typing import TypeVar

from llamalith_app.contracts.jobs import Progress
from llamalith_app.engine.messages import Advance
from llamalith_app.engine.reasoning import Family
from llamalith_app.engine.reply import Piece, Reply
from llamalith_app.jobs.worker.speeds import Measure
from llamalith_app.store.jobs.transitions import UNKNOWN_TIMES, Claim, PartialReply
from llamalith_app.streams.resume import ResumePoint

T = TypeVar("T")


class StopReason(Enum):
    """Why an attempt is stopped before its reply is whole."""

    LEASE_LOST = auto()
    """The job was cancelled, or another worker took the lease away."""
    DRAIN = auto()
    """The worker is ending."""
    TIMEOUT = auto()
    """The attempt ran longer than its job allows."""


class RunningAttempt:
    """One attempt that this worker is making."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.family: Family | None = None
        """Of the thinking with which the reply may begin."""
        self.marker_tokens: Collection[str] = ()
        """The family's markers that are tokens of the model's vocabulary."""
        self.reply = Reply()
        """What the attempt wrote so far."""
        self.resume_point: ResumePoint | None = None
        """What earlier attempts wrote, behind which this one is to go on."""
        self.last_step: Advance | None = None
        self.completion_tokens = 0
        self.stop_reason: StopReason | None = None
        """Set once, by `stop`."""
        self._interrupt: Callable[[], object] | None = None
        """Ends what the attempt waits for: the model, the engine's next step, or the validation of its reply."""
        self.answers_now = False
        """A person waits for the reply: the thinking is to be closed."""
        self._close_thinking: Callable[[], object] | None = None
        """Asks the engine to do so."""
        self._started_at = time.monotonic()
        self._submitted_at = 0.0
        self._decode_started_at = 0.0
        self._n_first = 0
        """Tokens that came together with the first one."""
        self._text_started_at: float | None = None
        """When the reply began behind the thinking, if there was any."""
        self._n_before_text = 0
        """Tokens before the step with which the reply began."""
        self.times = UNKNOWN_TIMES
        """How far it came."""

    @property
    def progress(self) -> Progress:
        step = self.last_step
        if step is None:
            return Progress(phase="loading")
        is_decoding = self.completion_tokens > 0
        if is_decoding:
            n_tokens, since = self.completion_tokens - self._n_first, self._decode_started_at
        else:
            # Tokens that were reused, and the time of loading, say nothing of the speed of reading.
            n_tokens, since = step.prompt_done - step.prompt_reused, self._submitted_at
        seconds = time.monotonic() - since
        return Progress(
            phase="decode" if is_decoding else "prefill",
            prompt_tokens=step.prompt_tokens,
            prompt_tokens_done=step.prompt_done,
            completion_tokens=self.completion_tokens,
            tokens_per_s=round(n_tokens / seconds, 2) if n_tokens and seconds > 0 else None,
        )

    def stop(self, reason: StopReason) -> None:
        """Ends the attempt within one step of the engine. The first reason counts."""
        if self.stop_reason is not None:
            return
        self.stop_reason = reason
        if self._interrupt is not None:
            self._interrupt()

    async def unless_stopped(self, waiting: asyncio.Future[T]) -> T | None:
        """What `waiting` comes to; None: the attempt was stopped first, and `waiting` is cancelled."""
        self._interrupt = waiting.cancel
        if self.stop_reason is not None:
            waiting.cancel()
        try:
            return await waiting
        except asyncio.CancelledError:
            if self.stop_reason is None:
                raise
            return None

    def loaded(self) -> None:
        """Its model is ready."""
        self.times = self.times._replace(loaded_at=datetime.now(UTC))

    def submitted(self, cancel: Callable[[], object], close_thinking: Callable[[], object]) -> None:
        """The engine has the request now; `cancel` ends its sequence, `close_thinking` its thinking."""
        self._submitted_at = time.monotonic()
        self._interrupt = cancel
        self._close_thinking = close_thinking

    def answer_now(self) -> None:
        """Closes the thinking. May be called again: what came too early for the engine was nothing."""
        self.answers_now = True
        if self._close_thinking is not None and self._text_started_at is None:
            self._close_thinking()

    def take(self, step: Advance) -> list[Piece]:
        """Adds what a step of the engine did; returns the text that is certain by now."""
        if self.last_step is None:
            self.reply = Reply(self.family, tokens=self.marker_tokens, is_opened=step.opens_thinking)
        self.last_step = step
        if self.times.prompt_read_at is None and 0 < step.prompt_tokens <= step.prompt_done:
            self.times = self.times._replace(prompt_read_at=datetime.now(UTC))
        n_before = self.completion_tokens
        if step.tokens:
            if not self.completion_tokens:
                self._decode_started_at, self._n_first = time.monotonic(), len(step.tokens)
                self.times = self.times._replace(first_token_at=datetime.now(UTC))
            self.completion_tokens += len(step.tokens)
        pieces = self.reply.feed(step.text, step.markers)
        if self._text_started_at is None and any(piece.kind == "delta" for piece in pieces):
            self._text_started_at, self._n_before_text = time.monotonic(), n_before
        return pieces

    def restart(self) -> None:
        """The reply restarts from its beginning."""
        self.resume_point = None
        self.reply, self.last_step, self.completion_tokens = Reply(), None, 0
        self._text_started_at = None
        self.times = self.times._replace(prompt_read_at=None, first_token_at=None)

    @property
    def thinking_s(self) -> float | None:
        """How long the model thought. None: it did not, or in an earlier attempt."""
        if not self.reply.thinking or self.resume_point is not None:
            return None
        return round((self._text_started_at or time.monotonic()) - self._decode_started_at, 3)

    @property
    def thinking_tokens(self) -> int | None:
        """How many tokens the model thought, its markers included. None: not known, since an earlier attempt thought,
        too."""
        if not self.reply.thinking:
            return 0
        if self.resume_point is not None:
            return None
        return self.completion_tokens if self._text_started_at is None else self._n_before_text

    def elapsed_s(self) -> float:
        """Since the claim."""
        return time.monotonic() - self._started_at

    def written(self) -> PartialReply:
        """What there is of the reply, as it would be kept."""
        prompt_tokens = None if self.last_step is None else self.last_step.prompt_tokens
        if self.resume_point is not None and not self.completion_tokens:
            # It still reads the prompt, and what was written behind it.
            point = self.resume_point
            return PartialReply(point.text, prompt_tokens, len(point.tokens), point.thinking)
        return PartialReply(str(self.reply), prompt_tokens, self.completion_tokens, self.reply.thinking)

    def measures(self) -> dict[Measure, float]:
        """What a whole reply says of its model's speed."""
        now = time.monotonic()
        found: dict[Measure, float] = {"job_s": now - self._submitted_at}
        if not self.completion_tokens:
            return found
        found["completion_tokens"] = self.completion_tokens
        if self.completion_tokens > 1:
            found["tokens_per_s"] = (self.completion_tokens - 1) / max(now - self._decode_started_at, 1e-6)
        n_read = self.last_step.prompt_tokens - self.last_step.prompt_reused if self.last_step else 0
        if n_read > 0:
            found["prompt_tokens_per_s"] = n_read / max(self._decode_started_at - self._submitted_at, 1e-6)
        return found
