"""What is taken away from the running product: its database, its disk, its Redis. Web and worker over one data
directory, a real file system and a real Valkey; only the engine's runner is the fake one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from sqlalchemy import Engine

from llamalith_app import app
from llamalith_app.settings.config import Config
from llamalith_app.store.database import write_engine
from llamalith_app.store.record import record_id
from llamalith_app.supervise import valkey
from tests.settle import eventually
from tests.web.conftest import PATIENT, make_config, serving
from tests.worker.conftest import Script, working_in_process

SMALL_DISK = "8m"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script.json")


@pytest.fixture
def config(tmp_path: Path, database_path: Path, redis_url: str) -> Config:
    return make_config(tmp_path, database_path, redis_url)


@pytest.fixture
async def api(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(config) as api:
        yield api


async def submit(api: httpx.AsyncClient, content: str = "x") -> int:
    answer = await api.post("/api/jobs", json={"content": content})
    assert answer.status_code == 200, answer.text
    job_id: int = answer.json()["job_id"]
    return job_id


async def refused(api: httpx.AsyncClient, content: str = "x") -> str:
    """A submit that is not taken, and says so honestly. Its reason."""
    answer = await api.post("/api/jobs", json={"content": content})
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["type"] == "about:llamalith/storage-unavailable"
    detail: str = answer.json()["detail"]
    return detail


async def done(api: httpx.AsyncClient, job_id: int) -> dict[str, object]:
    async def look() -> dict[str, object] | None:
        answer = await api.get(f"/api/jobs/{job_id}")
        job: dict[str, object] = answer.json()
        return job if answer.status_code == 200 and job["status"] == "done" else None

    job = await eventually(look)
    assert job is not None
    return job


def move(path: Path, to: Path) -> None:
    for end in ("", "-wal", "-shm"):
        if Path(f"{path}{end}").exists():
            Path(f"{path}{end}").rename(f"{to}{end}")


@pytest.mark.slow
@pytest.mark.parametrize("instead", ["nothing", "another database"])
async def test_a_database_that_is_taken_away_gets_nothing_written_and_goes_on_once_it_is_back(
    api: httpx.AsyncClient, config: Config, tmp_path: Path, migrated: Path, instead: str
) -> None:
    path = config.database_path
    first = await submit(api)
    move(path, tmp_path / "away.db")
    if instead == "another database":
        shutil.copy(migrated, path)
    assert "not the file that was opened" in await refused(api)
    listed = await api.get("/api/jobs")
    ready = await api.get("/readyz")
    assert (listed.status_code, ready.status_code) == (503, 503)
    assert path.exists() == (instead != "nothing")
    path.unlink(missing_ok=True)
    move(tmp_path / "away.db", path)
    second = await submit(api)
    listed = await api.get("/api/jobs")
    assert [job["id"] for job in listed.json()["jobs"]] == [second, first]


async def test_a_database_that_somebody_locks_is_503_and_loses_nothing(config: Config) -> None:
    async with serving(config, msgspec.structs.replace(PATIENT, lock_deadline_s=0.1)) as api:
        await submit(api)
        other = sqlite3.connect(config.database_path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert "locked" in await refused(api)
        assert (await api.get("/api/jobs")).status_code == 200, "who reads does not wait"
        other.execute("ROLLBACK")
        other.close()
        assert await submit(api) == 2, "what was refused was not stored"


async def test_a_file_system_that_takes_no_writes_is_503(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    connections: list[Any] = []

    def of_writes(path: Path, lock_deadline_s: float) -> Engine:
        engine = write_engine(path, lock_deadline_s)
        connections.append(engine.raw_connection().driver_connection)
        return engine

    monkeypatch.setattr("llamalith_app.store.database.write_engine", of_writes)
    async with serving(config) as api:
        await submit(api)
        (connection,) = connections
        connection.execute("PRAGMA query_only = 1")
        assert "readonly" in await refused(api)
        connection.execute("PRAGMA query_only = 0")
        assert await submit(api) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_reply_that_finds_the_disk_full_is_held_until_there_is_room(
    config: Config, script: Script, small_disk: Path, tmp_path: Path, migrated: Path
) -> None:
    path = small_disk / "llamalith.db"
    shutil.copy(migrated, path)
    config = msgspec.structs.replace(config, database_path=path)
    gate = tmp_path / "gate"
    script.write({"when": "held", "after": 1, "gate": str(gate), "reply": "held " * 200})
    with structlog.testing.capture_logs() as lines:
        async with serving(config) as api, working_in_process(config, script) as worker:
            job_id = await submit(api, "held")

            async def is_at_the_gate() -> bool:
                return any(one.completion_tokens for one in worker.dispatcher.running.values())

            await eventually(is_at_the_gate)
            ballast = small_disk / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            assert "full" in await refused(api, "x" * 100_000)
            n_lines = len(lines)
            gate.touch()

            async def is_held() -> bool:
                return any(line["event"] == "reply held: the database takes no writes" for line in lines[n_lines:])

            await eventually(is_held)
            assert (await api.get(f"/api/jobs/{job_id}")).json()["status"] == "processing"
            ballast.unlink()
            job = await done(api, job_id)
    assert (job["result"], job["attempt"]) == ("held " * 200, 1)
    engine = write_engine(path)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        assert connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar() == 1
    engine.dispose()


class OwnValkey:
    """One of this test alone, which may do to it what it likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder / 's'}"
        self.start()

    def start(self) -> None:
        binary, socket = valkey.find_binary(), self.folder / "s"
        self.process = subprocess.Popen(
            valkey.argv(binary, folder=self.folder, socket=socket), stdout=subprocess.DEVNULL
        )

    def client(self) -> Redis:
        return Redis.from_url(self.url, retry=Retry(ConstantBackoff(0.02), 250))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture
