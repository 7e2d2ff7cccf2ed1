"""Backup and restore: copies a database while it is in use, and makes a copy the record again.

Owns copying and the validation of copies, on top of SQLite's backup API. Knows no configuration and no process.
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

MAX_IDS_PER_MS = 10
"""Upper bound of the jobs accepted per millisecond between the newest job of a copy and its restore."""
MIN_ID_GAP = 10_000
"""Skipped in any case: the clock may have gone back since the copy was made."""
FIRST_RELEASE = datetime(2026, 11, 1, tzinfo=UTC)
"""Stands in for the newest job's time in a copy that has no jobs: earlier than any job."""
PAGES_PER_STEP = 4096
"""16 MiB. Other processes can write between two steps."""


def copy(source: Path, target: Path, on_progress: Callable[[int, int], None]) -> None:
    """Copies one snapshot of a database, which may be written meanwhile. Calls `on_progress(pages copied, all pages)`.

    `target` must not exist. It appears complete, synced and readable by its owner only, or not at all. Raises
    ConfigError where the source is damaged or no database of Llamalith, and where the target exists or cannot be
    written.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        if target.exists():
            raise ConfigError([f"{target}: is there already; nothing was written"])
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with closing(_open_read_only(source)) as from_, closing(sqlite3.connect(part)) as to:
            # One snapshot: otherwise SQLite restarts the copy whenever another process writes between two steps.
            from_.execute("BEGIN")
            from_.execute("SELECT 1 FROM sqlite_schema").fetchone()
            from_.backup(to, pages=PAGES_PER_STEP, progress=lambda _, left, of: on_progress(of - left, of))
            # The copy is a single file, without a WAL beside it.
            to.execute("PRAGMA journal_mode = DELETE")
            _validate(to, source)
        _sync(part)
        _move_into_place(part, target)
        _sync(target.parent)
    except FileExistsError:
        raise ConfigError([f"{target}: is there already; nothing was written"]) from None
    except (OSError, sqlite3.Error) as error:
        raise ConfigError([f"{source} could not be copied to {target}: {error}"]) from None
    finally:
        part.unlink(missing_ok=True)


def activate(connection: Connection, now: datetime) -> None:
    """Makes a restored copy the record.

    Jobs that were processing at the time of the copy go back to the queue, and that attempt does not count: its worker
    is gone. New jobs get ids above all that the original may have given since, so that no caller reads another's job.
    The record gets a new id, since what is in Redis belongs to the original.
    """
    made_at = (
        connection.execute(select(JobRow.created_at).order_by(JobRow.id.desc()).limit(1)).scalar() or FIRST_RELEASE
    )
    gap = max(now - made_at, timedelta()) // timedelta(milliseconds=1) * MAX_IDS_PER_MS
    # SQLite adds the row of the sequence with the first job.
    connection.execute(
        text(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'jobs', 0"
            " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'jobs')"
        )
    )
    connection.execute(
        text("UPDATE sqlite_sequence SET seq = seq + :gap WHERE name = 'jobs'"), {"gap": gap + MIN_ID_GAP}
    )
    record.assign_new_id(connection)
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


def _open_read_only(source: Path) -> sqlite3.Connection:
    if not source.is_file():
        raise ConfigError([f"{source}: there is no database"])
    # Read-only mode can still create the -shm file that reading a WAL needs.
    return sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=30, isolation_level=None)


def _validate(copied: sqlite3.Connection, source: Path) -> None:
    ((verdict,), *_) = copied.execute("PRAGMA quick_check(1)").fetchall()
    if verdict != "ok":
        raise ConfigError([f"{source}: is damaged ({verdict}); nothing was written"])
    if not copied.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone():
        raise ConfigError([f"{source}: is no database of Llamalith; nothing was written"])


def _move_into_place(part: Path, target: Path) -> None:
    try:
        # Unlike a rename, a link never overwrites an existing file.
        os.link(part, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        part.rename(target)  # a file system without hard links, such as FAT


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
