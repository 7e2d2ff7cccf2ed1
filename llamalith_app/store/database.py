"""The database of one process: one writer thread, and reads beside it.

Owns connections, transactions and their durability. Writes are plain functions `f(connection, ...)` that run one
at a time in the writer thread; those that wait together share one transaction, each in a savepoint of its own.
Reads are functions of the same shape, on an aiosqlite connection, in one snapshot each. Knows no table.
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
"""How long a write waits for another process's transaction before it is a StorageUnavailable."""
READERS = 4
"""Connections for reads; more would share the same core."""
READ_WAIT_S = 10
"""For one of them."""
MAX_MERGED = 64
"""Writes that share a transaction at most, so that the first of them does not wait for a crowd."""

log = structlog.get_logger(__name__)


class _Write(NamedTuple):
    run: Callable[[Connection], Any]
    durable: bool
    result: Future[Any]


class Database:
    """Opened by `open()`, ended by `close()`; both from the event loop's thread."""

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
        """Ends after every write that was asked for has been done."""
        self._waiting.put(None)
        await asyncio.to_thread(self._writer.join)
        self._write_engine.dispose()
        await self._reads.get_engine().dispose()

    async def write(self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs it in a transaction that is on disk before this returns: for what a client is promised.

        Raises what the function raises (nothing of it is stored then), or StorageUnavailable.
        """
        return await self._submit(function, True, args, kwargs)

    async def write_lightly(
        self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `write`, but a power cut may undo it: for claims and beats, which the sweep repairs."""
        return await self._submit(function, False, args, kwargs)

    async def read(self, function: Callable[Concatenate[Connection, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs it in one snapshot. Raises StorageUnavailable when the file cannot be read."""
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
            # Claimed by nobody else: a caller that gave up must not have its write undone half-way.
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
        """SQLite would go on in a file that was moved away or deleted, where nobody finds what it promised."""
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
        # SQLAlchemy's begin_nested() costs more than the writes themselves; both halves stand in these lines.
        for write in batch:
            connection.exec_driver_sql("SAVEPOINT one_write")
            try:
                outcomes.append((write.run(connection), None))
            except Exception as error:
                if not connection.connection.driver_connection.in_transaction:  # type: ignore[union-attr]
                    raise  # a full disk and its like end the whole transaction, so nobody's write was stored
                connection.exec_driver_sql("ROLLBACK TO one_write")
                outcomes.append((None, error))
            connection.exec_driver_sql("RELEASE one_write")
    return outcomes


def _storage_error(error: Exception) -> Exception:
    """What the driver says of the disk, the lock or the file, in our words; anything else as it is."""
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
    """For commands that people start: ConfigError for a file that is no whole database, StorageUnavailable for one that
    cannot be used now."""
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
    """Not as text, in which ? and # of a path would mean something else."""
    return URL.create(driver, database=str(path))


def write_engine(path: Path, lock_deadline_s: float = LOCK_DEADLINE_S) -> Engine:
    """An engine of one connection whose every transaction is a BEGIN IMMEDIATE; for one thread at a time."""
    engine = create_engine(
        at("sqlite", path),
        poolclass=StaticPool,
        hide_parameters=True,  # they are people's prompts, and errors end in logs
        # isolation_level None: the driver begins nothing by itself; timeout 0: SQLite's own busy handler sleeps
        # and starved a second process for seconds, so `_begin_immediate` does the waiting.
        connect_args={"check_same_thread": False, "isolation_level": None, "timeout": 0},
    )
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", partial(_begin_immediate, lock_deadline_s))
    return engine


def _read_config(path: Path) -> SQLAlchemyAsyncConfig:
    config = SQLAlchemyAsyncConfig(
        connection_string=cast(str, at("sqlite+aiosqlite", path)),
        # No overflow: SQLAlchemy opens and closes such connections each time, a thread each.
        engine_config=EngineConfig(hide_parameters=True, pool_size=READERS, max_overflow=0, pool_timeout=READ_WAIT_S),
    )
    engine = config.get_engine().sync_engine
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin_snapshot)
    return config


def _set_up(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    # temp_store: SQLite keeps what a savepoint would undo in a temporary file otherwise, made and deleted in each
    # transaction.
    for pragma in ("journal_mode = WAL", "foreign_keys = ON", "temp_store = MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_snapshot(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(lock_deadline_s: float, connection: Connection) -> None:
    durable = connection.get_execution_options().get("durable", True)
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
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
