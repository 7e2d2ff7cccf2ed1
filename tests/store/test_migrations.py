"""What a migration makes of the rows that it finds."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import text

from llamalith_app.store import check
from llamalith_app.store.database import write_engine
from llamalith_app.store.migrate import commands, migrate


def test_in_each_conversation_the_first_open_job_is_found_to_be_its_head(tmp_path: Path) -> None:
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
        heads = connection.execute(text("SELECT id FROM jobs WHERE status = 'queued' AND is_head = 1 ORDER BY id"))
        assert list(heads.scalars()) == [2, 4]
        assert check.broken(connection) == []
