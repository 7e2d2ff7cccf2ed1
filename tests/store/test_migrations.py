"""Migrations of databases that have rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from sqlalchemy import text

from llamalith_app.contracts.conversations import Message
from llamalith_app.errors import StorageUnavailable
from llamalith_app.store import check, conversation_list, conversations, search, turns
from llamalith_app.store.conversation_list import Filter
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.migrate import commands, migrate
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, prompt


def test_the_first_open_job_of_each_conversation_becomes_the_first_in_its_lane(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    engine = write_engine(path)
    commands(engine).upgrade("0004")
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO conversations (owner_id, public_id, next_turn, created_at)"
                " VALUES (1, 'a', 3, '2026-11-24'), (1, 'b', 2, '2026-11-24')"
            )
        )
        for conversation, turn, status in ((1, 0, "cancelled"), (1, 1, "queued"), (1, 2, "queued"), (2, 1, "queued")):
            connection.execute(
                text(
                    "INSERT INTO jobs (conversation_id, owner_id, turn, model, system_prompt, priority, request_id,"
                    " max_attempts, status, attempt, not_before, beat, omitted_messages, created_at, processed_at)"
                    " VALUES (:conversation, 1, :turn, 'm', '', 1, 'r', 3, :status, 0, '2026-11-24', 0, 0,"
                    " '2026-11-24', CASE :status WHEN 'cancelled' THEN '2026-11-24' END)"
                ),
                {"conversation": conversation, "turn": turn, "status": status},
            )
            connection.execute(
                text(
                    "INSERT INTO messages (conversation_id, place, role, content, job_id, created_at)"
                    " SELECT conversation_id, 4 * turn + 2, 'user', 'hello', id, created_at FROM jobs"
                    " ORDER BY id DESC LIMIT 1"
                )
            )
    engine.dispose()
    assert migrate(path)
    with write_engine(path).connect() as connection:
        first_ones = connection.execute(text("SELECT id FROM jobs WHERE status = 'queued' AND is_head = 1 ORDER BY id"))
        assert list(first_ones.scalars()) == [2, 4]
        assert check.violations(connection) == []


class Old(NamedTuple):
    """A turn as it was stored before turns became rows."""

    number: int
    texts: tuple[tuple[str, str], ...]
    """Role and content by position; empty: the turn has expired."""
    status: str | None
    """The status of its job; None: it has no job, or that has expired."""


def old_turns(conversation: int, n_turns: int) -> Iterator[Old]:
    """Every kind of turn, in a different order in each conversation."""
    for number in range(n_turns):
        kind = (conversation * 7 + number * 3) % 11
        system, context = ("system", f"be {conversation % 3}{kind}"), ("assistant", f"so far {number}")
        asked, reply = ("user", f"prompt {conversation}.{number} \u2713"), ("assistant", f"reply {number}")
        if kind == 0:
            yield Old(number, (system,), None)
        elif kind == 1:
            yield Old(number, (), None)
        elif kind == 2:
            yield Old(number, (asked,), "cancelled")
        elif kind == 3:
            yield Old(number, (system, asked), "error")
        elif kind in (4, 5):
            yield Old(number, (context, asked, reply), "done")
        elif kind == 6:
            yield Old(number, (system, context, asked, reply), "done")
        else:
            yield Old(number, (asked, reply), "done")
    if conversation % 5 == 0:
        yield Old(n_turns, (("user", "waits"),), "queued")
        yield Old(n_turns + 1, (("assistant", "so far"), ("user", "waits too")), "queued")
    elif conversation % 5 == 1:
        yield Old(n_turns, (), None)


def store_old(path: Path, conversations_of: dict[int, list[Old]]) -> None:
    """Inserts the rows as the previous version wrote them."""
    engine = write_engine(path)
    commands(engine).upgrade("0009")
    engine.dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO workers (id, host, pid, lock_path, models, n_slots, beat, started_at, seen_at)"
            " VALUES (1, 'h', 1, '', '[]', 1, 0, '2026-11-24 00:00:00', '2026-11-24 00:00:00')"
        )
        for conversation, stored in conversations_of.items():
            connection.execute(
                "INSERT INTO conversations (id, owner_id, public_id, next_turn, created_at)"
                " VALUES (?, 1, ?, ?, '2026-11-24 00:00:00')",
                (conversation, f"c{conversation}", stored[-1].number + 1),
            )
            n_open = 0
            for turn in stored:
                at = f"2026-11-24 00:00:{turn.number % 60:02}"
                job_id = None
                if turn.status is not None:
                    is_open, is_done = turn.status == "queued", turn.status == "done"
                    job_id = connection.execute(
                        "INSERT INTO jobs (conversation_id, owner_id, turn, model, system_prompt, priority, request_id,"
                        " max_attempts, status, attempt, not_before, beat, omitted_messages, is_head, created_at,"
                        " processed_at, error, finish_reason) VALUES (?, 1, ?, 'm', '', 1, 'r', 3, ?, ?, ?, 0, 0, ?, ?,"
                        " ?, ?, ?)",
                        (
                            *(conversation, turn.number, turn.status, int(is_done), at, is_open and not n_open, at),
                            None if is_open else at,
                            "why" if turn.status == "error" else None,
                            "stop" if is_done else None,
                        ),
                    ).lastrowid
                    n_open += is_open
                    if is_done:
                        connection.execute(
                            "INSERT INTO attempts (job_id, attempt, worker_id, lease_token, started_at, ended_at,"
                            " outcome) VALUES (?, 1, 1, ?, ?, ?, 'done')",
                            (job_id, f"l{job_id}", at, at),
                        )
                places = {"system": 0, "user": 2}
                for n, (role, content) in enumerate(turn.texts):
                    is_reply = turn.status == "done" and n == len(turn.texts) - 1
                    place = 4 * turn.number + (3 if is_reply else places.get(role, 1))
                    connection.execute(
                        "INSERT INTO messages (conversation_id, place, role, content, job_id, created_at)"
                        " VALUES (?, ?, ?, ?, ?, ?)",
                        (conversation, place, role, content, job_id if is_reply or role == "user" else None, at),
                    )
        # The newest jobs have expired.
        connection.execute("UPDATE sqlite_sequence SET seq = seq + 1000 WHERE name = 'jobs'")


def was_read(stored: list[Old], number: int) -> list[tuple[str, str]]:
    """The messages that the job of that turn read in the previous version."""
    systems = [text for turn in stored if turn.number <= number for text in turn.texts if text[0] == "system"]
    rest = [
        text
        for turn in stored
        if turn.number == number or (turn.number < number and turn.status in (None, "done"))
        for text in (turn.texts[:-1] if turn.number == number and turn.status == "done" else turn.texts)
        if text[0] != "system"
    ]
    return [*systems[-1:], *rest]


@pytest.mark.parametrize(("n_conversations", "n_turns"), [(40, 12), pytest.param(4000, 25, marks=pytest.mark.slow)])
def test_every_turn_gets_its_place_in_the_tree(tmp_path: Path, n_conversations: int, n_turns: int) -> None:
    path = tmp_path / "old.db"
    stored = {number: list(old_turns(number, n_turns)) for number in range(1, n_conversations + 1)}
    store_old(path, stored)
    jobs_before = [
        {"heartbeat" if name == "beat" else name: value for name, value in row.items()}
        | {"partial_thinking": None, "thinking_tokens": None, "answers_now": None}
        for row in rows(path, "SELECT * FROM jobs ORDER BY id", without="turn")
    ]
    unknown = dict.fromkeys(transitions.AttemptTimes._fields)
    attempts_before = [row | unknown for row in rows(path, "SELECT * FROM attempts ORDER BY job_id, attempt")]
    assert migrate(path)
    assert rows(path, "SELECT * FROM jobs ORDER BY id", without="turn_id") == jobs_before
    assert rows(path, "SELECT * FROM attempts ORDER BY job_id, attempt") == attempts_before
    messages = rows(
        path,
        "SELECT t.conversation_id, t.depth, m.role, m.content, m.is_reply, m.created_at, m.thinking, m.thinking_s"
        " FROM messages m"
        " JOIN turns t ON t.id = m.turn_id ORDER BY t.conversation_id, t.depth, m.position",
    )
    assert messages == [
        {
            "conversation_id": conversation,
            "depth": turn.number,
            "role": role,
            "content": content,
            "is_reply": int(turn.status == "done" and n == len(turn.texts) - 1),
            "created_at": f"2026-11-24 00:00:{turn.number % 60:02}",
            "thinking": None,
            "thinking_s": None,
        }
        for conversation, its_turns in stored.items()
        for turn in its_turns
        for n, (role, content) in enumerate(turn.texts)
    ]
    with write_engine(path).connect() as connection:
        assert check.violations(connection) == []
        placed = connection.execute(
            text(
                "SELECT c.id, t.id AS turn_id, t.depth FROM conversations c JOIN turns t ON t.conversation_id = c.id"
                " JOIN jobs j ON j.turn_id = t.id ORDER BY c.id, t.depth"
            )
        ).all()
        for conversation, its_jobs in groupby(placed, lambda row: row.id):
            *_, newest = its_jobs
            wanted = was_read(stored[conversation], newest.depth)
            read = turns.read_turn(connection, newest.turn_id, 10**9).messages
            assert [(message.role, message.content) for message in read] == wanted
            whole = conversations.messages(connection, ADMIN_ID, f"c{conversation}")
            assert [(message.role, message.content) for message in whole] == [
                text for turn in stored[conversation] for text in turn.texts
            ]
            answered = [turn for turn in stored[conversation] if turn.number == newest.depth and turn.status == "done"]
            if answered:
                history = [*read, Message(role="assistant", content=answered[0].texts[-1][1])]
                found = turns.longest_stored_prefix(connection, ADMIN_ID, [*history, Message(role="user", content="x")])
                assert found is not None
                assert found.n_messages == len(history)
        (listed,) = conversation_list.listed(connection, ADMIN_ID, Filter(), limit=1)
        assert listed.n_turns == stored[int(listed.public_id[1:])][-1].number + 1
    with closing(sqlite3.connect(path)) as old:
        newest_id = jobs_before[-1]["id"]
        assert old.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone() == (newest_id + 1000,)


def test_what_an_earlier_version_stored_is_found_and_keeps_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    store_old(path, {number: list(old_turns(number, 6)) for number in range(1, 8)})
    engine = write_engine(path)
    commands(engine).upgrade("0011")
    engine.dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE conversations SET title = 'a title of old' WHERE id = 3")
        connection.execute("UPDATE sqlite_sequence SET seq = 100 WHERE name = 'conversations'")
    kept = "SELECT id, owner_id, public_id, title, head_turn_id, created_at FROM conversations ORDER BY id"
    before = rows(path, kept)
    with structlog.testing.capture_logs() as lines:
        assert migrate(path)
    assert rows(path, kept) == before
    (indexed,) = (line for line in lines if line["event"] == "texts are indexed")
    assert indexed["done"] == indexed["of"]
    with write_engine(path).begin() as current:
        assert check.violations(current) == []

        def found(query: str) -> set[str]:
            return {one.public_id for one in conversation_list.listed(current, ADMIN_ID, Filter(query), limit=99)}

        assert not search.is_behind(current)
        assert found("old") == {"c3"}
        assert found("prompt") == {f"c{number}" for number in range(1, 8)}
        submission.submit(current, prompt("a new one", "c1"), NOW)
        submission.submit(current, prompt("a new one", "another"), NOW)
        assert not search.index_messages(current)
        assert found("new") == {"c1", "another"}
        assert current.execute(text("SELECT max(id) FROM conversations")).scalar_one() == 101


def rows(path: Path, query: str, without: str = "") -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [
            {name: row[name] for name in row.keys() if name != without}  # noqa: SIM118 - iterating a row gives its values
            for row in connection.execute(query)
        ]


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    store_old(path, {1: list(old_turns(1, 3))})
    with closing(sqlite3.connect(path)) as connection, connection:
        # An index of that name is in the way of the last step.
        connection.execute("CREATE INDEX ix_conversations_head_turn_id ON workers (id)")
        before = list(connection.iterdump())
    with pytest.raises(StorageUnavailable, match="ix_conversations_head_turn_id"):
        migrate(path)
    with closing(sqlite3.connect(path)) as connection:
        assert list(connection.iterdump()) == before
