"""The only way in: judge a prompt, put it on disk, answer, and let the hint go out beside the answer.

Every door (API, reply, legacy submit, later pages and schedules) comes through `Submissions`. Knows no HTTP and no
engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime

from llamalith_app.contracts.jobs import JobAccepted, PriorityWord
from llamalith_app.contracts.parameters import AnyText, JsonSchema, Parameters
from llamalith_app.errors import BadInput, QueueFull
from llamalith_app.jobs.forecast import Forecasts
from llamalith_app.jobs.queue import Hints
from llamalith_app.jobs.schemas import SchemaJudge
from llamalith_app.store import jobs
from llamalith_app.store.database import Database
from llamalith_app.store.tables import Priority


class Submissions:
    def __init__(
        self,
        database: Database,
        hints: Hints,
        *,
        models: tuple[str, ...],
        grammars: Mapping[str, str],
        max_attempts: int,
        timeout_s: float | None,
        queue_timeout_s: float | None,
        max_queued: int,
        forecasts: Forecasts,
    ) -> None:
        self._database = database
        self._hints = hints
        self._models = models
        self._grammars = grammars
        self._max_attempts = max_attempts
        self._max_queued = max_queued
        self._forecasts = forecasts
        self._uncounted: dict[int, int] = {}
        """By owner: jobs that can be taken before those that wait are counted again."""
        self._counting = asyncio.Lock()
        self._schemas = SchemaJudge()
        self._timeout_s = timeout_s
        self._queue_timeout_s = queue_timeout_s

    async def submit(
        self,
        owner_id: int,
        request_id: str,
        *,
        content: str,
        conversation_id: str | None = None,
        model: str | None = None,
        system_prompt: str | None = None,
        assistant_context: str | None = None,
        grammar_name: str | None = None,
        priority: PriorityWord = "normal",
        parameters: Parameters | None = None,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
    ) -> JobAccepted:
        """Accepted means on disk. Raises BadInput, JudgeBusy, QueueFull or StorageUnavailable with nothing stored."""
        content = content.strip()
        system_prompt = (system_prompt or "").strip()
        if not content and not system_prompt:
            raise BadInput("content or system_prompt is required")
        given_id = (conversation_id or "").strip() or None
        chosen_model = self._model((model or "").strip())
        chosen_grammar = self._grammar((grammar_name or "").strip())
        await self._judge(parameters, chosen_grammar)
        accepted = await self._store(
            jobs.Prompt(
                owner_id=owner_id,
                conversation_id=given_id,
                content=content,
                system_prompt=system_prompt,
                context=assistant_context if assistant_context and assistant_context.strip() else "",
                model=chosen_model,
                grammar_name=chosen_grammar,
                parameters=parameters,
                request_id=request_id,
                priority=Priority[priority.upper()],
                max_attempts=self._max_attempts,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
                queue_timeout_s=self._queue_timeout_s if queue_timeout_s is None else queue_timeout_s,
            )
        )
        if accepted.job_id is not None:
            self._hints.send(chosen_model, accepted.job_id)
        return JobAccepted(
            ok=True,
            queued=accepted.job_id is not None,
            job_id=accepted.job_id,
            conversation_id=accepted.conversation_id,
            created_new=given_id is None,
            model=chosen_model,
        )

    async def _store(self, prompt: jobs.Prompt) -> jobs.Accepted:
        """Counting a long queue costs more than an accept, so each count is good for half of the room that it found."""
        if not prompt.content or self._take_uncounted(prompt.owner_id):
            return await self._database.write(jobs.submit, prompt, datetime.now(UTC))
        async with self._counting:
            if self._take_uncounted(prompt.owner_id):
                return await self._database.write(jobs.submit, prompt, datetime.now(UTC))
            accepted, n_queued = await self._database.write(
                jobs.submit_if_room, prompt, datetime.now(UTC), self._max_queued
            )
            self._uncounted[prompt.owner_id] = max(0, self._max_queued - n_queued) // 2
        if accepted is None:
            raise QueueFull(self._max_queued, await self._forecasts.retry_after_s())
        return accepted

    def _take_uncounted(self, owner_id: int) -> bool:
        left = self._uncounted.get(owner_id, 0)
        self._uncounted[owner_id] = max(0, left - 1)
        return left > 0

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

    async def _judge(self, parameters: Parameters | None, grammar: str | None) -> None:
        wanted = None if parameters is None else parameters.response_format
        if wanted is None or isinstance(wanted, AnyText):
            return
        if grammar is not None:
            raise BadInput("response_format: a reply can be held to it or to grammar_name, not to both")
        if isinstance(wanted, JsonSchema):
            await self._schemas.judge(wanted.json_schema.schema)


def _quoted(name: str) -> str:
    return f'"{name[:80]}{"…" if len(name) > 80 else ""}"'
