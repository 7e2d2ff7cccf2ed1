"""The database of one process: one writer thread, and concurrent reads.

Owns connections, transactions and their durability. Writes are plain functions `f(connection, ...)` that run one
at a time in the writer thread. Writes that wait at the same time share one transaction, each in its own savepoint.
Reads are functions of the same shape; each runs in one snapshot, on an aiosqlite connection. Knows no table.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import structlog
from advanced_alchemy.config import EngineConfig, SQLAlchemyAsyncConfig
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc
from sqlalchemy.pool import StaticPool

from llamalith_app.errors import ConfigError, LlamalithError, StorageUnavailable

P = ParamSpec("P")
T = TypeVar("T")

LOCK_DEADLINE_S = 10.0
"""How long a write waits for another process's transaction before it raises StorageUnavailable."""
READERS = 4
"""Connections for reads. More of them would not be faster: they share one core."""
READ_WAIT_S = 10
"""How long a read waits for a free connection before it raises StorageUnavailable."""
MAX_MERGED = 64
"""The most writes that share a transaction: the first of them waits for the commit of all."""

log = structlog.get_logger(__name__)


class _Write(NamedTuple):
    run: Callable[[Connection], Any]
    durable: bool
    result: Future[Any]


class Database:
    """Call `open()` and `close()` from the event loop's thread."""

    def __init__(self, path: Path, lock_deadline_s: float = LOCK_DEADLINE_S) -> None:
        self.path = path
        self._lock_deadline_s = lock_deadline_s
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="database-writer", daemon=True)
        self._reads = _read_config(path)

    def open(self) -> None:
        self._file = _identity(self.path)
        self._write_engine = write_engine(self.path, self._lock_deadline_s)
        self._writer.start()

    async def close(self) -> None:
        """Waits for all pending writes, then closes all connections."""
        self._waiting.put(None)
        await asyncio.to_thread(self._writer.join)
        self._write_engine.dispose()
        await self._reads.get_engine().dispose()

    async def write(self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns what `function(connection, ...)` returns, after its transaction is synced to disk.

        Raises what the function raises (nothing is stored then), or StorageUnavailable.
        """
        return await self._submit(function, True, args, kwargs)

    async def write_lightly(
        self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `write`, but not synced: a power cut may undo it. For claims and heartbeats, which the sweep repairs."""
        return await self._submit(function, False, args, kwargs)

    async def read(self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns what `function(connection, ...)` returns in one snapshot. Raises what `write` raises."""
        self._refuse_another_file()
        try:
            async with self._reads.get_engine().connect() as connection:
                return await connection.run_sync(function, *args, **kwargs)
        except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error) as error:
            raise _storage_error(error) from error

    async def _submit(self, function: Callable[..., T], durable: bool, args: Any, kwargs: Any) -> T:
        result: Future[T] = Future()
        self._waiting.put(_Write(lambda connection: function(connection, *args, **kwargs), durable, result))
        return await asyncio.wrap_future(result)

    def _write_all(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, ended = self._gather(first)
            # A write whose caller was cancelled before it began is skipped; later it can no longer be cancelled.
            batch = [write for write in batch if write.result.set_running_or_notify_cancel()]
            try:
                self._refuse_another_file()
                outcomes = _transaction(self._write_engine, batch)
            except Exception as error:  # noqa: BLE001 - the writer thread must outlive any failure
                outcomes = [(None, error) for _ in batch]
            for write, (value, failure) in zip(batch, outcomes, strict=True):
                if failure is None:
                    write.result.set_result(value)
                else:
                    write.result.set_exception(_storage_error(failure))
            if ended:
                return

    def _refuse_another_file(self) -> None:
        """Raises StorageUnavailable where the file was moved or deleted: SQLite would write to it unnoticed."""
        if _identity(self.path) != self._file:
            raise StorageUnavailable(f"The database {self.path} is not the file that was opened at the start.")

    def _gather(self, first: _Write) -> tuple[list[_Write], bool]:
        batch = [first]
        while len(batch) < MAX_MERGED:
            try:
                write = self._waiting.get_nowait()
            except queue.Empty:
                break
            if write is None:
                return batch, True
            batch.append(write)
        return batch, False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _transaction(engine: Engine, batch: list[_Write]) -> list[tuple[Any, Exception | None]]:
    durable = any(write.durable for write in batch)
    outcomes: list[tuple[Any, Exception | None]] = []
    with engine.connect().execution_options(durable=durable) as connection, connection.begin():
        if len(batch) == 1:
            # Where it fails, the whole transaction is rolled back.
            return [(batch[0].run(connection), None)]
        # Not SQLAlchemy's begin_nested(): it costs more than the writes themselves.
        for write in batch:
            connection.exec_driver_sql("SAVEPOINT one_write")
            try:
                outcomes.append((write.run(connection), None))
            except Exception as error:
                if not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
                    raise  # such as a full disk: it ends the whole transaction, so no write was stored
                connection.exec_driver_sql("ROLLBACK TO one_write")
                outcomes.append((None, error))
            connection.exec_driver_sql("RELEASE one_write")
    return outcomes


def _storage_error(error: Exception) -> Exception:
    """StorageUnavailable for the driver's errors of disk, lock or file; other errors unchanged."""
    if isinstance(error, LlamalithError):
        return error
    if isinstance(error, exc.TimeoutError):
        return StorageUnavailable(f"The database had no connection free for {READ_WAIT_S} s.")
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    if isinstance(cause, sqlite3.OperationalError | sqlite3.DatabaseError) and not isinstance(
        cause, sqlite3.IntegrityError | sqlite3.ProgrammingError
    ):
        log.error("database cannot be used", reason=str(cause))
        return StorageUnavailable(f"The database cannot be used now: {cause}.")
    return error


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """For commands: turns the driver's errors into ConfigError for a damaged file, and into StorageUnavailable for one
    that cannot be used now."""
    try:
        yield
    except exc.OperationalError as error:
        raise StorageUnavailable(f"{path}: the database cannot be used now: {error.orig}.") from error
    except exc.DatabaseError as error:
        if type(error) is not exc.DatabaseError:
            raise
        damaged = f"{path}: this is no whole database ({error.orig}); `llamalith restore` makes one from a backup"
        raise ConfigError([damaged]) from error


def at(driver: str, path: Path) -> URL:
    """The URL of a database file. Built from parts, since ? and # in a path would have a meaning in a text."""
    return URL.create(driver, database=str(path))


def write_engine(path: Path, lock_deadline_s: float = LOCK_DEADLINE_S) -> Engine:
    """An engine with one connection, for one thread at a time. Each transaction is a BEGIN IMMEDIATE."""
    engine = create_engine(
        at("sqlite", path),
        poolclass=StaticPool,
        hide_parameters=True,  # they hold prompts, and errors are logged
        # isolation_level None: the driver begins no transaction by itself. timeout 0: SQLite's busy handler backs off
        # so far that a second process starved for seconds, so `_begin_immediate` polls instead.
        connect_args={"check_same_thread": False, "isolation_level": None, "timeout": 0},
    )
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", partial(_begin_immediate, lock_deadline_s))
    return engine


def _read_config(path: Path) -> SQLAlchemyAsyncConfig:
    config = SQLAlchemyAsyncConfig(
        connection_string=cast(str, at("sqlite+aiosqlite", path)),
        # No overflow: SQLAlchemy opens and closes those connections each time, each with a thread.
        engine_config=EngineConfig(hide_parameters=True, pool_size=READERS, max_overflow=0, pool_timeout=READ_WAIT_S),
    )
    engine = config.get_engine().sync_engine
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin_snapshot)
    return config


def _set_up(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    # temp_store: otherwise SQLite creates and deletes a temporary file for the savepoints of each transaction.
    for pragma in ("journal_mode = WAL", "foreign_keys = ON", "temp_store = MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_snapshot(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(lock_deadline_s: float, connection: Connection) -> None:
    synchronous = "FULL" if connection.get_execution_options().get("durable", True) else "NORMAL"
    if connection.info.get("synchronous") != synchronous:
        connection.exec_driver_sql(f"PRAGMA synchronous = {synchronous}")
        connection.info["synchronous"] = synchronous
    deadline = time.monotonic() + lock_deadline_s
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except exc.OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.001)
        else:
            return
