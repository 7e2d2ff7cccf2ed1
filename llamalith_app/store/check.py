"""The invariants of the record, as queries that must return nothing; `llamalith check` runs them.

Read-only. RULES names each promise in a sentence; a row found by its query breaks it.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, text


class Broken(NamedTuple):
    rule: str
    rows: list[dict[str, object]]
    """The first of them."""


SHOWN = 20

RULES = {
    "a done job has exactly one reply, in its own conversation and place": """
        SELECT j.id AS job_id, j.status, count(m.id) AS replies FROM jobs j
        LEFT JOIN messages m ON m.job_id = j.id AND m.role = 'assistant'
            AND m.conversation_id = j.conversation_id AND m.place = 4 * j.turn + 3
        WHERE j.status = 'done' GROUP BY j.id HAVING count(m.id) <> 1""",
    "a job that is not done has no reply": """
        SELECT j.id AS job_id, j.status, m.id AS message_id FROM jobs j
        JOIN messages m ON m.job_id = j.id AND m.role = 'assistant' WHERE j.status <> 'done'""",
    "only what was cancelled or ended in an error keeps a part of a reply": """
        SELECT id AS job_id, status FROM jobs WHERE partial IS NOT NULL AND status NOT IN ('cancelled', 'error')""",
    "an attempt was cancelled only where its job was": """
        SELECT a.job_id, a.attempt, j.status FROM attempts a JOIN jobs j ON j.id = a.job_id
        WHERE a.outcome = 'cancelled' AND (j.status <> 'cancelled' OR a.attempt <> j.attempt)""",
    "each job has its prompt, in its own conversation and place": """
        SELECT j.id AS job_id, j.conversation_id, j.turn FROM jobs j
        LEFT JOIN messages m ON m.job_id = j.id AND m.role = 'user'
            AND m.conversation_id = j.conversation_id AND m.place = 4 * j.turn + 2
        WHERE m.id IS NULL""",
    "jobs of a conversation stand in the order in which they were accepted": """
        SELECT a.id AS job_id, b.id AS later_job_id FROM jobs a JOIN jobs b
            ON b.conversation_id = a.conversation_id AND b.turn > a.turn AND b.id < a.id""",
    "a job runs only when nothing earlier in its conversation is open": """
        SELECT j.id AS job_id, e.id AS earlier_job_id FROM jobs j JOIN jobs e
            ON e.conversation_id = j.conversation_id AND e.turn < j.turn
            AND e.status IN ('queued', 'processing')
        WHERE j.status = 'processing'""",
    "an open job is the head of its conversation exactly where nothing earlier in it is open": """
        SELECT j.id AS job_id, j.is_head FROM jobs j WHERE j.status IN ('queued', 'processing')
        AND j.is_head = EXISTS (SELECT 1 FROM jobs e WHERE e.conversation_id = j.conversation_id
            AND e.turn < j.turn AND e.status IN ('queued', 'processing'))""",
    "a job tries again one of its own conversation that ended without a reply, or that is gone": """
        SELECT j.id AS job_id, j.retry_of, e.status FROM jobs j LEFT JOIN jobs e
            ON e.id = j.retry_of
        WHERE j.retry_of >= j.id OR e.conversation_id <> j.conversation_id OR e.turn >= j.turn
            OR e.status NOT IN ('error', 'cancelled')""",
    "a job counts its attempts": """
        SELECT j.id AS job_id, j.attempt, count(a.attempt) AS attempts, max(a.attempt) AS last FROM jobs j
        LEFT JOIN attempts a ON a.job_id = j.id GROUP BY j.id
        HAVING count(a.attempt) <> j.attempt OR coalesce(max(a.attempt), 0) <> j.attempt""",
    "a job spends no more attempts than it has": """
        SELECT j.id AS job_id, j.max_attempts, count(*) AS spent FROM jobs j
        JOIN attempts a ON a.job_id = j.id AND a.outcome IN ('failed', 'lost')
        GROUP BY j.id HAVING count(*) > j.max_attempts""",
    "an attempt is open exactly while its job is processing under its lease": """
        SELECT a.job_id, a.attempt, a.outcome, j.status FROM attempts a JOIN jobs j ON j.id = a.job_id
        WHERE (a.ended_at IS NULL) <> (j.status = 'processing' AND j.lease_token = a.lease_token)""",
    "the last attempt of a done job is the one that did it, and the only one": """
        SELECT j.id AS job_id, j.attempt, a.outcome FROM jobs j
        LEFT JOIN attempts a ON a.job_id = j.id AND a.outcome = 'done'
        WHERE (j.status = 'done') <> (a.attempt IS NOT NULL) OR (j.status = 'done' AND a.attempt <> j.attempt)""",
    "a message stands below its conversation's next turn": """
        SELECT m.id AS message_id, m.place, c.next_turn FROM messages m
        JOIN conversations c ON c.id = m.conversation_id WHERE m.place >= 4 * c.next_turn OR m.place < 0""",
    "foreign keys hold": "PRAGMA foreign_key_check",
}
SQLITE_ONLY = {"foreign keys hold"}
"""PostgreSQL holds them whoever writes; SQLite only for connections that ask for it."""


def counts(connection: Connection) -> dict[str, int]:
    """Rows of each kind, jobs by status."""
    found = {
        table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608 - fixed names
        for table in ("conversations", "messages", "jobs", "attempts")
    }
    for status, n_jobs in connection.execute(text("SELECT status, count(*) FROM jobs GROUP BY status")):
        found[f"jobs {status}"] = n_jobs
    return found


def broken(connection: Connection) -> list[Broken]:
    """The rules that do not hold, each with its first rows."""
    found = []
    for rule, query in RULES.items():
        if rule in SQLITE_ONLY and connection.dialect.name != "sqlite":
            continue
        rows = [dict(row) for row in connection.execute(text(query)).mappings().fetchmany(SHOWN)]
        if rows:
            found.append(Broken(rule, rows))
    return found
