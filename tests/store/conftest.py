"""Runs tests on SQLite and on PostgreSQL: one PostgreSQL cluster for the run, a database for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine

from llamalith_app.store.database import write_engine
from llamalith_app.store.migrate import commands
from tests.needs import need

NewRecord = Callable[[], AbstractContextManager[Engine]]
"""An empty, migrated record; deleted at the end."""
TEMPLATE = "migrated"
# It may be lost with the machine, asks for no port, and lets no test wait for ever.
SERVER = "-c fsync=off -c lock_timeout=10s -c listen_addresses= -c unix_socket_directories={folder}"


@contextmanager
def sqlite_record(migrated: Path) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        engine = write_engine(Path(shutil.copy(migrated, Path(folder, "r.db"))))
        try:
            yield engine
        finally:
            engine.dispose()


class Cluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    @contextmanager
    def engine(self, database: str) -> Iterator[Engine]:
        engine = create_engine(URL.create("postgresql+psycopg", "llamalith", host=str(self._folder), database=database))
        try:
            yield engine
        finally:
            engine.dispose()

    def execute(self, statement: str) -> None:
        with self.engine("postgres") as engine, engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)

    @contextmanager
    def record(self) -> Iterator[Engine]:
        name = f"record_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        try:
            with self.engine(name) as engine:
                yield engine
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    initdb, pg_ctl = need("initdb", "postgresql"), need("pg_ctl", "postgresql")
    # PostgreSQL refuses to run as root; its package brings a user. pytest's own folders are closed to others.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if user is not None:
        shutil.chown(folder, user, user)
    data, log = folder / "data", folder / "log"

    def run(*argv: str | Path) -> None:
        done = subprocess.run(
            argv,
            check=False,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

    run(initdb, "--username=llamalith", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", data)
    run(pg_ctl, "start", "--wait", "-D", data, "-l", log, "-o", SERVER.format(folder=folder))
    try:
        cluster = Cluster(folder)
        cluster.execute(f"CREATE DATABASE {TEMPLATE}")
        with cluster.engine(TEMPLATE) as engine:
            commands(engine).upgrade()
        yield cluster
    finally:
        run(pg_ctl, "stop", "--wait", "--mode=immediate", "-D", data)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def new_record(request: pytest.FixtureRequest) -> NewRecord:
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        return cluster.record
    migrated: Path = request.getfixturevalue("migrated")
    return lambda: sqlite_record(migrated)


@pytest.fixture
def sqlite_engine(migrated: Path) -> Iterator[Engine]:
    """For what only SQLite can show."""
    with sqlite_record(migrated) as engine:
        yield engine


@pytest.fixture
def engine(new_record: NewRecord) -> Iterator[Engine]:
    with new_record() as engine:
        yield engine
