"""Runs one attempt: loads its model, reads its turn, and publishes what the engine writes.

Knows the engine's protocol and the job's stream. Does not know who gets a place (`dispatch.py`), nor how the record
keeps what came of it (`settle.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial

import msgspec
import structlog
from redis.asyncio import Redis

from llamalith_app.contracts.parameters import wanted_schema
from llamalith_app.engine.chat import MAX_CHARS_A_TOKEN
from llamalith_app.engine.client.protocol import Engine, EngineDied, EngineLimits, EngineLoadFailed, EngineRefused
from llamalith_app.engine.messages import ChatMessage, Submit
from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs.schemas import Fit, ReplyValidator
from llamalith_app.jobs.worker import shape
from llamalith_app.jobs.worker.pool import ModelTooLarge, Reservation
from llamalith_app.jobs.worker.running import RunningAttempt, StopReason
from llamalith_app.jobs.worker.settle import AttemptResult, Failed, Replied, Settler, gives_back
from llamalith_app.jobs.worker.task_mirror import TaskMirror
from llamalith_app.jobs.worker.tasks import TaskSet
from llamalith_app.settings.config import ModelConfig
from llamalith_app.store import turns
from llamalith_app.store.database import Database
from llamalith_app.streams import resume
from llamalith_app.streams.publisher import AttemptStream, StreamPublisher

log = structlog.get_logger(__name__)


class AttemptTimings(msgspec.Struct, frozen=True, kw_only=True):
    progress_s: float = 0.1
    """Least time between two publications of one attempt's progress."""
    decode_progress_s: float = 0.5
    """The same once its text shows how it goes on."""
    retry_read_s: float = 1.0
    """Between tries to read a turn from a database that cannot be used now."""
    resume_timeout_s: float = resume.RESUME_TIMEOUT_S
    """How long an attempt waits for what Redis holds of earlier ones. `history_redis` must wait for so long too."""
    publish_rest_s: float = 0.5
    """How long an attempt that gives its job back waits for Redis to take the rest of its text."""
    tick_s: float = 1.0
    """The steps in which an attempt's time is counted."""


INTERRUPTED = Failed("interrupted", "The attempt was interrupted.")
UNEXPECTED = Failed("internal", "Something went wrong in the worker; its log says more.")
TOO_LONG = "The conversation is longer than the context of {n_ctx} tokens, and none of it may be left out (truncation)."
NOT_VALIDATED = Fit(None, "could not be validated: its worker was ending")


