"""Reads all that the record has of one job: what was sent, each attempt, and the turn that it continues.

Writes nothing. Runs in a snapshot of `store/database.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, select

from llamalith_app.contracts.jobs import Attempt, Job
from llamalith_app.store import turns
from llamalith_app.store.jobs import reads
from llamalith_app.store.tables import TurnRow


class JobDetails(NamedTuple):
    job: Job
    """With whole texts."""
    context: str
    """The context message before its prompt; empty: there is none."""
    parent_turn: int | None
    """The turn that its turn continues; None: it begins its conversation, or what stood before has expired."""
    attempts: list[Attempt]


def job_details(connection: Connection, owner_id: int, job_id: int) -> JobDetails | None:
    """None: no such job of this owner."""
    job = reads.job_by_id(connection, owner_id, job_id)
    if job is None:
        return None
    parent_id = connection.execute(select(TurnRow.parent_id).where(TurnRow.id == job.turn_id)).scalar_one()
    inputs = turns.inputs(connection, job.turn_id)
    context = next((message.content for message in inputs if message.role == "assistant"), "")
    return JobDetails(job, context, parent_id, reads.attempts(connection, owner_id, job_id) or [])
