"""A real process, killed at every write, sync and send of every transition and of the migration: what it made is whole
or not there.

Each run does one of them (`one_step.py`) while strace watches one of its threads and kills the process in the place of
the Nth call of one kind; N goes up until the process gets through.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis

from llamalith_app.jobs.queue import Hints
from llamalith_app.store import check
from llamalith_app.store.database import Database, write_engine
from llamalith_app.store.jobs import leases, transitions
from llamalith_app.store.migrate import migrate
from llamalith_app.store.tables import Outcome
from tests.needs import need
from tests.product import one_step
from tests.store.samples import finish

pytestmark = pytest.mark.slow

CALLS = ("pwrite64", "pwritev", "write", "writev", "ftruncate", "unlink", "fdatasync", "fsync", "sendto", "sendmsg")
"""Whatever changes a file, or says something to another process."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([one_step.__name__])
TABLES = ("conversations", "jobs", "messages", "attempts", "idempotency_keys")
ANY = ("_at", "not_before", "lease_token")
"""Ends of the names of columns whose values differ from run to run."""
MAIN = threading.main_thread().name
WITHIN_S = 60


class Ended(NamedTuple):
    was_killed: bool
    reported: Any
    """What the process reported when the transition had returned; None: it was killed before."""


class Stage:
    """Where a process is started again and again, each time with a file of its own."""

    def __init__(self, folder: Path, process: Callable[[Path, Any], None], prepare: Callable[[Path], object]) -> None:
        """`process`: its whole life, of the path of its record and of the pipe to its test. `prepare`: makes what it
        finds there."""
        self._folder = folder
        self._process = process
        self._prepare = prepare
        self._strace = need("strace", "strace")
        self._numbers = count()
        self.killed_at = Counter[tuple[str, str]]()
        """How often, by the thread and its call."""

    def play(self, watch: Callable[[dict[str, int]], list[str]]) -> tuple[Path, Ended, dict[str, int]]:
        """`watch`: strace's arguments, of the process's threads by name. Returns these too."""
        path = self._folder / f"{next(self._numbers)}.db"
        self._prepare(path)
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=self._process, args=(path, there), daemon=True)
        process.start()
        there.close()
        with closing(here):
            threads = self._receive(here)
            with tracing([self._strace, *watch(threads)]):
                here.send("go")
                reported = self._receive(here)
                process.join(WITHIN_S)
            assert process.exitcode in (0, -signal.SIGKILL)
            ended = Ended(process.exitcode != 0, reported)
            process.close()
        return path, ended, threads

    def _receive(self, pipe: Any) -> Any:
        assert pipe.poll(WITHIN_S)
        try:
            return pipe.recv()
        except EOFError:
            return None

    def calls(self) -> tuple[Path, set[tuple[str, str]]]:
        """What is there when nobody kills the process, and which of its threads makes which kinds of calls."""
        trace = self._folder / "trace"
        path, ended, threads = self.play(
            lambda threads: ["-f", "-o", str(trace), "-e", f"trace={','.join(CALLS)}", "-p", str(threads[MAIN])]
        )
        assert not ended.was_killed
        assert ended.reported
        made = re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE)
        names = {str(thread): name for name, thread in threads.items()}
        return path, {(names[thread], call) for thread, call in made}

    def ends(self, calls: set[tuple[str, str]], *, every: int = 1) -> Iterator[tuple[Path, Ended]]:
        """Killed at every call of these kinds, or at the first and then each `every`th, and each time once not killed,
        when there was no such call any more."""
        for thread, call in sorted(calls):
            for number in count(1, every):
                path, ended = self._kill(thread, call, number)
                yield path, ended
                for file in path.parent.glob(f"{path.name}*"):
                    file.unlink()
                if not ended.was_killed:
                    break
                self.killed_at[thread, call] += 1
        assert set(self.killed_at) == calls

    def _kill(self, thread: str, call: str, number: int) -> tuple[Path, Ended]:
        inject = f"inject={call}:signal=KILL:when={number}"
        path, ended, _ = self.play(
            lambda threads: ["-o", "/dev/null", "-e", f"trace={call}", "-e", inject, "-p", str(threads[thread])]
        )
        return path, ended

    def report(self, of: str, seen: Counter[str]) -> None:
        kinds = Counter(call for _, call in self.killed_at.elements())
        print(f"{of}: killed at {kinds.total()} calls {dict(kinds)}; then it was {dict(seen)}")  # noqa: T201


