"""What every test may ask for: a migrated database, a moment, and a real Valkey."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from llamalith_app.store.database import Database, write_engine
from llamalith_app.store.migrate import migrate


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "empty.db"
    migrate(path)
    return path


@pytest.fixture
def database_path(migrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(migrated, tmp_path / "llamalith.db"))


@pytest.fixture
def engine(database_path: Path) -> Iterator[Engine]:
    engine = write_engine(database_path)
    yield engine
    engine.dispose()


@pytest.fixture
async def database(database_path: Path) -> AsyncIterator[Database]:
    database = Database(database_path)
    database.open()
    yield database
    await database.close()
