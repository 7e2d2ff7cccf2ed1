"""What every test may ask for: a migrated database, a moment, and a real Valkey."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis.utils
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from sqlalchemy import Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache

from llamalith_app.store.database import Database, write_engine
from llamalith_app.store.migrate import migrate
from llamalith_app.supervise import valkey
from tests import tiny_models

# Imports and collection make no garbage worth the time of looking for it. On again at the end of the collection.
gc.disable()

# Tests that are started under nohup would hand its ignored SIGHUP on to the product.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A property holds on a busy machine, too: how long an example takes decides nothing.
hypothesis.settings.register_profile(
    "patient", deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")
# For `make test-fast`, a third of the examples.
hypothesis.settings.register_profile("fast", hypothesis.settings(max_examples=20))

# Most tests have a database, and so an engine, of their own. All engines share what statements were compiled to: to
# compile them again for each test was a fifth of the run.
_COMPILED: LRUCache = LRUCache(2000)
Engine._compiled_cache = property(lambda engine: _COMPILED, lambda engine, its_own: None)  # type: ignore[assignment]
DefaultDialect.__eq__ = lambda one, other: type(one) is type(other)  # type: ignore[method-assign]
DefaultDialect.__hash__ = lambda one: hash(type(one))  # type: ignore[assignment, method-assign]


# Each connection to Redis says its library's version, and reads that from the disk.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What opens a browser or starts PostgreSQL is slow without saying so."""
    if {"chromium", "cluster"} & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is loaded by now stays for the whole run: the garbage collector need not look through it again and again."""
    gc.freeze()
    # What tests leave is looked through a fifth as often; a tenth of the run went into it.
    gc.set_threshold(10_000, 50, 50)
    gc.enable()


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


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server for the whole run; `redis_url` empties it for each test."""
    folder = tmp_path_factory.mktemp("v")
    socket = folder / "s"
    process = subprocess.Popen(
        valkey.argv(valkey.find_binary(), folder=folder, socket=socket), stdout=subprocess.DEVNULL
    )
    client = Redis.from_url(f"unix://{socket}", retry=Retry(ConstantBackoff(0.02), 250))
    client.ping()
    client.close()
    yield f"unix://{socket}"
    process.terminate()
    process.wait()


@pytest.fixture
def redis_url(valkey_url: str) -> str:
    with Redis.from_url(valkey_url) as client:
        client.flushall()
    return valkey_url


@pytest.fixture
def absent_redis_url(tmp_path: Path) -> str:
    return f"unix://{tmp_path / 'nobody.sock'}"


@pytest.fixture(scope="session")
def tiny_model(pytestconfig: pytest.Config) -> Callable[[tiny_models.Kind], Path]:
    """The file of a small model with random weights, written once for this version of its script."""
    assert pytestconfig.cache is not None
    script = Path(tiny_models.__file__).read_bytes()
    folder = pytestconfig.cache.mkdir("tiny_models-" + hashlib.sha256(script).hexdigest()[:16])

    def written(kind: tiny_models.Kind) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            # Processes that meet here each write their own; the last one stays, and all are the same.
            part = folder / f"{kind}.{os.getpid()}.part"
            tiny_models.write(part, kind).rename(path)
        return path

    return written
