"""`llamalith check` as an operator runs it."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text

from llamalith_app.commands.check import command
from llamalith_app.commands.migrate import command as migrating
from llamalith_app.errors import ConfigError
from llamalith_app.store.jobs import submission
from tests.store.samples import NOW, prompt


def check(data_dir: Path) -> Result:
    return CliRunner().invoke(command, ["--data-dir", str(data_dir)])


def test_a_sound_database_is_reported_by_its_counts(engine: Engine, database_path: Path) -> None:
    with engine.begin() as connection:
        submission.submit(connection, prompt(), NOW)
    result = check(database_path.parent)
    assert result.exit_code == 0
    assert "jobs: 1\n" in result.output
    assert "jobs queued: 1\n" in result.output
    assert result.output.endswith("invariants hold\n")


def test_a_broken_invariant_is_reported_with_its_rows(engine: Engine, database_path: Path) -> None:
    with engine.begin() as connection:
        submission.submit(connection, prompt(), NOW)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM messages"))
    result = check(database_path.parent)
    assert result.exit_code == 1
    assert "BROKEN: each job has something to answer in its turn" in result.output
    assert '{"job_id":1,"turn_id":1}' in result.output


def test_checking_takes_no_lock_and_changes_nothing(engine: Engine, database_path: Path) -> None:
    with engine.connect() as connection, connection.begin():
        submission.submit(connection, prompt(), NOW)
        assert check(database_path.parent).exit_code == 0


@pytest.mark.parametrize("what", [command, migrating], ids=["check", "migrate"])
def test_a_damaged_database_is_reported_in_one_line(engine: Engine, database_path: Path, what: click.Command) -> None:
    engine.dispose()
    whole = database_path.read_bytes()
    database_path.write_bytes(whole[:100] + b"no page of a database" * 500 + whole[10_600:])
    result = CliRunner().invoke(what, ["--data-dir", str(database_path.parent)])
    assert isinstance(result.exception, ConfigError)
    (problem,) = result.exception.problems
    assert problem.startswith(f"{database_path}: this is no whole database")
    assert "llamalith restore" in problem


def test_a_missing_database_is_reported_by_its_path(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert isinstance(result.exception, ConfigError)
    assert str(tmp_path / "llamalith.db") in str(result.exception)
