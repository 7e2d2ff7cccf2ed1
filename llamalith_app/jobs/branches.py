"""What people do with the branches of a conversation: select one, fork, delete a turn, change a prompt that waits.

Called by the controllers of API and pages. Prompts beside others go through `jobs/submit.py`. Knows no HTTP.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection

from llamalith_app.contracts.conversations import Head
from llamalith_app.errors import BadInput, JobStarted, NotFound
from llamalith_app.store import keys, retention, tree
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.keys import Key


class Branches:
    """All methods raise StorageUnavailable, and NotFound for what is not there or not this owner's."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def select(self, owner_id: int, conversation_id: str, turn_id: int) -> Head:
        """Shows the branch through this turn, to its newest turn."""
        head = await self._database.write(tree.select_branch, owner_id, conversation_id, turn_id)
        return _answer(conversation_id, head)

    async def fork(
        self, owner_id: int, conversation_id: str, turn_id: int, new_id: str = "", *, key: Key | None = None
    ) -> Head:
        """A new conversation that continues this turn; a blank `new_id`: a UUID. Raises JobOpen, ConversationExists,
        KeyReused."""

        def make(connection: Connection, now: datetime) -> Head:
            def fork() -> Head:
                made = submission.fork(connection, owner_id, conversation_id, turn_id, new_id.strip() or None, now)
                return _answer(made.conversation_id, made.head_turn_id)

            return keys.answer_once(connection, key, now, Head, fork)

        return await self._database.write(make, datetime.now(UTC))

    async def delete_turn(self, owner_id: int, conversation_id: str, turn_id: int) -> Head:
        """Deletes a turn whose job has ended. Raises JobOpen, TurnInUse."""
        head = await self._database.write(retention.delete_turn, owner_id, conversation_id, turn_id)
        return _answer(conversation_id, head)

    async def edit_prompt(self, owner_id: int, job_id: int, content: str) -> None:
        """Changes the prompt of a job that waits for its first start. Raises BadInput, JobStarted."""
        if not content.strip():
            raise BadInput("content is required")
        edited = await self._database.write(transitions.edit_prompt, owner_id, job_id, content.strip())
        if edited is None:
            raise NotFound("Job not found")
        if not edited:
            raise JobStarted(
                f"Job {job_id} has been started: its prompt stays. Send a prompt beside it, with the same parent."
            )


def _answer(conversation_id: str, head: int) -> Head:
    return Head(ok=True, conversation_id=conversation_id.strip(), head=head)
