"""Reads the database without the product's code, and the journal that triggers write during a run.

The journal has every change of a job and its attempts in the order of the commits. The times in the rows do not show
that order: a process may be frozen between reading the clock and writing the row.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec

TERMINAL = ("done", "error", "cancelled")

JOURNAL = """
CREATE TABLE chaos_journal (
    n INTEGER PRIMARY KEY AUTOINCREMENT, what TEXT NOT NULL, job_id INTEGER NOT NULL, word TEXT, lease_token TEXT
);
CREATE TRIGGER chaos_status AFTER UPDATE OF status ON jobs BEGIN
    INSERT INTO chaos_journal (what, job_id, word) VALUES ('status', new.id, new.status);
END;
CREATE TRIGGER chaos_opened AFTER INSERT ON attempts BEGIN
    INSERT INTO chaos_journal (what, job_id, lease_token) VALUES ('opened', new.job_id, new.lease_token);
END;
CREATE TRIGGER chaos_closed AFTER UPDATE OF ended_at ON attempts BEGIN
    INSERT INTO chaos_journal (what, job_id, word, lease_token)
        VALUES ('closed', new.job_id, new.outcome, new.lease_token);
END;
"""


class Job(msgspec.Struct, kw_only=True):
    id: int
    conversation: int
    public_id: str
    turn: int
    model: str
    status: str
    max_attempts: int = 100
    omitted_messages: int = 0
    retry_of: int | None = None
    error_kind: str | None = None
    error: str | None = None
    processed_at: str | None = None
    content: str | None = None
    """Its prompt."""


class Message(NamedTuple):
    conversation: int
    place: int
    """Of its turn's four: system, context, prompt, reply. The run makes no branches, so each turn has one place."""
    role: str
    content: str
    job_id: int | None


class Attempt(NamedTuple):
    job_id: int
    attempt: int
    lease_token: str
    outcome: str | None
    kind: str | None = None


class Entry(NamedTuple):
    """A line of the journal."""

    what: str
    """`status`, `opened` or `closed`."""
    job_id: int
    word: str | None = None
    """The status, or the outcome of what was closed."""
    lease_token: str | None = None


class Record(NamedTuple):
    jobs: dict[int, Job]
    messages: list[Message]
    """By conversation and place."""
    attempts: list[Attempt]
    journal: list[Entry]


def keep_journal(database: Path) -> None:
    """Adds the journal's table and triggers to the database."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(JOURNAL)


def read(database: Path) -> Record:
    """Everything that the rules need, in one transaction."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.execute("BEGIN")
        joined = ("conversation", "public_id", "content", "turn")
        columns = [field for field in Job.__struct_fields__ if field not in joined]
        rows = connection.execute(
            "SELECT j.conversation_id, c.public_id, m.content, t.depth,"
            f" {', '.join(f'j.{column}' for column in columns)}"
            " FROM jobs j JOIN conversations c ON c.id = j.conversation_id LEFT JOIN turns t ON t.id = j.turn_id"
            " LEFT JOIN messages m ON m.turn_id = t.id AND m.role = 'user' ORDER BY j.id"
        )
        jobs = [
            Job(
                conversation=row[0],
                public_id=row[1],
                content=row[2],
                turn=row[3],
                **dict(zip(columns, row[4:], strict=True)),
            )
            for row in rows
        ]
        return Record(
            {job.id: job for job in jobs},
            [
                Message(*row)
                for row in connection.execute(
                    """
                    SELECT t.conversation_id, 4 * t.depth + CASE WHEN m.is_reply THEN 3 ELSE
                        CASE m.role WHEN 'system' THEN 0 WHEN 'assistant' THEN 1 ELSE 2 END END AS place,
                        m.role, m.content, CASE WHEN m.is_reply OR m.role = 'user' THEN j.id END
                    FROM messages m JOIN turns t ON t.id = m.turn_id LEFT JOIN jobs j ON j.turn_id = t.id
                    ORDER BY t.conversation_id, place
                    """
                )
            ],
            [
                Attempt(*row)
                for row in connection.execute(
                    "SELECT job_id, attempt, lease_token, outcome, kind FROM attempts ORDER BY job_id, attempt"
                )
            ],
            [
                Entry(*row)
                for row in connection.execute("SELECT what, job_id, word, lease_token FROM chaos_journal ORDER BY n")
            ],
        )


def n_open(database: Path) -> int:
    """How many jobs have not ended."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (found,) = connection.execute(
            "SELECT count(*) FROM jobs WHERE status NOT IN ('done', 'error', 'cancelled')"
        ).fetchone()
        return int(found)
