"""A whole copy of a database while it is in use, and its way back.

Owns the copying and the judging of copies; SQLite's own backup does the rest. Knows no configuration and no process.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, select, text

from llamalith_app.errors import ConfigError
from llamalith_app.store import record, workers
from llamalith_app.store.jobs import leases, transitions
from llamalith_app.store.tables import JobRow, Outcome

IDS_A_MS = 10
"""More than can have been accepted between the newest job of a copy and its restore."""
LEAST_GAP = 10_000
"""For clocks that went back."""
FIRST_RELEASE = datetime(2026, 11, 1, tzinfo=UTC)
"""Before the first job of any copy that has none left."""
PAGES = 4096
"""Copied in one go, 16 MiB: others can write between them."""


def copy(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Copies a database as it stands at one moment, also while it is written; `tell` gets the pages done and all.

    `target` must not exist; it appears whole, synced and readable by its owner only, or not at all. Raises ConfigError
    for a source that is no whole database and for a target that is there or cannot be written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if target.exists():
            raise ConfigError([f"{target}: is there already; nothing was written"])
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(_opened(source)) as from_, closing(sqlite3.connect(part)) as to:
            # One snapshot: SQLite would begin anew each time that somebody wrote between two steps.
            from_.execute("BEGIN")
            from_.execute("SELECT 1 FROM sqlite_schema").fetchone()
            from_.backup(to, pages=PAGES, progress=lambda _, left, of: tell(of - left, of))
            # One file: what was in the other's log is in it now.
            to.execute("PRAGMA journal_mode = DELETE")
            _judge(to, source)
        _sync(part)
        _put(part, target)
        _sync(target.parent)
    except FileExistsError:
        raise ConfigError([f"{target}: is there already; nothing was written"]) from None
    except (OSError, sqlite3.Error) as error:
        raise ConfigError([f"{source} could not be copied to {target}: {error}"]) from None
    finally:
        part.unlink(missing_ok=True)


def go_on(connection: Connection, now: datetime) -> None:
    """Makes a copy the record from now on.

    What ran when it was made runs nowhere: its workers are not there, no start of theirs counts. And no job gets an id
    that one had which was made after the copy: its caller would read another's. What Redis has is the other record's.
    """
    made_at = (
        connection.execute(select(JobRow.created_at).order_by(JobRow.id.desc()).limit(1)).scalar() or FIRST_RELEASE
    )
    gap = max(now - made_at, timedelta()) // timedelta(milliseconds=1) * IDS_A_MS
    # Before its first job SQLite knows of no sequence.
    connection.execute(
        text(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'jobs', 0"
            " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'jobs')"
        )
    )
    connection.execute(
        text("UPDATE sqlite_sequence SET seq = seq + :gap WHERE name = 'jobs'"), {"gap": gap + LEAST_GAP}
    )
    record.rename(connection)
    for worker in workers.not_ended(connection):
        workers.end(connection, worker.id, now)
    for lease in leases.active_leases(connection):
        transitions.fail(
            connection,
            lease.job_id,
            lease.lease_token,
            now,
            outcome=Outcome.RELEASED,
            kind="restored",
            reason="The record was restored from a copy.",
            pause=None,
        )


def _opened(source: Path) -> sqlite3.Connection:
    if not source.is_file():
        raise ConfigError([f"{source}: there is no database"])
    # Read-only, yet it may make the files beside it that reading a log needs.
    return sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30, isolation_level=None)


def _judge(copied: sqlite3.Connection, source: Path) -> None:
    ((verdict,), *_) = copied.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        raise ConfigError([f"{source}: is damaged ({verdict}); nothing was written"])
    if not copied.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone():
        raise ConfigError([f"{source}: is no database of Llamalith; nothing was written"])


def _put(part: Path, target: Path) -> None:
    try:
        # Unlike a rename, a link never takes another's place.
        os.link(part, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        part.rename(target)  # on a file system without links, as of many sticks


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
