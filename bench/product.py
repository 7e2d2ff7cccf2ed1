"""The product as a user runs it: `llamalith up` in a folder of its own, asked over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from dotenv import dotenv_values

from bench.client import Answer, Message, events, http
from llamalith_app.supervise import pidfile

LLAMALITH = Path(sys.executable).parent / "llamalith"
START_S, END_S = 60, 60
ENDED = ("done", "error", "cancelled")
OURS = ("LLAMALITH_", "LLM_", "REDIS_URL", "DATABASE_URL", "SECRET_KEY", "ADMIN_", "N8N_")
PARTS = ("up.lock", "web.pid", "worker.pid", "valkey.pid")

GREEDY = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 64}
"""The peer's defaults, as settings of a model."""

_conversations = itertools.count(1)


class Product:
    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | environ
        self._up: asyncio.subprocess.Process | None = None
        self.api = httpx.AsyncClient()
        """Its address is set by the start."""

    async def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with (self.folder / "log").open("ab") as log:
            self._up = await asyncio.create_subprocess_exec(
                *(str(LLAMALITH), "up", "--port", str(port), "--data-dir", "data"),
                cwd=self.folder,
                env=self._environ | {"LLAMALITH_CONFIG": "config.json", "LLAMALITH_LOG_FORMAT": "json"},
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        if self._up.stdout is None:
            raise AssertionError("a pipe")
        line = b"first"
        while line and b"ready" not in line:
            line = await asyncio.wait_for(self._up.stdout.readline(), START_S)
        if not line:
            raise SystemExit(f"llamalith up did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
        token = dotenv_values(self.folder / "data/.env", interpolate=False)["N8N_API_TOKEN"]
        self.api = http(f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {token}"})

    async def stop(self) -> None:
        await self.api.aclose()
        if self._up is not None and self._up.returncode is None:
            self._up.send_signal(signal.SIGTERM)
            await asyncio.wait_for(self._up.wait(), END_S)

    @property
    def openai(self) -> tuple[str, str]:
        """Base URL and key for OpenAI clients."""
        return f"{str(self.api.base_url).rstrip('/')}/v1", self.api.headers["Authorization"].removeprefix("Bearer ")

    async def submit(self, content: str, **fields: Any) -> int:
        """Submits a job and returns its id. Without `conversation_id` it gets a new conversation."""
        conversation = fields.pop("conversation_id", None) or f"bench-{next(_conversations)}"
        body = {"content": content, "conversation_id": conversation, **fields}
        answer = await self.api.post("/api/jobs", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"not accepted: {answer.text}")
        job_id: int = answer.json()["job_id"]
        return job_id

    async def job(self, job_id: int) -> dict[str, Any]:
        job: dict[str, Any] = (await self.api.get(f"/api/jobs/{job_id}")).json()
        return job

    async def ended(self, job_id: int, poll_s: float = 0.05) -> dict[str, Any]:
        while (job := await self.job(job_id))["status"] not in ENDED:
            await asyncio.sleep(poll_s)
        if job["status"] != "done":
            raise SystemExit(f"job {job_id} ended as {job['status']}: {job['result']}")
        return job

    async def ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        system = "".join(message.content for message in messages if message.role == "system")
        return await self.turn(messages[-1].content, max_tokens, system_prompt=system)

    async def turn(self, content: str, max_tokens: int, **fields: Any) -> Answer:
        """Submits one turn and reads its event stream to the end."""
        started = time.perf_counter()
        job_id = await self.submit(content, max_tokens=max_tokens, **fields)
        first, texts = 0.0, list[str]()
        job: dict[str, Any] = {}
        async with self.api.stream("GET", f"/api/jobs/{job_id}/events") as answer:
            async for name, data in events(answer):
                if name == "delta":
                    first = first or time.perf_counter()
                    texts.append(data["text"])
                elif name in ENDED:
                    job = data
        ended = time.perf_counter()
        if job.get("status") != "done":
            raise SystemExit(f"job {job_id} did not end well: {job}")
        return Answer(
            "".join(texts), job["prompt_tokens"], job["completion_tokens"], (first or ended) - started, ended - started
        )

    def pids(self) -> list[int]:
        return pids_in(self.folder / "data")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log with this event."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        events = [json.loads(line) for line in lines if re.match(r"\{.*\}$", line)]
        return [line for line in events if line.get("event") == event]


def pids_in(data_dir: Path) -> list[int]:
    """The pids of all processes of the product in this folder."""
    found: list[int] = []
    for name in PARTS:
        pid = pidfile.read_pid(data_dir / "run" / name)
        if pid is not None:
            found.append(pid)
    return sorted({*found, *itertools.chain(*map(children_of, found))})


def children_of(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in threads for child in children.read_text().split()]


@asynccontextmanager
async def running(folder: Path, config: dict[str, Any], **environ: str) -> AsyncIterator[Product]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    product = Product(folder, environ)
    try:
        await product.start()
        yield product
    finally:
        await product.stop()