async def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnValkey]:
    server = OwnValkey(tmp_path_factory.mktemp("o"))
    async with server.client() as client:
        await client.ping()
    yield server
    server.kill()


def events_of(lines: list[MutableMapping[str, Any]]) -> list[str]:
    return [str(line) for line in lines if line["log_level"] == "warning" and "redis" in str(line).lower()]


@pytest.mark.slow
async def test_while_redis_is_frozen_everything_is_taken_and_done_and_the_log_says_it_once(
    config: Config, script: Script, own_valkey: OwnValkey
) -> None:
    config = msgspec.structs.replace(config, redis_url=own_valkey.url)
    with structlog.testing.capture_logs() as lines:
        async with serving(config, app.TIMINGS) as api, working_in_process(config, script):
            await done(api, await submit(api))
            own_valkey.process.send_signal(signal.SIGSTOP)
            for _ in range(5):
                await done(api, await submit(api))
            while_frozen = events_of(lines)
            own_valkey.process.send_signal(signal.SIGCONT)
            await done(api, await submit(api))
    # Once each: the web's hints, its progress, and what its streams hear.
    assert 1 <= len(while_frozen) == len(set(while_frozen)) <= 3, while_frozen


async def test_a_redis_without_memory_refuses_hints_and_nothing_else(
    config: Config, script: Script, own_valkey: OwnValkey
) -> None:
    config = msgspec.structs.replace(config, redis_url=own_valkey.url)
    async with own_valkey.client() as client:
        await client.config_set("maxmemory", "1")
    async with serving(config) as api, working_in_process(config, script):
        jobs = [await done(api, await submit(api)) for _ in range(3)]
    assert {job["attempt"] for job in jobs} == {1}


async def test_a_redis_that_is_put_back_to_yesterday_starts_nothing_twice(
    config: Config, script: Script, own_valkey: OwnValkey
) -> None:
    config = msgspec.structs.replace(config, redis_url=own_valkey.url)
    async with serving(config) as api:
        job_ids = [await submit(api, f"{n}") for n in range(5)]
        async with own_valkey.client() as client:

            async def are_hinted() -> bool:
                return bool(await client.llen("saq:llamalith:smollm2:queued"))

            await eventually(are_hinted)
            await client.save()
        yesterday = {path: path.read_bytes() for path in own_valkey.folder.rglob("*") if path.is_file()}
        async with working_in_process(config, script):
            for job_id in job_ids:
                await done(api, job_id)
        own_valkey.kill()
        for path, data in yesterday.items():
            path.write_bytes(data)
        own_valkey.start()
        async with working_in_process(config, script):
            newest = await done(api, await submit(api, "of today"))
            jobs = [await done(api, job_id) for job_id in job_ids]
    assert {job["attempt"] for job in [*jobs, newest]} == {1}


async def test_a_key_of_another_type_under_our_names_harms_nothing(
    config: Config, script: Script, own_valkey: OwnValkey
) -> None:
    config = msgspec.structs.replace(config, redis_url=own_valkey.url)
    async with own_valkey.client() as client:
        for job_id in range(1, 4):
            await client.set(f"llamalith:events:{record_id(config.database_path)}:{job_id}", "not a stream")
        await client.set("saq:llamalith:smollm2:queued", "not a list")
    async with serving(config) as api, working_in_process(config, script):
        jobs = [await done(api, await submit(api)) for _ in range(3)]
        async with asyncio.timeout(20):
            streamed = await api.get(f"/api/jobs/{jobs[0]['id']}/events")
    assert "event: done" in streamed.text
