"""`llamalith backup` and `llamalith restore` as an operator runs them."""

from __future__ import annotations

import errno
import os
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine

from llamalith_app.cli import llamalith
from llamalith_app.errors import ConfigError
from llamalith_app.store import backup, check, workers
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import reads, submission, transitions
from llamalith_app.store.record import record_id
from llamalith_app.store.users import ADMIN_ID
from tests.store.samples import NOW, finish, prompt, register_worker


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(llamalith, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_work_goes_on_after_a_restore_into_an_empty_folder(engine: Engine, database_path: Path, tmp_path: Path) -> None:
    with engine.begin() as connection:
        worker = register_worker(connection)
        for content in ("one", "two", "three"):
            submission.submit(connection, prompt(content, max_attempts=1), NOW)
        done = transitions.claim(connection, "m", 1, worker, NOW)
        assert done is not None
        finish(connection, done, "a reply")
        assert transitions.claim(connection, "m", 1, worker, NOW) is not None
    copied = tmp_path / "copies.llamalith"
    assert "bytes" in run("backup", copied, "--data-dir", database_path.parent)
    assert copied.stat().st_mode & 0o777 == 0o600
    with engine.begin() as connection:
        submission.submit(connection, prompt("after the copy"), NOW)
    there = tmp_path / "new" / "data"
    assert "restored" in run("restore", copied, "--data-dir", there)
    restored = write_engine(there / "llamalith.db")
    with restored.begin() as connection:
        assert check.broken(connection) == []
        found = reads.newest(connection, ADMIN_ID, limit=10)
        assert [(job.user_input, job.status, job.result) for job in found] == [
            ("three", "queued", None),
            ("two", "queued", None),
            ("one", "done", "a reply"),
        ]
        # Its worker does not exist here: that start does not count, and nobody waits for its lease to run out.
        assert workers.not_ended(connection) == []
        again = transitions.claim(connection, "m", 1, register_worker(connection), datetime.now(UTC))
        assert again is not None
        finish(connection, again, "of the second start")
        assert (submission.submit(connection, prompt("goes on"), NOW).job_id or 0) > 10_000
    restored.dispose()
    assert record_id(there / "llamalith.db") != record_id(database_path), "they may use one Redis"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


def test_after_a_restore_no_job_gets_an_id_that_was_used_after_the_copy(
    engine: Engine, database_path: Path, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    with engine.begin() as connection:
        submission.submit(connection, prompt("in the copy"), now - timedelta(hours=1))
    run("backup", tmp_path / "copy", "--data-dir", database_path.parent)
    given: set[int | None] = set()
    for n in range(2):
        there = tmp_path / str(n)
        run("restore", tmp_path / "copy", "--data-dir", there)
        again = write_engine(there / "llamalith.db")
        with again.begin() as connection:
            ids = {submission.submit(connection, prompt("after it"), datetime.now(UTC)).job_id for _ in range(3)}
        again.dispose()
        assert min(job_id or 0 for job_id in ids) > 3600 * 1000
        assert not ids & given
        given |= ids


def test_that_holds_for_a_copy_made_before_the_first_job(database_path: Path, tmp_path: Path) -> None:
    run("backup", tmp_path / "copy", "--data-dir", database_path.parent)
    run("restore", tmp_path / "copy", "--data-dir", tmp_path / "there")
    restored = write_engine(tmp_path / "there" / "llamalith.db")
    with restored.begin() as connection:
        assert (submission.submit(connection, prompt("first"), NOW).job_id or 0) > 10_000
    restored.dispose()


def test_a_copy_is_a_snapshot_of_one_moment_while_others_write(
    engine: Engine, database_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many steps, and a write within each: a copy that restarted after each write would never end.
    monkeypatch.setattr(backup, "PAGES", 16)
    with engine.begin() as connection:
        for number in range(200):
            submission.submit(connection, prompt("x" * 10_000, f"c{number}"), NOW)
    n_steps = 0

    def write(done: int, of: int) -> None:
        nonlocal n_steps
        n_steps += 1
        assert n_steps <= of
        with engine.begin() as connection:
            submission.submit(connection, prompt("more"), NOW)

    backup.copy(database_path, tmp_path / "copy", write)
    copied = write_engine(tmp_path / "copy")
    with copied.connect() as connection:
        assert check.broken(connection) == []
        assert check.counts(connection)["jobs"] == 200
    copied.dispose()
    assert n_steps > 10


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_no_existing_file_is_overwritten(engine: Engine, database_path: Path, tmp_path: Path, command: str) -> None:
    with engine.begin() as connection:
        submission.submit(connection, prompt(), NOW)
    assert database_path.with_name(database_path.name + "-wal").exists()
    before = database_path.read_bytes()
    (tmp_path / "copy").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is there already; nothing was written"):
        run(command, tmp_path / "copy", "--data-dir", database_path.parent)
    assert (tmp_path / "copy").read_bytes() == b"mine"
    assert database_path.read_bytes() == before


def test_a_backup_works_on_a_file_system_without_hard_links(
    database_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    run("backup", tmp_path / "copy", "--data-dir", database_path.parent)
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == ["copy"]


def damaged(path: Path, database_path: Path) -> None:
    whole = bytearray(database_path.read_bytes())
    whole[5000:-5000] = b"\xff" * (len(whole) - 10_000)
    path.write_bytes(whole)


def another(path: Path, _: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")


def text(path: Path, _: Path) -> None:
    path.write_text("no database at all")


def absent(path: Path, _: Path) -> None:
    return


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [damaged, another, text, absent, fifo, device])
def test_an_incomplete_backup_is_refused_and_leaves_nothing(database_path: Path, tmp_path: Path, make: object) -> None:
    file, there = tmp_path / "copy", tmp_path / "new"
    make(file, database_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=str(file)):
        run("restore", file, "--data-dir", there)
    assert list(there.iterdir()) == []


def test_a_write_ahead_log_without_its_database_is_not_used_with_the_backup(
    database_path: Path, tmp_path: Path
) -> None:
    run("backup", tmp_path / "copy", "--data-dir", database_path.parent)
    there = tmp_path / "new"
    there.mkdir()
    (there / "llamalith.db-wal").write_bytes(b"of another")
    with pytest.raises(ConfigError, match="belongs to a database that is not there"):
        run("restore", tmp_path / "copy", "--data-dir", there)
