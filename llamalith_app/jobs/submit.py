"""The only way in: judge a prompt, put it on disk, answer, and let the hint go out beside the answer.

Every door (API, reply, legacy submit, later pages and schedules) comes through `Submissions`. Knows no HTTP and no
engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from llamalith_app.contracts.jobs import JobAccepted
from llamalith_app.contracts.parameters import AnyText, JsonSchema, Parameters
from llamalith_app.errors import BadInput
from llamalith_app.jobs.queue import Hints
from llamalith_app.jobs.schemas import SchemaJudge
from llamalith_app.store import jobs
from llamalith_app.store.database import Database

NORMAL = 1
"""The priority of every job until classes exist."""


class Submissions:
    def __init__(
        self,
        database: Database,
        hints: Hints,
        *,
        models: tuple[str, ...],
        grammars: Mapping[str, str],
        max_attempts: int,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
    ) -> None:
        self._database = database
        self._hints = hints
        self._models = models
        self._grammars = grammars
        self._max_attempts = max_attempts
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
        parameters: Parameters | None = None,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
    ) -> JobAccepted:
        """Accepted means on disk. Raises BadInput, JudgeBusy or StorageUnavailable with nothing stored."""
        content = content.strip()
        system_prompt = (system_prompt or "").strip()
        if not content and not system_prompt:
            raise BadInput("content or system_prompt is required")
        given_id = (conversation_id or "").strip() or None
        chosen_model = self._model((model or "").strip())
        chosen_grammar = self._grammar((grammar_name or "").strip())
        await self._judge(parameters, chosen_grammar)
        accepted = await self._database.write(
            jobs.submit,
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
                priority=NORMAL,
                max_attempts=self._max_attempts,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
                queue_timeout_s=self._queue_timeout_s if queue_timeout_s is None else queue_timeout_s,
            ),
            datetime.now(UTC),
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
