"""Writes a database as after long use, in bulk: many ended jobs, and waiting ones on top.

Fills the tables as `store/jobs/` would, without calling it a million times. tests/test_bench.py checks the result
against the invariants.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llamalith_app.store.migrate import migrate

MODELS = ("one", "two")
SOME_WORDS = (
    "The quick brown fox jumps over the lazy dog while the small language model waits for its turn in the queue. "
)
PROMPT_CHARS, REPLY_CHARS = 150, 300
_AT = "2026-11-24 12:00:00.000000"


class Shape(NamedTuple):
    """How jobs wait: so many conversations with so many jobs each."""

    n_conversations: int
    n_each: int
    is_blocked: bool = False
    """One job of each conversation is processing, so none of the waiting ones may start."""
    is_mixed: bool = True
    """Spread over all models and classes; else all of the first model and class `normal`."""

    def __str__(self) -> str:
        held = ", one of each processing" if self.is_blocked else ""
        return f"{self.n_conversations:,} x {self.n_each:,} queued{held}"


@contextmanager
def writing(path: Path, n_numbers: int) -> Iterator[sqlite3.Connection]:
    """One transaction, with a temporary table `n(i)` of the numbers from 0."""
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("synchronous = OFF", "cache_size = -500000", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TEMP TABLE n (i INTEGER PRIMARY KEY)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO n VALUES (?)", ((i,) for i in range(n_numbers)))
    yield connection
    connection.execute("COMMIT")
    connection.close()


def build(path: Path, n_jobs: int, n_conversations: int, texts: Sequence[tuple[str, str]] = ()) -> None:
    """Writes ended jobs with prompt, reply and one attempt; the turns of a conversation lie far apart.

    As many of them as make the same number of turns in each conversation. `texts`: prompts and replies, which the turns
    have by turns, each with a word of its own; empty: all have SOME_WORDS.
    """
    migrate(path)
    n_turns = n_jobs // n_conversations
    of = {"conversations": n_conversations, "turns": n_turns, "at": _AT}
    with writing(path, n_turns * n_conversations) as connection:
        connection.execute(
            "INSERT INTO conversations (owner_id, public_id, created_at, head_turn_id)"
            " SELECT 1, 'c' || i, :at, (:turns - 1) * :conversations + i + 1 FROM n WHERE i < :conversations",
            of,
        )
        connection.execute(
            "INSERT INTO turns (id, conversation_id, parent_id, depth, digest, created_at)"
            " SELECT i + 1, 1 + i % :conversations, CASE WHEN i >= :conversations THEN i + 1 - :conversations END,"
            " i / :conversations, lower(hex(randomblob(32))), :at FROM n ORDER BY i",
            of,
        )
        connection.execute(
            "INSERT INTO workers (host, pid, lock_path, models, n_slots, heartbeat, started_at, seen_at, ended_at)"
            " VALUES ('bench', 1, '', '[]', 1, 0, :at, :at, :at)",
            of,
        )
        connection.execute(
            "INSERT INTO jobs (conversation_id, owner_id, turn_id, model, system_prompt, priority, request_id,"
            " max_attempts, status, attempt, not_before, heartbeat, worker_id, finish_reason, prompt_tokens,"
            " completion_tokens, omitted_messages, is_head, created_at, started_at, processed_at)"
            " SELECT 1 + i % :conversations, 1, i + 1, CASE i % 2 WHEN 0 THEN 'one' ELSE 'two' END, '',"
            " i % 3, 'r' || i, 3, 'done', 1, :at, 0, 1, 'stop', 40, 64, 0, 1, :at, :at, :at FROM n ORDER BY i",
            of,
        )
        connection.execute(
            "INSERT INTO attempts (job_id, attempt, worker_id, lease_token, started_at, ended_at, outcome)"
            " SELECT id, 1, 1, lower(hex(randomblob(16))), started_at, processed_at, 'done' FROM jobs"
        )
        if not texts:
            _insert_messages(connection, 0, "user", PROMPT_CHARS, of_open_jobs=False)
            _insert_messages(connection, 1, "assistant", REPLY_CHARS, of_open_jobs=False)
            return
        connection.executemany(
            "INSERT INTO messages (turn_id, position, role, content, is_reply, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (
                (turn, position, role, f"{texts[turn % len(texts)][position]} rare{turn}", position, _AT)
                for turn in range(1, n_turns * n_conversations + 1)
                for position, role in enumerate(("user", "assistant"))
            ),
        )


def _insert_messages(
    connection: sqlite3.Connection, position: int, role: str, n_chars: int, *, of_open_jobs: bool
) -> None:
    connection.execute(
        "INSERT INTO messages (turn_id, position, role, content, is_reply, created_at)"
        " SELECT turn_id, :position, :role, substr(id || ' ' || :words, 1, :n), :position, created_at"
        " FROM jobs WHERE (status IN ('queued', 'processing')) = :open",
        {"position": position, "role": role, "n": n_chars, "words": SOME_WORDS * 3, "open": of_open_jobs},
    )


def _add_turns(connection: sqlite3.Connection, n_conversations: int, n_each: int) -> int:
    """Behind the heads of the first conversations, all of the first turns before the second ones. The id before the
    first of them."""
    (base,) = connection.execute("SELECT max(id) FROM turns").fetchone()
    of = {"base": base, "conversations": n_conversations, "each": n_each, "at": _AT}
    connection.execute(
        "INSERT INTO turns (id, conversation_id, parent_id, depth, created_at)"
        " SELECT :base + 1 + i, c.id, CASE WHEN i < :conversations THEN h.id ELSE :base + 1 + i - :conversations END,"
        " h.depth + 1 + i / :conversations, :at"
        " FROM n JOIN conversations c ON c.id = 1 + i % :conversations JOIN turns h ON h.id = c.head_turn_id"
        " WHERE i < :conversations * :each ORDER BY i",
        of,
    )
    connection.execute(
        "UPDATE conversations SET head_turn_id = :base + (:each - 1) * :conversations + id WHERE id <= :conversations",
        of,
    )
    return int(base)


def let_wait(path: Path, shape: Shape) -> int:
    """Queues that many jobs in the first conversations; returns the id of the last."""
    of = {
        "conversations": shape.n_conversations,
        "at": _AT,
        "blocked": shape.is_blocked,
        "mixed": shape.is_mixed,
    }
    with writing(path, shape.n_conversations * shape.n_each) as connection:
        if shape.is_blocked:
            of["base"] = _add_turns(connection, shape.n_conversations, 1)
            connection.execute(
                "INSERT INTO jobs (conversation_id, owner_id, turn_id, model, system_prompt, priority, request_id,"
                " max_attempts, status, attempt, not_before, heartbeat, omitted_messages, is_head, created_at,"
                " lease_token, worker_id, started_at)"
                " SELECT id, 1, :base + id, 'one', '', 1, 'r', 3, 'processing', 1, :at, 0, 0, 1, :at,"
                " lower(hex(randomblob(16))), 1, :at FROM conversations WHERE id <= :conversations",
                of,
            )
            connection.execute(
                "INSERT INTO attempts (job_id, attempt, worker_id, lease_token, started_at)"
                " SELECT id, 1, 1, lease_token, started_at FROM jobs WHERE status = 'processing'"
            )
        of["base"] = _add_turns(connection, shape.n_conversations, shape.n_each)
        connection.execute(
            "INSERT INTO jobs (conversation_id, owner_id, turn_id, model, system_prompt, priority, request_id,"
            " max_attempts, status, attempt, not_before, heartbeat, omitted_messages, is_head, created_at)"
            " SELECT 1 + i % :conversations, 1, :base + 1 + i,"
            " CASE :mixed * i % 2 WHEN 0 THEN 'one' ELSE 'two' END, '', CASE WHEN :mixed THEN i / 2 % 3 ELSE 1 END,"
            " 'r', 3, 'queued', 0, :at, 0, 0, i < :conversations AND NOT :blocked, :at"
            " FROM n ORDER BY i",
            of,
        )
        _insert_messages(connection, 0, "user", PROMPT_CHARS, of_open_jobs=True)
        last: int = connection.execute("SELECT max(id) FROM jobs").fetchone()[0]
    return last


def let_nothing_wait(path: Path) -> None:
    """Deletes all open jobs."""
    with writing(path, 0) as connection:
        connection.execute(
            "CREATE TEMP TABLE gone AS SELECT id, turn_id, conversation_id FROM jobs"
            " WHERE status IN ('queued', 'processing')"
        )
        connection.execute("DELETE FROM messages WHERE turn_id IN (SELECT turn_id FROM gone)")
        connection.execute("DELETE FROM turns WHERE id IN (SELECT turn_id FROM gone)")
        connection.execute(
            "UPDATE conversations SET head_turn_id ="
            " (SELECT max(id) FROM turns WHERE conversation_id = conversations.id)"
            " WHERE id IN (SELECT conversation_id FROM gone)"
        )
        connection.execute("DELETE FROM attempts WHERE job_id IN (SELECT id FROM gone)")
        connection.execute("DELETE FROM jobs WHERE id IN (SELECT id FROM gone)")
