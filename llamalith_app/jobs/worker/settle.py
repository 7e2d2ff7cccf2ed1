"""What came of an attempt, and how the record keeps it: the end of the attempt's lease.

Knows the record. Knows no engine and no Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import structlog

from llamalith_app.engine.messages import FinishReason
from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs import order
from llamalith_app.jobs.schemas import Fit
from llamalith_app.jobs.worker.running import RunningAttempt, StopReason
from llamalith_app.jobs.worker.speeds import Speeds
from llamalith_app.store import turns
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from llamalith_app.store.tables import Outcome, Status

T = TypeVar("T")
RETRY_S = 1.0
"""Between tries to write to a database that takes no writes."""

log = structlog.get_logger(__name__)


class Replied(NamedTuple):
    """A whole reply."""

    to: turns.ReplyTo
    text: str
    thinking: str
    """Empty: none."""
    thinking_s: float | None
    """Seconds; None: not known."""
    thinking_tokens: int | None
    """As `thinking_s`."""
    finish_reason: FinishReason
    prompt_tokens: int
    prompt_tokens_reused: int
    completion_tokens: int
    omitted_messages: int
    fit: Fit
    load_s: float
    """Seconds that the model's load took, whenever that was."""
    is_resumed: bool
    """It goes on behind what an earlier attempt wrote, so that its times say nothing of the model's speed."""


class Failed(NamedTuple):
    kind: str
    reason: str
    """A sentence for people."""
    is_final: bool = False
    """Another attempt would fail as well."""


AttemptResult = Replied | Failed | StopReason


def gives_back(result: AttemptResult) -> bool:
    """True: the job may be queued again, and its next attempt may begin as soon as the record has this result."""
    return result is StopReason.DRAIN or (isinstance(result, Failed) and not result.is_final)


class Settler:
    """`wake_later` is called with how long from now a job will be due again; `speeds` learns from whole replies."""

    def __init__(self, database: Database, speeds: Speeds, wake_later: Callable[[timedelta], None]) -> None:
        self._database = database
        self._speeds = speeds
        self._wake_later = wake_later

    async def settle(self, running: RunningAttempt, result: AttemptResult) -> None:
        """Writes to the record what came of the attempt, which ends its lease."""
        claim = running.claim
        match result:
            case Replied():
                await self._finish(running, result)
            case Failed(kind, reason, is_final):
                pause = None if is_final else order.retry_backoff(claim.attempt)
                await self._fail(running, Outcome.FAILED, kind, reason, pause)
            case StopReason.TIMEOUT:
                reason = f"It ran for {running.elapsed_s():.1f} s; timeout_s allowed {claim.timeout_s:g}."
                await self._fail(running, Outcome.FAILED, transitions.TIMEOUT, reason, None)
            case StopReason.DRAIN:
                await self._fail(running, Outcome.RELEASED, "drained", "The worker was ending.", timedelta())
            case StopReason.LEASE_LOST:
                await self._keep_written(running)

    async def _finish(self, running: RunningAttempt, replied: Replied) -> None:
        claim = running.claim
        finish = partial(
            transitions.finish,
            reply_to=replied.to,
            reply=replied.text,
            thinking=replied.thinking,
            thinking_s=replied.thinking_s,
            thinking_tokens=replied.thinking_tokens,
            times=running.times,
            finish_reason=replied.finish_reason,
            prompt_tokens=replied.prompt_tokens,
            prompt_tokens_reused=replied.prompt_tokens_reused,
            completion_tokens=replied.completion_tokens,
            omitted_messages=replied.omitted_messages,
            reply_valid=replied.fit.is_valid,
            reply_problem=replied.fit.problem,
        )
        if not await self._write(running, finish):
            await self._keep_written(running)
            return
        self._learn(running, replied)
        log.info(
            "job done",
            job_id=claim.job_id,
            request_id=claim.request_id,
            model=claim.model,
            finish_reason=replied.finish_reason,
            prompt_tokens=replied.prompt_tokens,
            prompt_tokens_reused=replied.prompt_tokens_reused,
            completion_tokens=replied.completion_tokens,
            seconds=round(running.elapsed_s(), 3),
        )

    def _learn(self, running: RunningAttempt, replied: Replied) -> None:
        model = running.claim.model
        measures = {} if replied.is_resumed else running.measures()
        for measure, value in (measures | {"load_s": replied.load_s}).items():
            self._speeds.learn(model, measure, value)
        n_reused = replied.prompt_tokens_reused
        self._speeds.count(model, computed=replied.prompt_tokens - n_reused, reused=n_reused)

    async def _fail(
        self, running: RunningAttempt, outcome: Outcome, kind: str, reason: str, pause: timedelta | None
    ) -> None:
        """`pause`: until the job is due again; None: it is not tried again."""
        claim = running.claim
        fail = partial(
            transitions.fail,
            outcome=outcome,
            kind=kind,
            reason=reason,
            pause=pause,
            written=running.written(),
            times=running.times,
        )
        status = await self._write(running, fail)
        if status is None:
            await self._keep_written(running)
            return
        log.warning(
            "attempt failed" if outcome is Outcome.FAILED else f"attempt {outcome.value}",
            job_id=claim.job_id,
            attempt=claim.attempt,
            request_id=claim.request_id,
            model=claim.model,
            kind=kind,
            status=status.value,
            # The reason of another kind may quote the prompt or the schema, as a template's own words do.
            **({"reason": reason} if kind == "model_unavailable" else {}),
        )
        if status is Status.QUEUED and pause is not None:
            self._wake_later(pause)

    async def _keep_written(self, running: RunningAttempt) -> None:
        """After the lease was lost: where a cancel took it, what was written stays readable."""
        claim = running.claim
        keep = partial(transitions.store_partial, written=running.written(), times=running.times)
        is_cancelled = await self._write(running, keep)
        log.log(
            logging.INFO if is_cancelled else logging.WARNING,
            "attempt cancelled" if is_cancelled else "lease lost",
            job_id=claim.job_id,
            attempt=claim.attempt,
            request_id=claim.request_id,
            model=claim.model,
        )

    async def _write(self, running: RunningAttempt, transition: Callable[..., T]) -> T:
        """The transition's answer. Tried again while the database takes no writes."""
        claim = running.claim
        is_logged = False
        while True:
            try:
                return await self._database.write(transition, claim.job_id, claim.lease_token, datetime.now(UTC))
            except StorageUnavailable as error:
                if not is_logged:
                    log.error("reply held: the database takes no writes", job_id=claim.job_id, reason=str(error))
                is_logged = True
                await asyncio.sleep(RETRY_S)
