"""Migrates a database file to this version's schema. Of several processes that start together, one does it.

Owns the path of the migrations and the lock around them. Knows nothing of what the tables mean.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

from advanced_alchemy.alembic.commands import AlembicCommands
from advanced_alchemy.config import AlembicSyncConfig, SQLAlchemySyncConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, NullPool, create_engine

from llamalith_app.errors import ConfigError
from llamalith_app.store.database import at, plain_errors, write_engine

MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(path: Path) -> bool:
    """Returns whether anything had to be migrated. Waits for another process that is migrating the same file.

    Raises ConfigError where the file was written by a newer version or is damaged, StorageUnavailable where it cannot
    be used now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".migrate-lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).chmod(0o600)
        with plain_errors(path):
            return not _is_current(path) and _upgrade(path)


def commands(engine: Engine) -> AlembicCommands:
    """Alembic's commands for this database; also used to generate a new migration."""
    return AlembicCommands(
        SQLAlchemySyncConfig(
            engine_instance=engine,
            alembic_config=AlembicSyncConfig(script_location=str(MIGRATIONS), version_table_name="alembic_version"),
        )
    )


def _is_current(path: Path) -> bool:
    """Whether the file has this version's schema. Needs no write lock, which a frozen process may hold.

    Raises ConfigError where a newer version wrote the file.
    """
    scripts = ScriptDirectory(str(MIGRATIONS))
    engine = create_engine(at("sqlite", path), poolclass=NullPool)
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    path.chmod(0o600)
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise ConfigError(
            [f"{path}: written by a newer version (schema {current}); this one knows {scripts.get_current_head()}"]
        )
    return current == scripts.get_current_head()


def _upgrade(path: Path) -> bool:
    engine = write_engine(path)
    try:
        commands(engine).upgrade()
    finally:
        engine.dispose()
    return True
