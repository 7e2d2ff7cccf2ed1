"""A real process, killed at every write, sync and send of every transition: what it made is whole or not there.

Each run does one transition (`one_step.py`) while strace watches one of its threads and kills the process in the place
of the Nth call of one kind; N goes up until the process gets through.
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
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis

from llamalith_app.jobs.queue import Hints
from llamalith_app.store import check, jobs
from llamalith_app.store.database import Database, write_engine
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
    told: Any
    """What the process said when the transition had returned; None: it was killed before."""


class Stage:
    """Where one transition is played again and again, each time in a folder of its own."""

    def __init__(self, folder: Path, migrated: Path, step: str, redis_url: str) -> None:
        self._folder = folder
        self._step = step
        self._redis_url = redis_url
        self._strace = need("strace", "strace")
        self._numbers = count()
        self._lock = folder / "gone.lock"
        self._scene = Path(shutil.copy(migrated, folder / "scene.db"))
        one_step.set_scene(self._scene, self._lock)
        self.before = rows(self._scene)

    def play(self, watch: Callable[[dict[str, int]], list[str]]) -> tuple[Path, Ended, dict[str, int]]:
        """`watch`: strace's arguments, of the process's threads by name. Returns these too."""
        self._lock.touch()
        with Redis.from_url(self._redis_url) as redis:
            redis.flushall()
            redis.script_flush()
        path = Path(shutil.copy(self._scene, self._folder / f"{next(self._numbers)}.db"))
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=one_step.run, args=(self._step, path, self._redis_url, there), daemon=True)
        process.start()
        there.close()
        with closing(here):
            threads = self._hear(here)
            with tracing([self._strace, *watch(threads)]):
                here.send("go")
                told = self._hear(here)
                process.join(WITHIN_S)
            assert process.exitcode in (0, -signal.SIGKILL)
            ended = Ended(process.exitcode != 0, told)
            process.close()
        return path, ended, threads

    def _hear(self, pipe: Any) -> Any:
        assert pipe.poll(WITHIN_S)
        try:
            return pipe.recv()
        except EOFError:
            return None

    def calls(self) -> tuple[set[tuple[str, str]], dict[str, Any]]:
        """Which thread makes which kinds of calls when nobody kills it, and the rows it leaves."""
        trace = self._folder / "trace"
        path, ended, threads = self.play(
            lambda threads: ["-f", "-o", str(trace), "-e", f"trace={','.join(CALLS)}", "-p", str(threads[MAIN])]
        )
        assert not ended.was_killed
        assert ended.told
        made = re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE)
        names = {str(thread): name for name, thread in threads.items()}
        return {(names[thread], call) for thread, call in made}, rows(path)

    def killed_at(self, thread: str, call: str, number: int) -> tuple[Path, Ended]:
        path, ended, _ = self.play(
            lambda threads: [
                *("-o", "/dev/null", "-p", str(threads[thread])),
                *("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"),
            ]
        )
        return path, ended

    async def again(self, path: Path) -> Any:
        """The same transition by a process that lives."""
        database, hints = Database(path), Hints(self._redis_url, one_step.MODELS)
        database.open()
        try:
            return await one_step.STEPS[self._step](database, hints)
        finally:
            await one_step.close(database, hints)


@contextmanager
def tracing(argv: list[str]) -> Iterator[None]:
    """Once strace holds its thread."""
    strace = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert strace.stderr is not None
    try:
        told = b""
        while b"attached" not in told:
            told = strace.stderr.readline()
            assert told, "strace ended"
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
        for lease in jobs.held(connection):
            jobs.fail(
                connection,
                lease.job_id,
                lease.lease_token,
                now,
                outcome=Outcome.LOST,
                kind="worker_lost",
                reason="gone",
                pause=timedelta(0),
                seen_beat=lease.beat,
            )
        while claim := jobs.claim(connection, "m", 1, 2, now):
            assert finish(connection, claim)
        assert check.broken(connection) == []
        statuses = {row.id: row.status for row in connection.exec_driver_sql("SELECT id, status FROM jobs")}
    engine.dispose()
    return statuses


def assert_whole(path: Path) -> None:
    engine = write_engine(path)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalars().all() == ["ok"]
        assert check.broken(connection) == []
    engine.dispose()


@pytest.mark.parametrize("step", one_step.STEPS)
def test_killed_at_any_call_a_transition_is_whole_or_not_there_and_work_goes_on(
    step: str, tmp_path: Path, migrated: Path, redis_url: str, record_property: Callable[[str, object], None]
) -> None:
    stage = Stage(tmp_path, migrated, step, redis_url)
    calls, after = stage.calls()
    assert after != stage.before
    points = Counter[tuple[str, str]]()
    seen = Counter[str]()
    for thread, call in sorted(calls):
        for number in count(1):
            path, ended = stage.killed_at(thread, call, number)
            assert_whole(path)
            left = rows(path)
            assert left in (stage.before, after), "half of it is there"
            assert left == after or ended.told is None, "it was promised, and it is not there"
            if step in ("submit", "cancel", "sweep"):
                assert asyncio.run(stage.again(path))
                assert rows(path) == after, "done again by who heard nothing, it is there once"
            statuses = run_to_the_end(path)
            wanted = dict.fromkeys(range(1, one_step.NEW + (step == "submit")), "done")
            assert statuses == wanted | ({one_step.HELD: "cancelled"} if step == "cancel" else {})
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
            if not ended.was_killed:
                break
            points[thread, call] += 1
            seen["absent" if left == stage.before else "there, not told" if ended.told is None else "told"] += 1
    kinds = Counter(call for _, call in points.elements())
    print(f"{step}: killed at {points.total()} calls {dict(kinds)}; then it was {dict(seen)}")  # noqa: T201
    record_property("crash_points", points.total())
    assert set(points) == calls
    assert {"pwrite64", "fdatasync", "sendto", "write"} <= set(kinds)
    assert set(seen) == {"absent", "there, not told", "told"}