class AttemptExecutor:
    """Runs the attempts of one worker. `history_redis` is asked for what earlier attempts wrote; `tasks` holds what
    outlives an attempt."""

    def __init__(
        self,
        database: Database,
        publisher: StreamPublisher,
        history_redis: Redis,
        settler: Settler,
        *,
        record: str,
        models: Mapping[str, ModelConfig],
        grammars: Mapping[str, str],
        tasks: TaskSet,
        timings: AttemptTimings,
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._history_redis = history_redis
        self._settler = settler
        self._record = record
        self._models = models
        self._grammars = grammars
        self._tasks = tasks
        self._timings = timings
        self._validator = ReplyValidator()
        self._sequence_ids = itertools.count(1)

    async def run(self, running: RunningAttempt, reservation: Reservation, mirror: TaskMirror) -> None:
        """From the claim to the end of the lease; raises nothing."""
        claim = running.claim
        lines = log.bind(job_id=claim.job_id, attempt=claim.attempt, model=claim.model, request_id=claim.request_id)
        lines.info("attempt started")
        timer = None if claim.timeout_s is None else asyncio.create_task(self._stop_in_time(running, claim.timeout_s))
        stream: AttemptStream | None = None
        try:
            stream = await self._open_stream(running)
            result = await self.execute(running, reservation, stream, mirror)
            await self._settle(running, stream, result)
        except Exception:  # noqa: BLE001 - whatever it was, the job must not stay behind as processing
            lines.exception("attempt failed unexpectedly")
            await self._settle(running, stream, running.stop_reason or UNEXPECTED)
        finally:
            if timer is not None:
                timer.cancel()
            if stream is not None:
                self._tasks.start(stream.publish_end())

    async def execute(
        self, running: RunningAttempt, reservation: Reservation, stream: AttemptStream, mirror: TaskMirror
    ) -> AttemptResult:
        """Runs the attempt and publishes what it writes. Stores nothing; raises only what is a defect."""
        try:
            if (replied := await self._generate(running, reservation, stream, mirror)) is not None:
                return replied
            failed = INTERRUPTED
        except EngineRefused as error:
            failed = Failed(error.kind, str(error), is_final=error.kind != "engine_died")
        except ModelTooLarge as error:
            failed = Failed("model_unavailable", str(error), is_final=True)
        except EngineLoadFailed as error:
            failed = Failed("model_unavailable", str(error))
        except EngineDied as error:
            failed = Failed("engine_died", str(error))
        return running.stop_reason or failed

    async def _settle(self, running: RunningAttempt, stream: AttemptStream | None, result: AttemptResult) -> None:
        """The job's end never waits for Redis. A job that is given back does, for `publish_rest_s` at most: its next
        attempt goes on behind what is published, and nothing of this one may reach readers beside that."""
        if stream is not None and gives_back(result):
            await stream.publish_rest(self._timings.publish_rest_s)
        await self._settler.settle(running, result)

    async def _stop_in_time(self, running: RunningAttempt, timeout_s: float) -> None:
        """Counts only while this process runs: one that was frozen must not find its attempts over at once."""
        left, tick_s = timeout_s, self._timings.tick_s
        while left > 0:
            before = time.monotonic()
            await asyncio.sleep(min(left, tick_s))
            left -= min(time.monotonic() - before, 2 * tick_s)
        running.stop(StopReason.TIMEOUT)

    async def _open_stream(self, running: RunningAttempt) -> AttemptStream:
        claim = running.claim
        if claim.attempt > 1:
            running.resume_point = await resume.resume_point(
                self._history_redis, self._record, claim.job_id, claim.attempt, self._timings.resume_timeout_s
            )
        return self._publisher.open_attempt(claim.job_id, claim.attempt, running.resume_point)

    async def _generate(
        self, running: RunningAttempt, reservation: Reservation, stream: AttemptStream, mirror: TaskMirror
    ) -> Replied | None:
        """The whole reply; None: the attempt ended before there was one."""
        progress = _ProgressPublisher(running, stream, mirror, self._timings)
        progress.publish()
        engine = await self._load(running, reservation)
        if engine is None:
            return None
        running.loaded()
        turn = await self._read_turn(running, engine.limits)
        if turn is None:
            return None
        if turn.n_omitted and not shape.may_omit(running.claim.parameters):
            raise EngineRefused("context_overflow", TOO_LONG.format(n_ctx=engine.limits.n_ctx))
        request = self._request(running, turn, engine.limits)
        if not await self._run_sequence(running, engine, request, stream, progress):
            running.restart()
            request = msgspec.structs.replace(request, sequence_id=next(self._sequence_ids), written=[])
            await self._run_sequence(running, engine, request, stream, progress)
        return await self._whole_reply(running, engine, turn, stream, is_resumed=bool(request.written))

    async def _whole_reply(
        self,
        running: RunningAttempt,
        engine: Engine,
        turn: turns.Turn,
        stream: AttemptStream,
        *,
        is_resumed: bool,
    ) -> Replied | None:
        """The reply, if it was whole when its sequence ended."""
        last, stop_reason = running.last_step, running.stop_reason
        finish = None if last is None or last.finish == "cancelled" else last.finish
        if finish is not None or stop_reason is not StopReason.DRAIN:
            # The next attempt goes on behind what is held back; any other end gives it to the readers.
            stream.append(running.reply.end())
        # Whole before it was stopped: the time it took is spent, and only a lease that is gone stands against it.
        if last is None or finish is None or stop_reason is StopReason.LEASE_LOST:
            return None
        return Replied(
            to=turn.reply_to,
            text=str(running.reply),
            thinking=running.reply.thinking,
            thinking_s=running.thinking_s,
            thinking_tokens=running.thinking_tokens,
            finish_reason=finish,
            prompt_tokens=last.prompt_tokens,
            prompt_tokens_reused=last.prompt_reused,
            completion_tokens=running.completion_tokens,
            omitted_messages=last.omitted_messages + turn.n_omitted,
            fit=await self._validate(running),
            load_s=engine.load_s,
            is_resumed=is_resumed,
        )

    async def _load(self, running: RunningAttempt, reservation: Reservation) -> Engine | None:
        """None: the attempt is stopped before its model is loaded. The load goes on, for whoever comes next."""

        async def load() -> Engine | EngineLoadFailed:
            # Once the attempt is stopped nobody asks for this error: the next attempt finds it in the pool.
            try:
                return await reservation.engine()
            except EngineLoadFailed as error:
                return error

        engine = await running.unless_stopped(asyncio.shield(self._tasks.start(load())))
        if isinstance(engine, EngineLoadFailed):
            raise engine
        return engine

    async def _read_turn(self, running: RunningAttempt, limits: EngineLimits) -> turns.Turn | None:
        """What is to be answered, once the record can be read. None: the attempt is stopped before that."""
        claim, max_chars = running.claim, limits.n_ctx * MAX_CHARS_A_TOKEN
        is_logged = False
        while running.stop_reason is None:
            try:
                return await self._database.read(turns.read_turn, claim.turn_id, max_chars)
            except StorageUnavailable as error:
                if not is_logged:
                    log.error("a conversation cannot be read now", job_id=claim.job_id, reason=str(error))
                is_logged = True
                await asyncio.sleep(self._timings.retry_read_s)
        return None

    def _request(self, running: RunningAttempt, turn: turns.Turn, limits: EngineLimits) -> Submit:
        claim = running.claim
        settings = self._models[claim.model].settings
        sampling, grammar = shape.sampling(settings, claim.parameters), shape.grammar(claim, self._grammars)
        is_raw = shape.is_raw(claim.parameters)
        running.family = shape.family(settings, grammar, limits, is_raw=is_raw)
        running.marker_tokens = limits.marker_tokens
        budget = shape.thinking_budget(settings, claim.parameters, grammar, sampling.max_tokens)
        return Submit(
            sequence_id=next(self._sequence_ids),
            messages=msgspec.convert(turn.messages, list[ChatMessage], from_attributes=True),
            sampling=sampling,
            stop=shape.stops(settings, claim.parameters),
            is_raw=is_raw,
            may_omit=shape.may_omit(claim.parameters),
            grammar=grammar,
            effort_arguments=shape.effort_arguments(claim.parameters, running.family),
            template_arguments=shape.template_arguments(claim.parameters),
            thinks=running.family is not None,
            thinking_budget=0 if running.answers_now else budget,
            written=[] if running.resume_point is None else running.resume_point.tokens,
        )

    async def _run_sequence(
        self,
        running: RunningAttempt,
        engine: Engine,
        request: Submit,
        stream: AttemptStream,
        progress: _ProgressPublisher,
    ) -> bool:
        """To the reply's end, or the attempt's. False: the reply cannot go on behind what was written before."""
        running.submitted(partial(engine.cancel, request.sequence_id), partial(engine.answer_now, request.sequence_id))
        if running.stop_reason is None:
            async with aclosing(engine.run(request)) as steps:
                async for step in steps:
                    if not stream.append(running.take(step), step.tokens):
                        return False
                    progress.publish()
        return True

    async def _validate(self, running: RunningAttempt) -> Fit:
        """Whether a whole reply fits what of its schema it could not be held to while it was written. An attempt that
        is stopped does not wait for that: its reply would be lost."""
        claim = running.claim
        wanted = wanted_schema(claim.parameters.response_format) if claim.parameters and claim.unenforced else None
        if wanted is None:
            return Fit(None, None)
        validating = asyncio.create_task(self._validator.validate(wanted.schema, str(running.reply)))
        return await running.unless_stopped(validating) or NOT_VALIDATED


class _ProgressPublisher:
    """Publishes one attempt's progress now and then, to its readers and to SAQ's task; nobody waits for it."""

    def __init__(
        self, running: RunningAttempt, stream: AttemptStream, mirror: TaskMirror, timings: AttemptTimings
    ) -> None:
        self._running = running
        self._stream = stream
        self._mirror = mirror
        self._timings = timings
        self._next_at = 0.0

    def publish(self) -> None:
        """If it is time."""
        now = time.monotonic()
        if now < self._next_at:
            return
        claim, progress, timings = self._running.claim, self._running.progress, self._timings
        self._next_at = now + (timings.decode_progress_s if progress.phase == "decode" else timings.progress_s)
        self._mirror.update(claim.job_id, claim.attempt, progress)
        self._stream.publish_progress(progress)
