"""What the lists of conversations cost, and what the index of words costs each prompt and reply.

    .venv/bin/python -m bench.pages [--conversations 10000] [--turns 10] [--rounds 30] [--writes 2000]

Writes a database with so many conversations of so many turns each, starts `llamalith web` on it, and prints the time
until each page is there: the best and the median over HTTP, in ms, with what the web's process took of the processor;
and that of the sidebar's read alone. Then stores prompts and replies by the store's own functions, and prints what one
takes of the processor. Takes about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import bcrypt
import httpx
from sqlalchemy import Connection, Engine

from bench import stored
from bench.product import LLAMALITH, OURS
from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.store import conversation_list, search, turns, workers
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.migrate import migrate
from llamalith_app.store.users import ADMIN_ID

PROMPT_CHARS, REPLY_CHARS = 300, 1500
START_S = 30
INDEXED_TOGETHER = 25
"""Jobs whose messages come into the index of words together."""
PAGES = {
    "/chat/conversations": "the page",
    "/chat/conversations?archived=any": "the page, archived ones too",
    "/chat/conversations?tag=work": "by a tag",
    "/chat/conversations?source=api": "by source",
    "/chat/conversations?q={rare}": "a search for a rare word",
    "/chat/conversations?q={begun}": "a search for the beginning of frequent words",
    "/chat/conversations?q={frequent}": "a search for a word in every message",
    "/chat/conversations?q={frequent}&archived=true": "the same in the archive",
    "/chat/conversations?before={middle}": "a page from the middle",
    "/api/conversations?limit=100": "100 by the API",
}


def some_words(seed: int, n: int = 20_000) -> list[str]:
    chance = random.Random(seed)  # noqa: S311 - the same words in each run
    return ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 10))) for _ in range(n)]


def texts(n: int, n_chars: int, words: list[str]) -> list[str]:
    """With the frequencies of words in a language, about: the first word is in every text."""
    chance = random.Random(n_chars)  # noqa: S311
    found = []
    for _ in range(n):
        ranks = (min(int(chance.paretovariate(0.8)), len(words)) - 1 for _ in range(n_chars // 7))
        found.append(" ".join([words[0], *(words[rank] for rank in ranks)]))
    return found


def build(path: Path, n_conversations: int, n_turns: int, words: list[str]) -> None:
    """Half by the page, a third with titles, a tenth archived, a fifth tagged, some pinned."""
    pairs = list(zip(texts(500, PROMPT_CHARS, words), texts(500, REPLY_CHARS, words), strict=True))
    stored.build(path, n_conversations * n_turns, n_conversations, pairs)
    with stored.writing(path, 0) as connection:
        connection.execute(
            "UPDATE conversations SET title = CASE id % 3 WHEN 1 THEN 'A title ' || id END,"
            " title_by = CASE id % 3 WHEN 1 THEN 'person' END, source = CASE id % 2 WHEN 0 THEN 'api' ELSE 'page' END,"
            " pinned_at = CASE WHEN id % 1000 = 1 THEN created_at END,"
            " archived_at = CASE WHEN id % 10 = 0 THEN created_at END"
        )
        connection.execute(
            "INSERT INTO conversation_tags (conversation_id, tag) SELECT id, CASE WHEN id % 50 = 0 THEN 'work'"
            " ELSE 'tag ' || id % 30 END FROM conversations WHERE id % 5 = 0"
        )
    engine = write_engine(path)
    index_all(engine.execution_options(durable=False))
    engine.dispose()


@asynccontextmanager
async def serving(path: Path, redis_url: str | None = None) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """`llamalith web` on this database: a client that is logged in, and the process's id. `redis_url` None: there is no
    Redis."""
    password = secrets.token_urlsafe(16)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
        "DATABASE_URL": f"sqlite:///{path}",
        "REDIS_URL": redis_url or f"unix://{path.parent}/nobody.sock",
        "SECRET_KEY": secrets.token_urlsafe(48),
        "N8N_API_TOKEN": secrets.token_urlsafe(32),
        "ADMIN_PASSWORD_HASH": bcrypt.hashpw(password.encode(), bcrypt.gensalt(6)).decode(),
    }
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (path.parent / "log").open("wb") as log:
        web = await asyncio.create_subprocess_exec(
            *(LLAMALITH, "web", "--port", str(port), "--data-dir", "."),
            cwd=path.parent,
            env=environ,
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/healthz")).status_code == 200:
                        break
                if time.monotonic() > until:
                    raise SystemExit((path.parent / "log").read_text())
                await asyncio.sleep(0.1)
            await client.post("/chat/login", data={"password": password}, headers={"Origin": address})
            yield client, web.pid
    finally:
        web.terminate()
        await web.wait()


async def over_http(path: Path, rounds: int, frequent: str, n_turns: int, n_conversations: int) -> None:
    middle = n_turns - n_conversations // 2
    async with serving(path) as (client, pid):
        for address, words in PAGES.items():
            url = address.format(rare=f"rare{n_turns // 2 + 1}", begun=frequent[:3], frequent=frequent, middle=middle)
            times, computed = [], []
            for number in range(rounds + 3):
                started, computed_before = time.perf_counter(), processor_ms(pid)
                answer = await client.get(url)
                took = 1000 * (time.perf_counter() - started)
                answer.raise_for_status()
                if number >= 3:
                    times.append(took)
                    computed.append(processor_ms(pid) - computed_before)
            show(words, times, computed)


def processor_ms(pid: int) -> float:
    """What the process has taken of the processor so far."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6


