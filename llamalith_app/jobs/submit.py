"""Accepts jobs: validates a request, stores it, and sends the hint after the commit.

Every way to submit a job (API, reply, legacy submit, pages, OpenAI clients) uses `Submissions`. Knows no HTTP and
no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar, cast

import msgspec
from sqlalchemy import Connection

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import (
    MAX_COMPARED,
    CompareAccepted,
    Job,
    JobAccepted,
    JobRequest,
    Regenerate,
    Retried,
)
from llamalith_app.contracts.parameters import AnyText, JsonSchema, wanted_schema
from llamalith_app.contracts.principal import Principal
from llamalith_app.errors import BadInput, NotFound, NotRetryable, QueueFull
from llamalith_app.jobs import schemas
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.queue import Hints
from llamalith_app.jobs.schemas import SchemaValidator
from llamalith_app.settings.declaration import Settings
from llamalith_app.store import calls, keys, turns
from llamalith_app.store.calls import Call
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import reads, submission, waiting
from llamalith_app.store.keys import Key
from llamalith_app.store.tables import Source, Status
from llamalith_app.store.tree import NO_TURN

T = TypeVar("T")


class ForkPoint(NamedTuple):
    """Where a new conversation parts from another one."""

    conversation_id: str
    """The public id."""
    turn_id: int
    """The last turn that it shares."""


class JoinWindow(NamedTuple):
    """Which jobs of the same call are joined, in seconds before now."""

    since_left_s: float
    """Those that their last client left then or later."""
    since_sent_s: float | None = None
    """Where the client says that it sends the call again: also those that were sent then or later and seem to be waited
    for. None: it does not say so."""


class _QueueLimitReached(Exception):
    """The owner has as many queued jobs as are allowed."""


class Submissions:
    """`limits`: those of the settings that bound a job, and what a request without one gets."""

    def __init__(
        self,
        database: Database,
        hints: Hints,
        *,
        models: tuple[str, ...],
        grammars: Mapping[str, str],
        limits: Settings,
        forecasts: Forecasts,
        schema_s: float = schemas.TIMEOUT_S,
    ) -> None:
        self._database = database
        self._hints = hints
        self._models = models
        self._grammars = grammars
        self._limits = limits
        self._max_queued = limits.max_queued
        self._forecasts = forecasts
        self._allowances: dict[int, int] = {}
        """By owner: jobs that can be accepted before the queued ones are counted again."""
        self._counting = asyncio.Lock()
        self._schemas = SchemaValidator(schema_s)

    async def submit(
        self,
        principal: Principal,
        request_id: str,
        request: JobRequest,
        *,
        conversation_id: str | None = None,
        keeps_system_prompt: bool = False,
        source: Source = Source.API,
        beside: int | None = None,
        seen: int | None = None,
        preceding: Sequence[Message] = (),
        fork_of: ForkPoint | None = None,
        key: Key | None = None,
    ) -> JobAccepted:
        """Stores a prompt and queues its job, which is on disk when this returns. `conversation_id` is the public id;
        blank or None: a new conversation. `keeps_system_prompt`: a system message in force is not replaced. `beside`: a
        turn that the conversation shows, whose sibling the prompt becomes. `seen`: a turn that the client was shown;
        the prompt continues the branch through it. `source`: the door, which is stored with a conversation that it
        makes. `preceding`: messages that stand before the prompt. `fork_of`: the prompt begins a conversation that
        parts there.

        Raises BadInput, NotFound (no turn `beside` or `fork_of`), JobOpen (on the path to `fork_of`), ValidatorBusy,
        KeyReused, QueueFull or StorageUnavailable, with nothing stored.
        """
        # Before validation, so that a repeated request gets its answer although the configuration has changed.
        if key is not None and (
            before := await self._database.read(keys.stored_answer, key, datetime.now(UTC), JobAccepted)
        ):
            return before
        new = await self._new_job(principal, request_id, request, conversation_id)
        new = new._replace(
            keeps_system_prompt=keeps_system_prompt, source=source, seen=seen, inputs=[*preceding, *new.inputs]
        )
        return await self._make(new, beside, key, fork_of)

    async def call(
        self,
        principal: Principal,
        request_id: str,
        request: JobRequest,
        history: Sequence[Message],
        call: Call,
        *,
        joins: JoinWindow,
        behind: int | None = None,
        key: Key | None = None,
    ) -> int:
        """Queues the reply to a whole history, as an OpenAI client sends it, and returns the job's id. `history`: at
        least one message that is not a system message. A job that this call left within the window is joined instead.

        Where the history begins as a stored path does, the turn continues that path. A call that is not to be stored
        begins a conversation of its own. `behind`: a turn that the history continues; then that is all. Of the request,
        neither content nor system prompt nor context is read.

        Raises what `submit` raises; NotFound: no turn `behind`.
        """
        if key is not None and (before := await self._database.read(keys.stored_answer, key, datetime.now(UTC), int)):
            return before
        has_system = history[0].role == "system"
        completed = self._completed(request)
        new = submission.NewJob(
            owner_id=principal.user_id,
            request_id=request_id,
            request=msgspec.structs.replace(completed, system_prompt=history[0].content if has_system else ""),
            inputs=history[has_system:],
            conversation_id=None,
            unenforced=await self._unenforced(request),
            source=Source.V1,
        )
        after = None
        # Behind the path there must be a message, and one that is no system message: that would replace the one before.
        if behind is None and call.is_stored and history[-1].role != "system":
            after = await self._database.read(turns.longest_stored_prefix, principal.user_id, history[:-1])
        is_new = False

        def make(connection: Connection, now: datetime) -> int:
            nonlocal is_new
            is_new = True
            if call.digest is not None:
                since = now - timedelta(seconds=joins.since_left_s)
                since_sent = None if joins.since_sent_s is None else now - timedelta(seconds=joins.since_sent_s)
                if (left := calls.join(connection, call.digest, since, since_repeat=since_sent)) is not None:
                    is_new = False
                    return left
            if behind is None:
                accepted = submission.submit_history(connection, new, after, now)
            elif (found := submission.submit_behind(connection, new, behind, now)) is None:
                raise NotFound(NO_TURN)
            else:
                accepted = found
            job_id = cast(int, accepted.job_id)
            calls.add(connection, job_id, call, now)
            return job_id

        job_id = await self._write_if_room(principal.user_id, key, int, make)
        if is_new:
            self._hints.send(cast(str, completed.model), job_id)
        return job_id

    async def compare(
        self,
        principal: Principal,
        request_id: str,
        request: JobRequest,
        models: Sequence[str],
        *,
        conversation_id: str | None = None,
        keeps_system_prompt: bool = False,
        source: Source = Source.API,
        beside: int | None = None,
        seen: int | None = None,
        key: Key | None = None,
    ) -> CompareAccepted:
        """Stores a prompt once for each of these models, at most MAX_COMPARED, and queues a job for each, in one
        transaction. The request has a content; its `model` is not read. The rest is as `submit` has it.

        Raises what `submit` raises; BadInput also where a model stands there twice.
        """
        if key is not None and (
            before := await self._database.read(keys.stored_answer, key, datetime.now(UTC), CompareAccepted)
        ):
            return before
        names = self._different_models(models)
        request = msgspec.structs.replace(request, model=names[0])
        first = await self._new_job(principal, request_id, request, conversation_id)
        first = first._replace(keeps_system_prompt=keeps_system_prompt, source=source, seen=seen)
        several = [first._replace(request=msgspec.structs.replace(first.request, model=name)) for name in names]

        def make(connection: Connection, now: datetime) -> CompareAccepted:
            made = submission.submit_compared(connection, several, beside, now)
            if made is None:
                raise NotFound(NO_TURN)
            created_new = False if beside is not None else None
            return CompareAccepted(ok=True, jobs=[_answer(first, one, created_new=created_new) for one in made])

        accepted = await self._write_if_room(principal.user_id, key, CompareAccepted, make, n_jobs=len(several))
        for one in accepted.jobs:
            if one.job_id is not None:
                self._hints.send(one.model, one.job_id)
        return accepted

    async def _new_job(
        self, principal: Principal, request_id: str, request: JobRequest, conversation_id: str | None
    ) -> submission.NewJob:
        """With all that the request leaves to the settings. Raises BadInput or ValidatorBusy."""
        completed = self._completed(_trimmed(request))
        return submission.NewJob(
            owner_id=principal.user_id,
            request_id=request_id,
            request=completed,
            inputs=_inputs(completed),
            conversation_id=(conversation_id or "").strip() or None,
            unenforced=await self._unenforced(request),
        )

    async def _make(
        self, new: submission.NewJob, beside: int | None, key: Key | None, fork_of: ForkPoint | None = None
    ) -> JobAccepted:
        def make(connection: Connection, now: datetime) -> JobAccepted:
            if fork_of is not None:
                made = submission.fork(connection, new.owner_id, fork_of.conversation_id, fork_of.turn_id, None, now)
                in_fork = new._replace(conversation_id=made.conversation_id)
                return _answer(new, submission.submit(connection, in_fork, now), created_new=True)
            if beside is None:
                return _answer(new, submission.submit(connection, new, now))
            accepted = submission.submit_sibling(connection, new, beside, now)
            if accepted is None:
                raise NotFound(NO_TURN)
            return _answer(new, accepted, created_new=False)

        accepted = await self._write_if_room(new.owner_id, key, JobAccepted, make, n_jobs=1 if new.inputs else 0)
        if accepted.job_id is not None:
            self._hints.send(accepted.model, accepted.job_id)
        return accepted

    async def regenerate(
        self,
        principal: Principal,
        request_id: str,
        job_id: int,
        changes: Regenerate,
        *,
        conversation_id: str | None = None,
        key: Key | None = None,
    ) -> JobAccepted:
        """Queues a job beside this one, whatever its status: with the same prompt and settings, but for the changes.
        `conversation_id`: the fork that shows the job's turn, where it is not the job's own conversation.

        Raises NotFound, and what `submit` raises; BadInput also where the job's model is no longer offered.
        """
        owner_id = principal.user_id
        if key is not None and (
            before := await self._database.read(keys.stored_answer, key, datetime.now(UTC), JobAccepted)
        ):
            return before

        def read(connection: Connection) -> tuple[Job, list[Message]]:
            # A fork still shows the turns of a conversation that is deleted.
            job = reads.job_by_id(connection, owner_id, job_id, or_deleted=conversation_id is not None)
            if job is None:
                raise NotFound("Job not found")
            return job, submission.prompt_of(connection, job.turn_id)

        job, inputs = await self._database.read(read)
        # The system prompt stays the one in force at the turn, not the one that was sent with the job.
        request = msgspec.structs.replace(submission.request_of(job), system_prompt="")
        changed = {name: value for name, value in msgspec.structs.asdict(changes).items() if value not in (None, "")}
        request = msgspec.structs.replace(request, **changed)
        request = msgspec.structs.replace(request, model=self._model((request.model or "").strip()))
        new = submission.NewJob(
            owner_id=owner_id,
            request_id=request_id,
            request=request,
            inputs=inputs,
            conversation_id=(conversation_id or "").strip() or None,
            unenforced=job.unenforced if changes.response_format is None else await self._unenforced(request),
        )
        return await self._make(new, job.turn_id, key)

    def _completed(self, request: JobRequest) -> JobRequest:
        """The request with the configured values where it has none. Raises BadInput."""
        limits = self._limits
        return msgspec.structs.replace(
            request,
            model=self._model((request.model or "").strip()),
            grammar_name=self._grammar((request.grammar_name or "").strip()),
            priority=request.priority or "normal",
            max_attempts=limits.max_attempts if request.max_attempts is None else request.max_attempts,
            timeout_s=limits.timeout_s if request.timeout_s is None else request.timeout_s,
            queue_timeout_s=limits.queue_timeout_s if request.queue_timeout_s is None else request.queue_timeout_s,
        )

    async def retry(self, principal: Principal, request_id: str, job_id: int, *, key: Key | None = None) -> JobAccepted:
        """Queues a copy of a job that ended without a reply. A second call returns the same copy.

        Raises NotFound, NotRetryable, BadInput where its model is no longer offered, and what `submit` raises.
        """

        def make(connection: Connection, now: datetime) -> tuple[JobAccepted, bool]:
            again = submission.retry(connection, principal.user_id, job_id, request_id, now)
            if again is None:
                raise NotFound("Job not found")
            if isinstance(again, Status):
                why = "it has its reply" if again is Status.DONE else "it has not ended"
                raise NotRetryable(f"Job {job_id} is {again.value}: {why}.")
            self._model(again.model)
            return JobAccepted(
                ok=True,
                queued=True,
                job_id=again.job_id,
                conversation_id=again.conversation_id,
                created_new=False,
                model=again.model,
                turn_id=again.turn_id,
            ), again.is_new

        accepted, is_new = await self._write_if_room(principal.user_id, key, tuple[JobAccepted, bool], make)
        if is_new and accepted.job_id is not None:
            self._hints.send(accepted.model, accepted.job_id)
        return accepted

    async def retry_matching(
        self,
        principal: Principal,
        request_id: str,
        statuses: Collection[Status],
        *,
        limit: int,
        conversation_id: str | None = None,
        model: str | None = None,
        error_kind: str | None = None,
        key: Key | None = None,
    ) -> Retried:
        """Retries the `limit` oldest matching jobs that were not retried yet, fewer where the queue limit is near."""
        owner_id = principal.user_id
        models = self._models if model is None else (self._model(model),)

        def make(connection: Connection, now: datetime) -> tuple[Retried, list[str]]:
            room = self._max_queued - waiting.n_queued(connection, owner_id)
            if room <= 0:
                raise _QueueLimitReached
            found = submission.retry_matching(
                connection,
                owner_id,
                request_id,
                now,
                statuses=statuses,
                models=models,
                limit=min(limit, room),
                conversation_id=conversation_id,
                error_kind=error_kind,
            )
            more = len(found) == min(limit, room)
            return Retried(ok=True, job_ids=[copy.job_id for copy in found], more=more), [copy.model for copy in found]

        async with self._counting:
            # The last count no longer holds.
            self._allowances.pop(owner_id, None)
            retried, of_models = await self._write(key, tuple[Retried, list[str]], make)
        for of_model, job_id in zip(of_models, retried.job_ids, strict=True):
            self._hints.send(of_model, job_id)
        return retried

    async def retry_jobs(self, principal: Principal, request_id: str, job_ids: Sequence[int]) -> int:
        """Retries those of these jobs that can be retried and were not, in one transaction; as many as the queue has
        room for. Returns how many.

        Raises QueueFull where there is no room at all; nothing was stored then.
        """
        owner_id = principal.user_id

        def make(connection: Connection, now: datetime) -> list[submission.Retry]:
            room = self._max_queued - waiting.n_queued(connection, owner_id)
            if room <= 0:
                raise _QueueLimitReached
            found = [submission.retry(connection, owner_id, job_id, request_id, now) for job_id in job_ids[:room]]
            return [copy for copy in found if isinstance(copy, submission.Retry) and copy.is_new]

        async with self._counting:
            # The last count no longer holds.
            self._allowances.pop(owner_id, None)
            copies = await self._write(None, list[submission.Retry], make)
        for copy in copies:
            self._hints.send(copy.model, copy.job_id)
        return len(copies)

    async def _write_if_room(
        self,
        owner_id: int,
        key: Key | None,
        answer: type[T],
        make: Callable[[Connection, datetime], T],
        *,
        n_jobs: int = 1,
    ) -> T:
        """Runs `make` in a transaction, if the owner's queue has room for the jobs that it adds.

        Raises QueueFull. Counting a long queue costs more than accepting a job, so each count allows half of the room
        that it found before the next count.
        """
        if n_jobs == 0 or self._spend_allowance(owner_id, n_jobs):
            return await self._write(key, answer, make)
        n_queued: int | None = None

        def make_if_room(connection: Connection, now: datetime) -> T:
            nonlocal n_queued
            n_queued = waiting.n_queued(connection, owner_id)
            if n_queued + n_jobs > self._max_queued:
                raise _QueueLimitReached
            return make(connection, now)

        async with self._counting:
            if self._spend_allowance(owner_id, n_jobs):
                return await self._write(key, answer, make)
            made = await self._write(key, answer, make_if_room)
            if n_queued is not None:
                self._allowances[owner_id] = (self._max_queued - n_queued - n_jobs + 1) // 2
        return made

    async def _write(self, key: Key | None, answer: type[T], make: Callable[[Connection, datetime], T]) -> T:
        """Runs `make` in a transaction, once for a key. Raises QueueFull."""

        def make_once(connection: Connection, now: datetime) -> T:
            return keys.answer_once(connection, key, now, answer, lambda: make(connection, now))

        try:
            return await self._database.write(make_once, datetime.now(UTC))
        except _QueueLimitReached:
            raise QueueFull(self._max_queued, await self._forecasts.retry_after_s()) from None

    def _spend_allowance(self, owner_id: int, n_jobs: int) -> bool:
        """Whether these jobs can be accepted without a new count."""
        left = self._allowances.get(owner_id, 0)
        self._allowances[owner_id] = max(0, left - n_jobs)
        return left >= n_jobs

    def _different_models(self, given: Sequence[str]) -> list[str]:
        """Their names. Raises BadInput."""
        names = [name.strip() for name in given]
        for name in names:
            if name not in self._models:
                raise BadInput(f"models: {_quoted(name)} is not offered here; these are: {', '.join(self._models)}")
            if names.count(name) > 1:
                raise BadInput(f"models: {_quoted(name)} stands there twice; each model answers once")
        if not 1 <= len(names) <= MAX_COMPARED:
            raise BadInput(f"models: expected 1 to {MAX_COMPARED} of them")
        return names

    def _model(self, name: str) -> str:
        if not name:
            return self._models[0]
        if name not in self._models:
            raise BadInput(f"model: {_quoted(name)} is not offered here; these are: {', '.join(self._models)}")
        return name

    def _grammar(self, name: str) -> str | None:
        if not name:
            return None
        if name not in self._grammars:
            known = ", ".join(sorted(self._grammars)) or "none is configured"
            raise BadInput(f"grammar_name: there is no grammar {_quoted(name)}; these exist: {known}")
        return name

    async def _unenforced(self, request: JobRequest) -> tuple[str, ...]:
        """JSON pointers to the keywords of its schema that cannot be enforced while decoding. Raises BadInput."""
        wanted = request.response_format
        if wanted is None or isinstance(wanted, AnyText):
            return ()
        if (request.grammar_name or "").strip():
            raise BadInput("response_format: a reply can be held to it or to grammar_name, not to both")
        if isinstance(wanted, JsonSchema) and (wanted.json_schema is None) == (wanted.schema is None):
            raise BadInput("response_format: expected the schema in json_schema.schema, or in schema, and not in both")
        schema = wanted_schema(wanted)
        return () if schema is None else await self._schemas.validate(schema)


def _trimmed(request: JobRequest) -> JobRequest:
    """The request with trimmed texts. Raises BadInput where there is nothing to store."""
    content, system_prompt = (request.content or "").strip(), (request.system_prompt or "").strip()
    context = request.assistant_context or ""
    if not content and not system_prompt:
        raise BadInput("content or system_prompt is required")
    if not content and context.strip():
        raise BadInput("assistant_context: stands before a prompt, so content is required too")
    return msgspec.structs.replace(
        request,
        content=content,
        system_prompt=system_prompt,
        assistant_context=context if context.strip() else "",
    )


def _inputs(request: JobRequest) -> list[Message]:
    messages = (("assistant", request.assistant_context), ("user", request.content))
    return [Message(role=role, content=content) for role, content in messages if content]


def _answer(new: submission.NewJob, accepted: submission.Accepted, *, created_new: bool | None = None) -> JobAccepted:
    return JobAccepted(
        ok=True,
        queued=accepted.job_id is not None,
        job_id=accepted.job_id,
        conversation_id=accepted.conversation_id,
        created_new=new.conversation_id is None if created_new is None else created_new,
        model=accepted.model,
        turn_id=accepted.turn_id,
    )


def _quoted(name: str) -> str:
    return f'"{name[:80]}{"…" if len(name) > 80 else ""}"'
