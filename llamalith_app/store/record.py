"""What the whole record is called where others might stand beside it: in Redis.

Owns the one row that says so. Knows no Redis.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, select, update

from llamalith_app.store.database import at, plain_errors
from llamalith_app.store.tables import RecordRow


def record_id(path: Path) -> str:
    """Of a database whose schema is current. Waits for the disk: for a process's start. Raises StorageUnavailable."""
    with plain_errors(path), create_engine(at("sqlite", path), poolclass=NullPool).connect() as connection:
        return connection.execute(select(RecordRow.id)).scalar_one()


def assign_new_id(connection: Connection) -> None:
    """Makes a copy a record of its own."""
    connection.execute(update(RecordRow).values(id=secrets.token_hex(8)))
