"""The whole product as its user starts it: `llamalith up` on an empty folder, with the real small model."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from dotenv import dotenv_values

from llamalith_app.supervise import pidfile
from tests.settle import eventually

LLAMALITH = Path(sys.executable).parent / "llamalith"
ENDED = ("done", "error", "cancelled")


def clean_environ(**more: str) -> dict[str, str]:
    """This environment without anything that would configure the product."""
    ours = ("LLAMALITH_", "LLM_", "REDIS_URL", "DATABASE_URL", "SECRET_KEY", "ADMIN_", "N8N_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | more


def free_port() -> int:
    """Stays bound by this process, without listening: a server with SO_REUSEADDR may listen there, and nobody who asks
    the kernel for any port gets it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    atexit.register(held.close)
    port: int = held.getsockname()[1]
    return port


class Product:
    def __init__(self, folder: Path, port: int, up: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.port = port
        self.up = up
        self.output: list[str] = []
        """On standard output until it was ready; secrets are there the first time only."""
        self.api = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False, verify=False)

    async def until_ready(self) -> list[str]:
        """The lines on standard output up to the ready line."""
        assert self.up.stdout is not None
        lines: list[str] = []
        while not (lines and "llamalith: ready" in lines[-1]):
            line = await asyncio.wait_for(self.up.stdout.readline(), 60)
            assert line, f"up ended before it was ready: {lines} {self.log()[-2000:]}"
            lines.append(line.decode().rstrip())
        token = dotenv_values(self.data_dir / ".env", interpolate=False)["N8N_API_TOKEN"]
        self.api.headers["Authorization"] = f"Bearer {token}"
        return lines

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def try_pid(self, part: str) -> int | None:
        """None: it is just being started."""
        return pidfile.read_pid(self.data_dir / "run" / f"{part}.pid")

    def pid(self, part: str) -> int:
        pid = self.try_pid(part)
        assert pid is not None
        return pid

    def engine_pids(self) -> list[int]:
        """Children of the worker."""
        worker = self.pid("worker")
        return [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]

    async def submit(self, content: str, **fields: Any) -> int:
        answer = await self.api.post("/api/jobs", json={"content": content, **fields})
        assert answer.status_code == 200, answer.text
        job_id: int = answer.json()["job_id"]
        return job_id

    async def job(self, job_id: int) -> dict[str, Any]:
        answer = await self.api.get(f"/api/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    async def ended(self, job_id: int, *, within_s: float = 60) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            job = await self.job(job_id)
            return job if job["status"] in ENDED else None

        job = await eventually(look, within_s=within_s)
        assert job is not None
        return job

    async def in_phase(self, job_id: int, *phases: str) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            job = await self.job(job_id)
            assert job["status"] not in ENDED, job
            return job if job["progress"] and job["progress"]["phase"] in phases else None

        job = await eventually(look)
        assert job is not None
        return job

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.up.send_signal(number)
        return await asyncio.wait_for(self.up.wait(), 60)

    def attempts(self, job_id: int) -> list[tuple[str, float]]:
        """Each attempt's outcome, and the seconds from its end to the start of the next (0 for the last)."""
        connection = sqlite3.connect(f"file:{self.data_dir}/llamalith.db?mode=ro", uri=True)
        rows = connection.execute(
            "SELECT a.outcome, coalesce(86400.0 * (julianday(b.started_at) - julianday(a.ended_at)), 0)"
            " FROM attempts a LEFT JOIN attempts b ON b.job_id = a.job_id AND b.attempt = a.attempt + 1"
            " WHERE a.job_id = ? ORDER BY a.attempt",
            (job_id,),
        ).fetchall()
        connection.close()
        return rows


def configure(folder: Path, **settings: int) -> None:
    """Short stories keep the suite short; threads that wait for each other would take the other tests' cores."""
    model = {"max_tokens": 150, "n_threads": 1} | settings
    (folder / "config.json").write_text(json.dumps({"model_settings": {"smollm2": model}}))


async def start(
    folder: Path, port: int | None = None, grace_s: float = 30, environ: Mapping[str, str] | None = None
) -> Product:
    port = port or free_port()
    if not (folder / "config.json").exists():
        configure(folder)
    with (folder / "log").open("a") as log:
        up = await asyncio.create_subprocess_exec(
            *(str(LLAMALITH), "up", "--port", str(port), "--data-dir", str(folder / "data"), "--grace", str(grace_s)),
            cwd=folder,
            env=clean_environ(LLAMALITH_CONFIG="config.json", **(environ or {})),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    return Product(folder, port, up)


@asynccontextmanager
async def running(folder: Path, **environ: str) -> AsyncIterator[Product]:
    product = await start(folder, environ=environ)
    try:
        product.output = await product.until_ready()
        yield product
    finally:
        if product.up.returncode is None:
            await product.stop()
        await product.api.aclose()


WITH_SHARED = pytest.mark.asyncio(loop_scope="session")
"""A test with `product`."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def product(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Product]:
    """Shared by all tests that leave its `up` alive: a start takes seconds. Its conversations are there for the next
    test, and so are the prefixes that its engine keeps.

    Ends with `llamalith check`: whatever the tests did, the record is whole.
    """
    folder = tmp_path_factory.mktemp("product")
    # What is long here is soon read.
    configure(folder, n_ctx=1024)
    async with running(folder) as product:
        yield product
    check = await asyncio.create_subprocess_exec(
        *(str(LLAMALITH), "check", "--data-dir", str(product.data_dir)),
        cwd=folder,
        env=clean_environ(),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await check.communicate()
    assert check.returncode == 0, output.decode()
    assert b"invariants hold" in output


def is_alive(pid: int | None) -> bool:
    try:
        return pid is not None and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
