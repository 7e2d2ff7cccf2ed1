"""The record's id. It keeps the keys of several records apart in one Redis.

Owns the one row of `record`. Knows no Redis.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, select, update

from llamalith_app.store.database import at, plain_errors
from llamalith_app.store.tables import RecordRow


def record_id(path: Path) -> str:
    """The id in a database whose schema is current. Blocks, so call it at a process's start only.

    Raises StorageUnavailable or ConfigError.
    """
    with plain_errors(path), create_engine(at("sqlite", path), poolclass=NullPool).connect() as connection:
        return connection.execute(select(RecordRow.id)).scalar_one()


def assign_new_id(connection: Connection) -> None:
    """Gives a restored copy an id of its own."""
    connection.execute(update(RecordRow).values(id=secrets.token_hex(8)))