@contextmanager
def tracing(argv: list[str]) -> Iterator[None]:
    """Once strace holds its thread."""
    strace = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert strace.stderr is not None
    try:
        reported = b""
        while b"attached" not in reported:
            reported = strace.stderr.readline()
            assert reported, "strace ended"
        yield
    finally:
        strace.terminate()
        strace.communicate()


def rows(path: Path) -> dict[str, Any]:
    """All that the record says, without what is random or a time."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return {
            table: [
                {name: row[name] is not None if name.endswith(ANY) else row[name] for name in row.keys()}  # noqa: SIM118
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")
            ]
            for table in TABLES
        }


def run_to_the_end(path: Path) -> dict[int, str]:
    """What living workers do: take the leases of the dead, and make every job that is left. Statuses by job."""
    now = datetime.now(UTC) + timedelta(hours=1)
    engine = write_engine(path)
    with engine.begin() as connection:
        for lease in leases.active_leases(connection):
            transitions.fail(
                connection,
                lease.job_id,
                lease.lease_token,
                now,
                outcome=Outcome.LOST,
                kind="worker_lost",
                reason="gone",
                pause=timedelta(0),
                seen_heartbeat=lease.heartbeat,
            )
        while claim := transitions.claim(connection, "m", 1, 2, now):
            assert finish(connection, claim)
        assert check.violations(connection) == []
        statuses = {row.id: row.status for row in connection.exec_driver_sql("SELECT id, status FROM jobs")}
    engine.dispose()
    return statuses


def assert_whole(path: Path) -> None:
    engine = write_engine(path)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalars().all() == ["ok"]
        assert check.violations(connection) == []
    engine.dispose()


async def again(step: str, redis_url: str, path: Path) -> Any:
    """The same transition by a process that lives."""
    database, hints = Database(path), Hints(redis_url, one_step.MODELS)
    database.open()
    try:
        return await one_step.STEPS[step](database, hints)
    finally:
        await one_step.close(database, hints)


@pytest.mark.parametrize("step", one_step.STEPS)
def test_killed_at_any_call_a_transition_is_whole_or_not_there_and_work_goes_on(
    step: str, tmp_path: Path, migrated: Path, redis_url: str
) -> None:
    scene, lock = Path(shutil.copy(migrated, tmp_path / "scene.db")), tmp_path / "gone.lock"
    one_step.set_scene(scene, lock)

    def prepare(path: Path) -> None:
        lock.touch()
        with Redis.from_url(redis_url) as redis:
            redis.flushall()
            redis.script_flush()
        shutil.copy(scene, path)

    stage = Stage(tmp_path, partial(one_step.transition, step, redis_url), prepare)
    path, calls = stage.calls()
    before, after = rows(scene), rows(path)
    assert before != after
    seen = Counter[str]()
    for path, ended in stage.ends(calls):
        assert_whole(path)
        left = rows(path)
        assert left in (before, after), "half of it is there"
        assert left == after or ended.reported is None, "it was promised, and it is not there"
        if step in ("submit", "cancel", "sweep"):
            assert asyncio.run(again(step, redis_url, path))
            assert rows(path) == after, "done again by who heard nothing, it is there once"
        wanted = dict.fromkeys(range(1, one_step.NEW + (step == "submit")), "done")
        assert run_to_the_end(path) == wanted | ({one_step.HELD: "cancelled"} if step == "cancel" else {})
        if ended.was_killed:
            seen["absent" if left == before else "there, not reported" if ended.reported is None else "reported"] += 1
    stage.report(step, seen)
    assert {"pwrite64", "fdatasync", "sendto", "write"} <= {call for _, call in stage.killed_at}
    assert set(seen) == {"absent", "there, not reported", "reported"}


def schema(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
        if not tables:
            return []
        return [
            *tables,
            *connection.execute("SELECT version_num FROM alembic_version"),
            *connection.execute("SELECT id, name, role FROM users"),
        ]


def test_killed_at_any_fourth_call_a_migration_is_whole_or_not_begun_and_made_again(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, one_step.migration, lambda path: None)
    path, calls = stage.calls()
    after = schema(path)
    seen = Counter[str]()
    # It makes hundreds of calls, nearly all within its one transaction.
    for path, ended in stage.ends(calls, every=4):
        left = schema(path)
        assert left in ([], after), "half of it is there"
        assert left == after or ended.reported is None
        assert migrate(path) is (left == [])
        assert schema(path) == after
        if ended.was_killed:
            seen["absent" if left == [] else "there, not reported" if ended.reported is None else "reported"] += 1
    stage.report("migration", seen)
    assert {"absent", "there, not reported"} <= set(seen)
