"""The only way in: judge a prompt, put it on disk, answer, and let the hint go out beside the answer.

Every door (API, reply, legacy submit, later pages and schedules) comes through `Submissions`. Knows no HTTP and no
engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from llamalith_app.contracts.jobs import JobAccepted, PriorityWord
from llamalith_app.errors import BadInput
from llamalith_app.jobs.queue import Hints
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
    ) -> None:
        self._database = database
        self._hints = hints
        self._models = models
        self._grammars = grammars
        self._max_attempts = max_attempts

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
    ) -> JobAccepted:
        """Accepted means on disk. Raises BadInput, or StorageUnavailable with nothing stored."""
        content = content.strip()
        system_prompt = (system_prompt or "").strip()
        if not content and not system_prompt:
            raise BadInput("content or system_prompt is required")
        given_id = (conversation_id or "").strip() or None
        chosen_model = self._model((model or "").strip())
        accepted = await self._database.write(
            jobs.submit,
            jobs.Prompt(
                owner_id=owner_id,
                conversation_id=given_id,
                content=content,
                system_prompt=system_prompt,
                context=assistant_context if assistant_context and assistant_context.strip() else "",
                model=chosen_model,
                grammar_name=self._grammar((grammar_name or "").strip()),
                request_id=request_id,
                priority=Priority[priority.upper()],
                max_attempts=self._max_attempts,
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


def _quoted(name: str) -> str:
    return f'"{name[:80]}{"…" if len(name) > 80 else ""}"'
