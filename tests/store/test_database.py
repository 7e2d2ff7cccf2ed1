"""The writer thread merges writes, each completely or not at all; durable ones are on disk; it waits for locks."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event, text

from llamalith_app.errors import ConfigError, StorageUnavailable
from llamalith_app.store.database import Database, write_engine
from llamalith_app.store.jobs import submission
from llamalith_app.store.migrate import commands, migrate
from tests.store.samples import NOW, prompt


def count_jobs(connection: Connection) -> int:
    n_jobs: int = connection.execute(text("SELECT count(*) FROM jobs")).scalar_one()
    return n_jobs


async def test_a_write_that_fails_undoes_none_of_those_in_its_transaction(database: Database) -> None:
    def broken(connection: Connection) -> None:
        submission.submit(connection, prompt(conversation_id="broken"), NOW)
        raise ValueError("after it wrote")

    async def attempt(number: int) -> bool:
        try:
            if number % 3 == 0:
                await database.write(broken)
            else:
                await database.write(submission.submit, prompt(conversation_id=str(number)), NOW)
        except ValueError:
            return False
        return True

    outcomes = await asyncio.gather(*(attempt(number) for number in range(60)))
    assert await database.read(count_jobs) == sum(outcomes) == 40


async def test_a_write_alone_that_fails_stores_nothing(database: Database) -> None:
    def broken(connection: Connection) -> None:
        submission.submit(connection, prompt(), NOW)
        raise ValueError("after it wrote")

    with pytest.raises(ValueError, match="after it wrote"):
        await database.write(broken)
    assert await database.read(count_jobs) == 0
    assert (await database.write(submission.submit, prompt(), NOW)).job_id == 1


async def test_a_write_is_synced_unless_it_is_a_light_one(database: Database) -> None:
    def synchronous(connection: Connection) -> int:
        level: int = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
        return level

    full, normal = 2, 1
    for _ in range(2):
        assert await database.write(synchronous) == full
        assert await database.write_lightly(synchronous) == normal
        assert await database.write_lightly(synchronous) == normal


async def test_a_write_whose_caller_was_cancelled_happens_completely_or_not_at_all(database: Database) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        started.set()
        go.wait(5)
        submission.submit(connection, prompt(), NOW)

    task = asyncio.create_task(database.write(slow))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await database.write(lambda connection: None)
    assert await database.read(count_jobs) == 1


async def test_a_lock_held_past_the_deadline_is_storage_unavailable(migrated: Path, database_path: Path) -> None:
    database = Database(database_path, lock_deadline_s=0.05)
    database.open()
    other = sqlite3.connect(database_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable, match="locked"):
        await database.write(submission.submit, prompt(), NOW)
    other.execute("ROLLBACK")
    other.close()
    assert (await database.write(submission.submit, prompt(), NOW)).job_id == 1
    await database.close()


async def test_a_write_waits_for_a_lock_that_is_released_in_time(database: Database, database_path: Path) -> None:
    other = sqlite3.connect(database_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(database.write(submission.submit, prompt(), NOW))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)
    other.execute("ROLLBACK")
    other.close()
    assert (await waiting).job_id == 1


async def test_a_read_sees_one_snapshot(database: Database) -> None:
    loop = asyncio.get_running_loop()

    def twice(connection: Connection) -> tuple[int, int]:
        before = count_jobs(connection)
        asyncio.run_coroutine_threadsafe(database.write(submission.submit, prompt(), NOW), loop)
        return before, count_jobs(connection)

    # The write lands while the read is open or after it: its second count must equal its first either way.
    before, after = await database.read(twice)
    assert before == after


async def test_a_full_disk_is_storage_unavailable_and_nothing_half_written(
    database: Database,
) -> None:
    def limit(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")

    await database.write(limit)
    with pytest.raises(StorageUnavailable, match="full"):
        await database.write(submission.submit, prompt("x" * 100_000), NOW)
    assert await database.read(count_jobs) == 0


@pytest.mark.slow
def test_two_starts_at_once_migrate_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "llamalith.db"
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = list(pool.map(migrate, [path] * 4))
    assert sorted(outcomes) == [False, False, False, True]


def test_the_migrations_make_the_schema_of_the_tables(engine: Engine) -> None:
    commands(engine).check()


def test_a_newer_schema_is_refused_by_name(database_path: Path) -> None:
    with sqlite3.connect(database_path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigError, match="newer version .*9999"):
        migrate(database_path)


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.db"
    engine = write_engine(path)
    n_statements = 0

    def break_late(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal n_statements
        n_statements += 1
        if "CREATE TABLE messages" in statement:
            raise RuntimeError("the machine went away")

    event.listen(engine, "before_cursor_execute", break_late)
    with pytest.raises(RuntimeError, match="went away"):
        commands(engine).upgrade()
    engine.dispose()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'jobs'").fetchall() == []
    connection.close()
    assert n_statements > 5
    assert migrate(path)


def test_only_its_owner_can_read_the_database(tmp_path: Path) -> None:
    path = tmp_path / "private.db"
    migrate(path)
    assert path.stat().st_mode & 0o077 == 0