def show(words: str, times: list[float], computed: list[float]) -> None:
    medians = f"{statistics.median(times):.1f} | {statistics.median(computed):.1f}"
    print(f"| {words} | {min(times):.1f} | {medians} |", flush=True)


def sidebar(path: Path, rounds: int) -> None:
    engine = write_engine(path)
    with engine.connect() as connection:
        times, computed = [], []
        for _ in range(rounds + 3):
            started, computed_before = time.perf_counter(), time.process_time()
            conversation_list.sidebar(connection, ADMIN_ID)
            times.append(1000 * (time.perf_counter() - started))
            computed.append(1000 * (time.process_time() - computed_before))
    show("the sidebar's read alone", times[3:], computed[3:])
    engine.dispose()


def a_job(number: int, prompts: list[str]) -> submission.NewJob:
    request = JobRequest(model="m", system_prompt="", max_attempts=3)
    inputs = [Message(role="user", content=prompts[number % 200])]
    return submission.NewJob(ADMIN_ID, "r", request, inputs, f"c{number // 5}")


def finish(connection: Connection, claimed: transitions.Claim, reply: str) -> None:
    transitions.finish(
        connection,
        claimed.job_id,
        claimed.lease_token,
        datetime.now(UTC),
        reply_to=turns.read_turn(connection, claimed.turn_id, 0).reply_to,
        reply=reply,
        finish_reason="stop",
        prompt_tokens=1,
        prompt_tokens_reused=0,
        completion_tokens=1,
        omitted_messages=0,
    )


def writes(folder: Path, n: int, words: list[str]) -> None:
    """Prints the microseconds of processor time of a submit and of a finish, each in a transaction of its own, and
    those of the index of words for each message."""
    prompts, replies = texts(200, PROMPT_CHARS, words), texts(200, REPLY_CHARS, words)
    migrate(path := folder / "writes.db")
    engine = write_engine(path)
    with engine.begin() as connection:
        workers.register(connection, host="h", pid=1, lock_path="", models=["m"], n_slots=1, now=datetime.now(UTC))
    lightly = engine.execution_options(durable=False)
    spent: dict[str, list[float]] = {}
    for number in range(n):
        started = time.process_time()
        with lightly.begin() as connection:
            submission.submit(connection, a_job(number, prompts), datetime.now(UTC))
        submitted = time.process_time()
        with lightly.begin() as connection:
            claimed = transitions.claim(connection, "m", 1, 1, datetime.now(UTC))
        if claimed is None:
            raise SystemExit("no job was due")
        claimed_at = time.process_time()
        with lightly.begin() as connection:
            finish(connection, claimed, replies[number % 200])
        finished = time.process_time()
        spent.setdefault("submit", []).append(1e6 * (submitted - started))
        spent.setdefault("finish", []).append(1e6 * (finished - claimed_at))
        if number % INDEXED_TOGETHER == 0:
            index_all(lightly)
            spent.setdefault("index, of each message", []).append(
                1e6 * (time.process_time() - finished) / (2 * INDEXED_TOGETHER)
            )
    print("\n| processor time, µs (mean) | |\n|---|---|")
    for what, times in spent.items():
        print(f"| {what} | {statistics.mean(times):.0f} |")


def index_all(engine: Engine) -> None:
    is_behind = True
    while is_behind:
        with engine.begin() as connection:
            is_behind = search.index_messages(connection)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="a folder with room for some 600 MB")
    parser.add_argument("--writes", type=int, default=2000)
    options = parser.parse_args()
    words = some_words(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "pages.db")
        started = time.perf_counter()
        build(path, options.conversations, options.turns, words)
        n_turns = options.conversations * options.turns
        print(
            f"{options.conversations:,} conversations, {2 * n_turns:,} messages, {path.stat().st_size / 2**20:.0f} MiB,"
        )
        print(f"written in {time.perf_counter() - started:.0f} s\n")
        print("| ms | best | median | processor, median |\n|---|---|---|---|")
        sidebar(path, options.rounds)
        asyncio.run(over_http(path, options.rounds, words[0], n_turns, options.conversations))
        writes(Path(folder), options.writes, words)


if __name__ == "__main__":
    main()
