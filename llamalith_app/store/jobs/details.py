"""Reads all that the record has of one job: what was sent, each attempt, and the turn that it continues.

Writes nothing. Runs in a snapshot of `store/database.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, select

from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import Attempt, Job
from llamalith_app.store import turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import TurnRow


class JobDetails(NamedTuple):
    job: Job
    """With whole texts."""
    before: list[Message]
    """What its client sent before the prompt, without a system prompt."""
    parent_turn: int | None
    """The turn that its turn continues; None: it begins its conversation, or what stood before has expired."""
    attempts: list[Attempt]

    @property
    def is_of_one_prompt(self) -> bool:
        """Its client sent a prompt, with a context message at most."""
        return not self.before or bool(self.context)

    @property
    def context(self) -> str:
        """The one message of an assistant before its prompt; empty: there is none, or there are others."""
        return self.before[0].content if [message.role for message in self.before] == ["assistant"] else ""


def job_details(connection: Connection, owner_id: int, job_id: int) -> JobDetails | None:
    """None: no such job of this owner."""
    job = reads.job_by_id(connection, owner_id, job_id)
    if job is None:
        return None
    parent_id = connection.execute(select(TurnRow.parent_id).where(TurnRow.id == job.turn_id)).scalar_one()
    inputs = turns.inputs(connection, job.turn_id)
    prompt = max((at for at, message in enumerate(inputs) if message.role == "user"), default=None)
    system = 0 if inputs and inputs[0].role == "system" else None
    before = [message for at, message in enumerate(inputs) if at not in (prompt, system)]
    return JobDetails(job, before, parent_id, reads.attempts(connection, owner_id, job_id) or [])
