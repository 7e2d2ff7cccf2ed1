"""The invariants of the record, each as a query that must return no row. `llamalith check` runs them.

Read-only. The keys of RULES say each invariant in a sentence; the rows of its query violate it.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, text


class Violation(NamedTuple):
    rule: str
    rows: list[dict[str, object]]
    """The first MAX_ROWS rows that violate it."""


MAX_ROWS = 20

INDEX_OF_WORDS = (
    "the index of words has each title, each prompt and reply up to the newest that it has, and nothing else"
)
RULES = {
    "a done job has exactly one reply, the last message of its own turn": """
        SELECT j.id AS job_id, j.status, count(m.position) AS replies FROM jobs j
        LEFT JOIN messages m ON m.turn_id = j.turn_id AND m.is_reply
            AND NOT EXISTS (SELECT 1 FROM messages b WHERE b.turn_id = m.turn_id AND b.position > m.position)
        WHERE j.status = 'done' GROUP BY j.id HAVING count(m.position) <> 1""",
    "a job that is not done has no reply": """
        SELECT j.id AS job_id, j.status FROM jobs j
        JOIN messages m ON m.turn_id = j.turn_id AND m.is_reply WHERE j.status <> 'done'""",
    "a turn has a digest exactly where it has a reply, and only a job writes a reply": """
        SELECT t.id AS turn_id, t.digest, j.id AS job_id FROM turns t
        LEFT JOIN messages m ON m.turn_id = t.id AND m.is_reply LEFT JOIN jobs j ON j.turn_id = t.id
        WHERE (t.digest IS NULL) <> (m.turn_id IS NULL) OR (m.turn_id IS NOT NULL AND j.id IS NULL)""",
    "only a job that was cancelled or ended in an error has a partial reply": """
        SELECT id AS job_id, status FROM jobs WHERE (partial IS NOT NULL OR partial_thinking IS NOT NULL)
        AND status NOT IN ('cancelled', 'error')""",
    "only an assistant's message has thinking, and only thinking takes time": """
        SELECT turn_id, position, role FROM messages
        WHERE (thinking IS NOT NULL AND role <> 'assistant') OR (thinking_s IS NOT NULL AND thinking IS NULL)""",
    "an attempt was cancelled only where its job was": """
        SELECT a.job_id, a.attempt, j.status FROM attempts a JOIN jobs j ON j.id = a.job_id
        WHERE a.outcome = 'cancelled' AND (j.status <> 'cancelled' OR a.attempt <> j.attempt)""",
    "each job has something to answer in its turn": """
        SELECT j.id AS job_id, j.turn_id FROM jobs j WHERE NOT EXISTS (SELECT 1 FROM messages m
            WHERE m.turn_id = j.turn_id AND NOT m.is_reply AND m.role <> 'system')""",
    "the messages of a turn stand at positions 0, 1, 2, …": """
        SELECT turn_id, count(*) AS messages, min(position) AS first, max(position) AS last FROM messages
        GROUP BY turn_id HAVING min(position) <> 0 OR max(position) <> count(*) - 1""",
    "a turn's parent is an earlier turn of the same owner with a smaller depth": """
        SELECT t.id AS turn_id, p.id AS parent_id FROM turns t JOIN conversations c ON c.id = t.conversation_id
        JOIN turns p ON p.id = t.parent_id JOIN conversations d ON d.id = p.conversation_id
        WHERE p.id >= t.id OR p.depth >= t.depth OR c.owner_id <> d.owner_id""",
    "the head of a conversation is one of its turns": """
        SELECT c.id AS conversation_id, c.head_turn_id FROM conversations c LEFT JOIN turns t
            ON t.id = c.head_turn_id AND t.conversation_id = c.id WHERE t.id IS NULL""",
    "the system message in force is the nearest one on the path within the conversation": """
        SELECT t.id AS turn_id, t.system_turn_id FROM turns t
        LEFT JOIN messages m ON m.turn_id = t.id AND m.position = 0 AND m.role = 'system'
        LEFT JOIN turns p ON p.id = t.parent_id AND p.conversation_id = t.conversation_id
        WHERE coalesce(t.system_turn_id, 0) <> CASE WHEN m.turn_id IS NOT NULL THEN t.id
            ELSE coalesce(p.system_turn_id, 0) END""",
    "a job runs only when nothing earlier in its conversation is open": """
        SELECT j.id AS job_id, e.id AS earlier_job_id FROM jobs j JOIN jobs e
            ON e.conversation_id = j.conversation_id AND e.id < j.id
            AND e.status IN ('queued', 'processing')
        WHERE j.status = 'processing'""",
    "an open job is the first in its lane exactly where nothing earlier in its conversation is open": """
        SELECT j.id AS job_id, j.is_head FROM jobs j WHERE j.status IN ('queued', 'processing')
        AND j.is_head = EXISTS (SELECT 1 FROM jobs e WHERE e.conversation_id = j.conversation_id
            AND e.id < j.id AND e.status IN ('queued', 'processing'))""",
    "a job retries one of its own conversation that ended without a reply, or that has expired": """
        SELECT j.id AS job_id, j.retry_of, e.status FROM jobs j LEFT JOIN jobs e
            ON e.id = j.retry_of
        WHERE j.retry_of >= j.id OR e.conversation_id <> j.conversation_id
            OR e.status NOT IN ('error', 'cancelled')""",
    "a job counts its attempts": """
        SELECT j.id AS job_id, j.attempt, count(a.attempt) AS attempts, max(a.attempt) AS last FROM jobs j
        LEFT JOIN attempts a ON a.job_id = j.id GROUP BY j.id
        HAVING count(a.attempt) <> j.attempt OR coalesce(max(a.attempt), 0) <> j.attempt""",
    "a job spends no more than its max_attempts": """
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
    INDEX_OF_WORDS: """
        SELECT coalesce(wanted.id, d.id) AS place, d.id IS NOT NULL AS is_indexed FROM (
            SELECT (turn_id << 20) | position AS id, rowid AS number FROM messages WHERE role IN ('user', 'assistant')
            UNION ALL SELECT -id, -1 FROM conversations WHERE title IS NOT NULL
        ) AS wanted FULL JOIN texts_docsize d ON d.id = wanted.id WHERE wanted.id IS NULL OR (d.id IS NULL
            AND wanted.number < coalesce((SELECT m.rowid FROM messages m CROSS JOIN texts_docsize i
                ON i.id = (m.turn_id << 20) | m.position ORDER BY m.rowid DESC LIMIT 1), 0))""",
    "foreign keys hold": "PRAGMA foreign_key_check",
}
SQLITE_ONLY = {"foreign keys hold", INDEX_OF_WORDS}
"""PostgreSQL enforces foreign keys for every connection, SQLite only for those that turn it on; and it has no index of
words yet."""


def row_counts(connection: Connection) -> dict[str, int]:
    """The number of rows in each table, and of jobs in each status."""
    found = {
        table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608 - fixed names
        for table in ("conversations", "turns", "messages", "jobs", "attempts")
    }
    for status, n_jobs in connection.execute(text("SELECT status, count(*) FROM jobs GROUP BY status")):
        found[f"jobs {status}"] = n_jobs
    return found


def violations(connection: Connection) -> list[Violation]:
    """The violated rules, each with its first rows."""
    found = []
    for rule, query in RULES.items():
        if rule in SQLITE_ONLY and connection.dialect.name != "sqlite":
            continue
        rows = [dict(row) for row in connection.execute(text(query)).mappings().fetchmany(MAX_ROWS)]
        if rows:
            found.append(Violation(rule, rows))
    return found
