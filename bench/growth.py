"""P7, P8: what a large database costs compared with a new one, and a long queue on top.

    .venv/bin/python -m bench.growth [--stored 1000000] [--conversations 100000] [--queued 10000] [--rounds 300]

Builds a database with so many ended jobs and one with 1,000, starts `llamalith web` on each, and measures both in
turns, A B A B …: submit, list, latest and one job over HTTP; claim, reading its turn, finish and queue depth by the
store's functions in this process, as a worker calls them. For these the share of CPU time is shown; the rest is the
disk and other programs. Then so many jobs wait in the large database, in several shapes, and none in the small one.
Last, the memory that Redis needs for so many hints. Prints one Markdown table; takes about three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import bcrypt
import httpx
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from bench import stored
from bench.product import LLAMALITH, OURS
from bench.stored import MODELS, Shape
from bench.table import Row, percentile, render, short
from llamalith_app.jobs.queue import Hint, enqueue, saq_queue
from llamalith_app.store import turns, workers
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import transitions, waiting
from llamalith_app.store.tables import Priority
from llamalith_app.supervise import valkey

FEW_STORED, FEW_CONVERSATIONS = 1000, 100
WARM_UP = 20
START_S = 30
MAX_CHARS = 100_000
HINTS_MB = 20
CLAIM_MS, READ_MS, RATIO = 5, 50, 1.5
CLASSES = [priority.name.lower() for priority in Priority]

T = TypeVar("T")
Times = dict[str, list[float]]
"""Milliseconds of each operation, by its name."""


class Side:
    """One database with a web process; this process calls what a worker would."""

    def __init__(self, api: httpx.AsyncClient, engine: Engine, worker_id: int, n_conversations: int) -> None:
        self._api = api
        self._engine = engine
        self._worker_id = worker_id
        self.n_conversations = n_conversations
        """The conversations that `latest` asks for."""
        self.last_queued: int | None = None

    async def round(self, number: int, times: Times) -> None:
        """Each operation once; leaves as many jobs waiting as before."""
        model, priority = MODELS[number % 2], number // 2 % 3
        body = {"content": "How are you?", "model": model, "priority": CLASSES[priority]}
        accepted = await self._timed(times, "submit", "POST", "/api/jobs", body)
        await self._timed(times, "list of 100", "GET", "/api/jobs?limit=100")
        conversation = random.randrange(self.n_conversations)  # noqa: S311 - no secret
        await self._timed(times, "latest", "GET", f"/api/conversations/c{conversation}/latest")
        await self._timed(times, "one job", "GET", f"/api/jobs/{self.last_queued or accepted['job_id']}")
        now = datetime.now(UTC)
        self._called(times, "load and due", lambda connection: waiting.queue_depth(connection, MODELS, now))
        claim = self._called(
            times, "claim", lambda connection: transitions.claim(connection, model, priority, self._worker_id, now)
        )
        if claim is None:
            raise SystemExit("nothing could be claimed")
        turn = self._called(
            times, "read turn", lambda connection: turns.read_turn(connection, claim.turn_id, MAX_CHARS)
        )
        self._called(
            times,
            "finish",
            lambda connection: transitions.finish(
                connection,
                claim.job_id,
                claim.lease_token,
                now,
                reply_to=turn.reply_to,
                reply="Fine.",
                finish_reason="stop",
                prompt_tokens=4,
                prompt_tokens_reused=0,
                completion_tokens=2,
                omitted_messages=0,
            ),
        )

    async def _timed(self, times: Times, what: str, method: str, path: str, body: object = None) -> dict[str, Any]:
        started = time.perf_counter()
        answer = await self._api.request(method, path, json=body)
        times.setdefault(what, []).append((time.perf_counter() - started) * 1000)
        if answer.status_code != 200:
            raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
        found: dict[str, Any] = answer.json()
        return found

    def _called(self, times: Times, what: str, function: Callable[[Connection], T]) -> T:
        started, computed = time.perf_counter(), time.thread_time()
        with self._engine.connect().execution_options(durable=False) as connection, connection.begin():
            found = function(connection)
        times.setdefault(what, []).append((time.perf_counter() - started) * 1000)
        times.setdefault(f"{what}: computing", []).append((time.thread_time() - computed) * 1000)
        return found


@asynccontextmanager
async def serving(folder: Path, redis_url: str, n_conversations: int) -> AsyncIterator[Side]:
    """Starts `llamalith web` on the database in this folder."""
    paths = {model: str(folder / f"{model}.gguf") for model in MODELS}
    (folder / "config.json").write_text(json.dumps({"model_paths": paths, "available_models": MODELS}))
    token = secrets.token_urlsafe(32)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
        "LLAMALITH_CONFIG": "config.json",
        "REDIS_URL": redis_url,
        "SECRET_KEY": secrets.token_urlsafe(48),
        "N8N_API_TOKEN": token,
        "ADMIN_PASSWORD_HASH": bcrypt.hashpw(secrets.token_bytes(16), bcrypt.gensalt(6)).decode(),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (folder / "log").open("wb") as log:
        web = await asyncio.create_subprocess_exec(
            *(LLAMALITH, "web", "--port", str(port), "--data-dir", "."), cwd=folder, env=environ, stdout=log, stderr=log
        )
    engine = write_engine(folder / "llamalith.db")
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
        ) as api:
            await _until_healthy(api, folder / "log")
            with engine.begin() as connection:
                worker_id = _register(connection)
            yield Side(api, engine, worker_id, n_conversations)
    finally:
        engine.dispose()
        web.terminate()
        await web.wait()


async def _until_healthy(api: httpx.AsyncClient, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        try:
            if (await api.get("/healthz")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.05)
    raise SystemExit(f"the web did not start:\n{log.read_text()[-2000:]}")


def _register(connection: Connection) -> int:
    return workers.register(
        connection,
        host="bench",
        pid=os.getpid(),
        lock_path="",
        models=list(MODELS),
        n_slots=1,
        now=datetime.now(UTC),
    )


@asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[str]:
    socket_path = folder / "valkey.sock"
    argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket_path)
    server = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
    try:
        while not await valkey.answers(socket_path):
            await asyncio.sleep(0.02)
        yield f"unix://{socket_path}"
    finally:
        server.terminate()
        await server.wait()


async def in_turns(few: Side, many: Side, n_rounds: int) -> tuple[Times, Times]:
    times: tuple[Times, Times] = ({}, {})
    for number in range(n_rounds + WARM_UP):
        for side, seen in zip((few, many), times, strict=True):
            await side.round(number, seen if number >= WARM_UP else {})
    return times


def rows(what: str, few: Times, many: Times, *, is_queued: bool) -> list[Row]:
    found = []
    for name in many:
        (p50, p99), (few_p50, few_p99) = ([percentile(of[name], p) for p in (50, 99)] for of in (many, few))
        goal, is_met = "", None
        if name == "claim":
            goal, is_met = f"p99 ≤ {CLAIM_MS} ms", p99 <= CLAIM_MS
        elif name in ("list of 100", "latest"):
            if is_queued:
                goal, is_met = f"p99 ≤ {READ_MS} ms", p99 <= READ_MS
            else:
                goal, is_met = f"p99 ≤ {READ_MS} ms and {RATIO} of the few's", p99 <= min(READ_MS, RATIO * few_p99)
        ratio = f"{p50 / few_p50:.2f}, {p99 / few_p99:.2f}"
        found.append(Row(what, name, _percentiles(few_p50, few_p99), _percentiles(p50, p99), ratio, goal, is_met))
    return found


def _percentiles(p50: float, p99: float) -> str:
    return f"{short(p50)}, {short(p99)} ms"


async def hints(redis_url: str, n_hints: int) -> Row:
    async with Redis.from_url(redis_url) as client:
        await client.flushall()
        before = (await client.info("memory"))["used_memory"]
        queue = saq_queue(client, MODELS[0])
        for job_id in range(1_000_000, 1_000_000 + n_hints):
            await enqueue(queue, Hint(job_id, 1))
        grown = ((await client.info("memory"))["used_memory"] - before) / 2**20
    return Row("", f"Redis, {n_hints:,} hints", "", f"{grown:.1f} MB", "", f"≤ {HINTS_MB} MB", grown <= HINTS_MB)


async def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    found = []
    sizes = {"few": (FEW_STORED, FEW_CONVERSATIONS), "many": (options.stored, options.conversations)}
    for name, (n_jobs, n_conversations) in sizes.items():
        started = time.perf_counter()
        (folder / name).mkdir()
        stored.build(folder / name / "llamalith.db", n_jobs, n_conversations)
        n_mb = (folder / name / "llamalith.db").stat().st_size / 2**20
        print(f"{n_jobs:,} jobs stored, {n_mb:.0f} MB, in {time.perf_counter() - started:.0f} s", flush=True)
    path = folder / "many" / "llamalith.db"
    async with AsyncExitStack() as stack:
        redis_url = await stack.enter_async_context(redis(folder))
        few, many = [
            await stack.enter_async_context(serving(folder / name, redis_url, n)) for name, (_, n) in sizes.items()
        ]
        found += rows("nothing queued", *await in_turns(few, many, options.rounds), is_queued=False)
        n_root = round(options.queued**0.5)
        for shape in (
            Shape(options.queued, 1),
            Shape(n_root, n_root),
            Shape(1, options.queued, is_blocked=True, is_mixed=False),
        ):
            many.last_queued = stored.let_wait(path, shape)
            many.n_conversations = shape.n_conversations
            found += rows(str(shape), *await in_turns(few, many, options.rounds), is_queued=True)
            stored.let_nothing_wait(path)
        found.append(await hints(redis_url, options.queued))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stored", type=int, default=1_000_000)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="a folder on the database's disk; some 1.5 GB are written")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llamalith-growth-", dir=options.folder) as folder:
        found = asyncio.run(measure(Path(folder), options))
    took = time.perf_counter() - started
    print(f"\n{options.rounds} rounds of each, {took:.0f} s, load {os.getloadavg()[0]:.1f} at the end\n")
    head = ("queued", "", f"{FEW_STORED:,} stored, none queued: p50, p99", f"{options.stored:,} stored: p50, p99")
    print(render(found, (*head, "ratio", "goal", "met")))
    if any(row.is_met is False for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
