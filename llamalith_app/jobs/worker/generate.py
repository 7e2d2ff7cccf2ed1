"""Runs jobs: a place in the pool, a claim in the record, the engine, the finish; and again until nothing is left.

Woken by SAQ's task, by the worker's own look and by itself. It decides nothing by Redis, and
holds what this worker runs now. Knows no SAQ and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog
from redis.asyncio import Redis

from llamalith_app.contracts.jobs import Progress
from llamalith_app.contracts.parameters import wanted_schema
from llamalith_app.engine.chat import MAX_CHARS_A_TOKEN
from llamalith_app.engine.client.local import EngineDied, EngineLoadFailed, EngineProcess, EngineRefused
from llamalith_app.engine.messages import Advance, ChatMessage, Submit
from llamalith_app.errors import StorageUnavailable
from llamalith_app.jobs import order
from llamalith_app.jobs.queue import TaskProgress
from llamalith_app.jobs.schemas import Fit, ReplyValidator
from llamalith_app.jobs.worker import shape
from llamalith_app.jobs.worker.pool import ModelTooLarge, Pool, Reservation
from llamalith_app.jobs.worker.reply import Piece, Reply
from llamalith_app.jobs.worker.speeds import Measure, Speeds
from llamalith_app.settings.config import ModelConfig
from llamalith_app.settings.declaration import MaxWait
from llamalith_app.store import jobs, turns
from llamalith_app.store.database import Database
from llamalith_app.store.tables import Outcome, Status
from llamalith_app.streams import resume
from llamalith_app.streams.publisher import AttemptStream, StreamPublisher
from llamalith_app.streams.resume import ResumePoint

T = TypeVar("T")

PUBLISH_S = 0.1
"""At most so often is the progress of one job told."""
PUBLISH_DECODING_S = 0.5
"""The same once its text tells how it goes on."""
STORE_AGAIN_S = 1.0
"""Between tries to store a reply that the database did not take."""
TICK_S = 1.0
"""The steps in which an attempt's time is counted."""

log = structlog.get_logger(__name__)


class RunningAttempt:
    """One attempt that this worker is making."""

    def __init__(self, claim: jobs.Claim) -> None:
        self.claim = claim
        self.progress = Progress(phase="loading")
        self.thinks = False
        """What it writes may begin with thinking."""
        self.reply = Reply()
        """What it wrote so far."""
        self.before: ResumePoint | None = None
        """What earlier attempts wrote, behind which it is to go on."""
        self.last: Advance | None = None
        self.ends_as: Outcome | None = None
        """Why it is to stop before its end: its lease is gone (`lost`), the worker drains (`released`), or its time is
        over (`failed`)."""
        self.cancel: Callable[[], object] | None = None
        """Ends what it waits for: the model, or the engine's next step."""
        self._decode_started = 0.0
        self._n_first = 0
        """Tokens that came all at once with the first."""
        self._sent = 0.0
        self.completion_tokens = 0
        self._started = time.monotonic()

    def advance(self, step: Advance) -> list[Piece]:
        """What of its text is certain now."""
        now = time.monotonic()
        if self.last is None:
            self.reply = Reply(thinks=self.thinks, is_opened=step.opens_thinking)
        self.last = step
        if step.tokens:
            if not self.completion_tokens:
                self._decode_started, self._n_first = now, len(step.tokens)
            self.completion_tokens += len(step.tokens)
        decoding = self.completion_tokens > 0
        if decoding:
            n, since = self.completion_tokens - self._n_first, now - self._decode_started
        else:
            # What was reused and the loading before it are no speed of reading.
            n, since = step.prompt_done - step.prompt_reused, now - self._sent
        self.progress = Progress(
            phase="decode" if decoding else "prefill",
            prompt_tokens=step.prompt_tokens,
            prompt_tokens_done=step.prompt_done,
            completion_tokens=self.completion_tokens,
            tokens_per_s=round(n / since, 2) if n and since > 0 else None,
        )
        return self.reply.feed(step.text)

    def begin_again(self) -> None:
        self.before = None
        self.reply, self.last, self.completion_tokens = Reply(), None, 0

    def sent(self) -> None:
        """To the engine, just now."""
        self._sent = time.monotonic()

    def measure(self, learn: Callable[[Measure, float], None]) -> None:
        """What a whole reply says of its model's speed."""
        now = time.monotonic()
        learn("job_s", now - self._sent)
        if not self.completion_tokens:
            return
        learn("completion_tokens", self.completion_tokens)
        if self.completion_tokens > 1:
            learn("tokens_per_s", (self.completion_tokens - 1) / max(now - self._decode_started, 1e-6))
        n_read = self.last.prompt_tokens - self.last.prompt_reused if self.last else 0
        if n_read > 0:
            learn("prompt_tokens_per_s", n_read / max(self._decode_started - self._sent, 1e-6))

    def seconds(self) -> float:
        """Since the claim."""
        return time.monotonic() - self._started

    def written(self) -> jobs.Written:
        """What there is of the reply, as it would be kept."""
        prompt_tokens = None if self.last is None else self.last.prompt_tokens
        if self.before is not None and not self.completion_tokens:
            # It still reads the prompt, and what was written behind it.
            return jobs.Written(self.before.text, prompt_tokens, len(self.before.tokens))
        return jobs.Written(str(self.reply), prompt_tokens, self.completion_tokens)


class _Start(NamedTuple):
    place: Reservation
    priority: int
    counts: bool


class TaskMirror:
    """Jobs that run one after another, each begun where one ended, and who shows on SAQ's monitor what runs in it:
    nobody, until a task of SAQ takes an interest."""

    def __init__(self, model: str, tell: Callable[[TaskProgress], None] | None) -> None:
        self.model = model
        """Of the job that runs."""
        self.tell = tell
        self.latest: TaskProgress | None = None
        self.ended = asyncio.Event()

    def show(self, progress: TaskProgress) -> None:
        self.latest = progress
        if self.tell is not None:
            self.tell(progress)

    def be_shown(self, tell: Callable[[TaskProgress], None]) -> None:
        self.tell = tell
        if self.latest is not None:
            tell(self.latest)


class Generation:
    """All that runs in this worker. `redis` is told what happens, `history_redis` asked what attempts before had
    written; `wake_later` is told how long from now a job will be due again."""

    def __init__(
        self,
        database: Database,
        pool: Pool,
        redis: Redis,
        history_redis: Redis,
        *,
        record: str,
        worker_id: int,
        models: Mapping[str, ModelConfig],
        grammars: Mapping[str, str],
        max_wait: MaxWait,
        wake_later: Callable[[timedelta], None],
    ) -> None:
        self._database = database
        self._pool = pool
        self._history_redis = history_redis
        self._record = record
        self._teller = StreamPublisher(redis, record)
        self._worker_id = worker_id
        self._models = models
        self._grammars = grammars
        self._max_wait = order.max_wait_by_priority(max_wait)
        self._validator = ReplyValidator()
        self._n_started = 0
        self.speeds = Speeds()
        self._wake_later = wake_later
        self._sequence_ids = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._chains: set[TaskMirror] = set()
        self.running: dict[str, RunningAttempt] = {}
        """By lease token."""
        self.draining = asyncio.Event()

    async def look(self) -> None:
        """Starts as much of what is due as there are places for, and returns at once."""
        for start in await self._starts():
            self._begin(start)

    def start(self, model: str, tell: Callable[[TaskProgress], None]) -> asyncio.Task[None]:
        """`run_next` as a task of its own, which nobody but this object ends."""
        return self._spawn(self.run_next(model, tell))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._hold(task)
        return task

    def _hold(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self, within_s: float) -> bool:
        """Once draining: waits for all that was started; False: something still runs."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        return not self._tasks

    async def run_next(self, model: str, tell: Callable[[TaskProgress], None]) -> None:
        """Runs due jobs one after another while there are any and there is a place for them: which, the order
        decides, not the hint that woke this. Places beyond the one that this takes get tasks of their own.

        Where others run `model` already and nobody shows them, it shows their progress instead: a busy queue is seen
        to be busy.
        """
        try:
            start = self._first(await self._starts())
        except StorageUnavailable as error:
            log.warning("nothing can be claimed now", reason=str(error))
        else:
            if start is not None:
                await self._go_on(start, self._chain(start, tell))
            while (chain := self._unseen(model)) is not None:
                chain.be_shown(tell)
                await chain.ended.wait()

    def _unseen(self, model: str) -> TaskMirror | None:
        return next((chain for chain in self._chains if chain.tell is None and chain.model == model), None)

    def stop(self, running: RunningAttempt, ends_as: Outcome) -> None:
        """Ends an attempt before its reply is whole, within one step of the engine. The first reason counts."""
        if running.ends_as is not None:
            return
        running.ends_as = ends_as
        if running.cancel is not None:
            running.cancel()

    async def _starts(self) -> list[_Start]:
        """Places for as much of what is due as can start now, best first."""
        starts: list[_Start] = []
        if self.draining.is_set():
            return starts
        now = datetime.now(UTC)
        due = await self._database.read(jobs.due, self._models, now)
        # Without a pause from here on: what has room now gets its place.
        while not self.draining.is_set():
            rooms = {one.model: self._pool.room(one.model) for one in due}
            n_started = self._n_started + sum(start.counts for start in starts)
            best = order.next_start(due, rooms, self._max_wait, n_started, now)
            place = self._pool.reserve(best.model) if best is not None else None
            if best is None or place is None:
                break
            counts = order.counts_towards_relief(best, due, self._max_wait, n_started, now)
            starts.append(_Start(place, best.priority, counts))
            due = order.after_start(due, best)
        return starts

    def _first(self, starts: list[_Start]) -> _Start | None:
        """The first of them, for the caller; the others are begun."""
        for start in starts[1:]:
            self._begin(start)
        return starts[0] if starts else None

    def _begin(self, start: _Start) -> None:
        self._spawn(self._go_on(start, self._chain(start, None)))

    def _chain(self, start: _Start, tell: Callable[[TaskProgress], None] | None) -> TaskMirror:
        chain = TaskMirror(start.place.model, tell)
        self._chains.add(chain)
        return chain

    async def _go_on(self, start: _Start, chain: TaskMirror) -> None:
        """Runs a job in the place, gives it back, and so on with whatever is next then."""
        following: _Start | None = start
        try:
            while following is not None and await self._serve(following, chain):
                following = self._first(await self._starts())
        except StorageUnavailable as error:
            log.warning("nothing can be claimed now", reason=str(error))
        finally:
            self._chains.remove(chain)
            chain.ended.set()

    async def _serve(self, start: _Start, chain: TaskMirror) -> bool:
        """True if it ran a job; somebody else may have been faster."""
        with start.place as place:
            chain.model = place.model
            claim = await self._database.write_lightly(
                jobs.claim, place.model, start.priority, self._worker_id, datetime.now(UTC)
            )
            if claim is None:
                return False
            self._n_started += start.counts
            running = RunningAttempt(claim)
            if self.draining.is_set():
                # It began to drain while the claim was on its way.
                running.ends_as = Outcome.RELEASED
                await self._fail(running, "interrupted", "The attempt was interrupted.")
                return False
            await self._attempt(running, place, chain)
            return True

    async def _attempt(self, running: RunningAttempt, place: Reservation, chain: TaskMirror) -> None:
        """One attempt from its claim to the end of its lease; raises nothing."""
        claim = running.claim
        self.running[claim.lease_token] = running
        lines = log.bind(job_id=claim.job_id, attempt=claim.attempt, model=claim.model, request_id=claim.request_id)
        publisher: _Publisher | None = None
        timer = None if claim.timeout_s is None else asyncio.create_task(self._end_in_time(running, claim.timeout_s))
        try:
            lines.info("attempt started")
            if claim.attempt > 1:
                running.before = await resume.resume_point(
                    self._history_redis, self._record, claim.job_id, claim.attempt, resume.RESUME_TIMEOUT_S
                )
            writer = self._teller.open_attempt(claim.job_id, claim.attempt, running.before)
            publisher = _Publisher(writer, running, chain)
            await self._run(running, place, publisher)
        except EngineRefused as error:
            await self._fail(running, error.kind, str(error), final=error.kind != "engine_died")
        except ModelTooLarge as error:
            await self._fail(running, "model_unavailable", str(error), final=True)
        except EngineLoadFailed as error:
            await self._fail(running, "model_unavailable", str(error))
            self._wake_later(timedelta(seconds=self._pool.rest_s(claim.model)))
        except EngineDied as error:
            await self._fail(running, "engine_died", str(error))
        except Exception:  # noqa: BLE001 - whatever it was, the job must not stay behind as processing
            lines.exception("attempt failed unexpectedly")
            await self._fail(running, "internal", "Something went wrong in the worker; its log tells more.")
        finally:
            if timer is not None:
                timer.cancel()
            if publisher is not None:
                self._hold(asyncio.create_task(publisher.close()))
            del self.running[claim.lease_token]

    async def _end_in_time(self, running: RunningAttempt, timeout_s: float) -> None:
        """Counts only while this process runs: one that was frozen must not find its attempts over at once."""
        left = timeout_s
        while left > 0:
            before = time.monotonic()
            await asyncio.sleep(min(left, TICK_S))
            left -= min(time.monotonic() - before, 2 * TICK_S)
        self.stop(running, Outcome.FAILED)

    async def _engine(self, running: RunningAttempt, place: Reservation) -> EngineProcess | None:
        """None: the attempt is to stop before its model is loaded. The load goes on, for whoever comes next."""

        async def load() -> EngineProcess | EngineLoadFailed:
            # Once the attempt has stopped nobody hears of it: then the next one finds it in the pool.
            try:
                return await place.engine()
            except EngineLoadFailed as error:
                return error

        loading = asyncio.create_task(load())
        self._hold(loading)
        waiting = asyncio.shield(loading)
        running.cancel = waiting.cancel
        if running.ends_as is not None:
            # It was told so while it read what the attempt before had written.
            waiting.cancel()
        try:
            found = await waiting
        except asyncio.CancelledError:
            if running.ends_as is None:
                raise
            return None
        if isinstance(found, EngineLoadFailed):
            raise found
        return found

    async def _run(self, running: RunningAttempt, place: Reservation, publisher: _Publisher) -> None:
        claim = running.claim
        publisher.tell()
        engine = await self._engine(running, place)
        if engine is None:
            await self._fail(running, "interrupted", "The attempt was interrupted.")
            return
        settings = self._models[claim.model].settings
        turn = await self._turn(running, engine.loaded.n_ctx * MAX_CHARS_A_TOKEN)
        if turn is None:
            await self._fail(running, "interrupted", "The attempt was interrupted.")
            return
        submit = Submit(
            sequence_id=next(self._sequence_ids),
            messages=msgspec.convert(turn.messages, list[ChatMessage], from_attributes=True),
            sampling=shape.sampling(settings, claim.parameters),
            stop=shape.stops(settings, claim.parameters),
            grammar=shape.grammar(claim, self._grammars),
            written=[] if running.before is None else running.before.tokens,
        )
        running.thinks = shape.thinks(settings, submit.grammar, engine.loaded)
        if not await self._write(running, engine, submit, publisher):
            running.begin_again()
            submit = msgspec.structs.replace(submit, sequence_id=next(self._sequence_ids), written=[])
            await self._write(running, engine, submit, publisher)
        last = running.last
        finish_reason = None if last is None or last.finish == "cancelled" else last.finish
        if finish_reason is not None or running.ends_as is not Outcome.RELEASED:
            publisher.write(running.reply.end())
        # Whole before it was stopped: the time it took is spent, and only a lease that is gone stands against it.
        if running.ends_as is Outcome.LOST or last is None or finish_reason is None:
            await self._fail(running, "interrupted", "The attempt was interrupted.")
            return
        fit = await self._fit(running)
        finish = partial(
            jobs.finish,
            reply=str(running.reply),
            finish_reason=finish_reason,
            prompt_tokens=last.prompt_tokens,
            prompt_tokens_reused=last.prompt_reused,
            completion_tokens=running.completion_tokens,
            omitted_messages=last.omitted_messages + turn.n_too_old,
            reply_valid=fit.is_valid,
            reply_problem=fit.problem,
        )
        if await self._store(running, finish):
            self.speeds.learn(claim.model, "load_s", engine.loaded.load_s)
            if not submit.written:
                running.measure(partial(self.speeds.learn, claim.model))
            n_reused = last.prompt_reused
            self.speeds.count(claim.model, computed=last.prompt_tokens - n_reused, reused=n_reused)
            log.info(
                "job done",
                job_id=claim.job_id,
                request_id=claim.request_id,
                model=claim.model,
                finish_reason=finish_reason,
                prompt_tokens=last.prompt_tokens,
                prompt_tokens_reused=last.prompt_reused,
                completion_tokens=running.completion_tokens,
                seconds=round(running.seconds(), 3),
            )
        else:
            await self._keep(running)

    async def _fit(self, running: RunningAttempt) -> Fit:
        """Whether a whole reply fits what of its schema it could not be held to while it was written. An attempt that
        is to stop does not wait for that: its reply would be lost to it."""
        claim = running.claim
        wanted = wanted_schema(claim.parameters.response_format) if claim.parameters and claim.unenforced else None
        if wanted is None:
            return Fit(None, None)
        validating = asyncio.create_task(self._validator.validate(wanted.schema, str(running.reply)))
        running.cancel = validating.cancel
        if running.ends_as is not None:
            validating.cancel()
        try:
            return await validating
        except asyncio.CancelledError:
            if running.ends_as is None:
                raise
            return Fit(None, "could not be validated: its worker was ending")

    async def _turn(self, running: RunningAttempt, max_chars: int) -> turns.Turn | None:
        """What is to be answered, once the record can be read. None: the attempt is to stop before that."""
        claim = running.claim
        is_told = False
        while running.ends_as is None:
            try:
                return await self._database.read(turns.turn, claim.turn_id, max_chars)
            except StorageUnavailable as error:
                if not is_told:
                    log.error("a conversation cannot be read now", job_id=claim.job_id, reason=str(error))
                is_told = True
                await asyncio.sleep(STORE_AGAIN_S)
        return None

    async def _write(
        self, running: RunningAttempt, engine: EngineProcess, submit: Submit, publisher: _Publisher
    ) -> bool:
        """To the reply's end, or the attempt's. False: it cannot go on behind what was written before."""
        running.cancel = partial(engine.cancel, submit.sequence_id)
        running.sent()
        if running.ends_as is None:
            async with aclosing(engine.run(submit)) as steps:
                async for step in steps:
                    if not publisher.write(running.advance(step), step.tokens):
                        return False
                    publisher.tell()
        return True

    async def _fail(self, running: RunningAttempt, kind: str, reason: str, *, final: bool = False) -> None:
        claim = running.claim
        outcome = running.ends_as or Outcome.FAILED
        if outcome is Outcome.LOST:
            await self._keep(running)
            return
        if running.ends_as is Outcome.FAILED:
            kind, final = jobs.TIMEOUT, True
            reason = f"It ran for {running.seconds():.1f} s; timeout_s allowed {claim.timeout_s:g}."
        pause = None if final else order.retry_backoff(claim.attempt)
        if outcome is Outcome.RELEASED:
            kind, reason, pause = "drained", "The worker was ending.", timedelta()
        fail = partial(jobs.fail, outcome=outcome, kind=kind, reason=reason, pause=pause, written=running.written())
        status = await self._store(running, fail)
        if status is None:
            await self._keep(running)
            return
        log.warning(
            "attempt failed" if outcome is Outcome.FAILED else f"attempt {outcome.value}",
            job_id=claim.job_id,
            attempt=claim.attempt,
            request_id=claim.request_id,
            model=claim.model,
            kind=kind,
            status=status.value,
            # Of the other kinds a reason may quote the prompt or the schema, as a template's own words do.
            **({"reason": reason} if kind == "model_unavailable" else {}),
        )
        if status is Status.QUEUED and pause is not None:
            self._wake_later(pause)

    async def _keep(self, running: RunningAttempt) -> None:
        """After the lease was gone: where a cancel took it, what was written stays readable."""
        claim = running.claim
        cancelled = await self._store(running, partial(jobs.keep_written, written=running.written()))
        log.log(
            logging.INFO if cancelled else logging.WARNING,
            "attempt cancelled" if cancelled else "lease lost",
            job_id=claim.job_id,
            attempt=claim.attempt,
            request_id=claim.request_id,
            model=claim.model,
        )

    async def _store(self, running: RunningAttempt, transition: Callable[..., T]) -> T:
        """The end of an attempt, held and tried again while the database takes no writes."""
        claim = running.claim
        is_held = False
        while True:
            try:
                return await self._database.write(transition, claim.job_id, claim.lease_token, datetime.now(UTC))
            except StorageUnavailable as error:
                if not is_held:
                    log.error("reply held: the database takes no writes", job_id=claim.job_id, reason=str(error))
                is_held = True
                await asyncio.sleep(STORE_AGAIN_S)


class _Publisher:
    """Tells what one attempt does to those who follow it, and now and then its progress, to Redis and to SAQ's task;
    nobody waits for it."""

    def __init__(self, writer: AttemptStream, running: RunningAttempt, chain: TaskMirror) -> None:
        self._writer = writer
        self._running = running
        self._chain = chain
        self._next = 0.0

    def write(self, pieces: Sequence[Piece], tokens: Sequence[int] = ()) -> bool:
        return self._writer.append(pieces, tokens)

    def tell(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        claim, progress = self._running.claim, self._running.progress
        self._next = now + (PUBLISH_DECODING_S if progress.phase == "decode" else PUBLISH_S)
        self._chain.show(
            TaskProgress(
                _fraction(progress),
                {
                    "job_id": claim.job_id,
                    "attempt": claim.attempt,
                    "phase": progress.phase,
                    "prompt_tokens": progress.prompt_tokens,
                    "prompt_tokens_done": progress.prompt_tokens_done,
                    "completion_tokens": progress.completion_tokens,
                },
            )
        )
        self._writer.publish_progress(progress)

    async def close(self) -> None:
        await self._writer.publish_end()


def _fraction(progress: Progress) -> float:
    """Of the prompt that is read; a reply's length is not known before its end."""
    if not progress.prompt_tokens:
        return 0.0
    return round((progress.prompt_tokens_done or 0) / progress.prompt_tokens, 3)
