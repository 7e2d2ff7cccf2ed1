"""What the lists of conversations cost, and what the index of words costs each prompt and reply.

    .venv/bin/python -m bench.pages [--conversations 10000] [--turns 10] [--rounds 30] [--writes 2000]

Writes a database with so many conversations of so many turns each, starts `llamalith web` on it, and prints the time
until each page is there: the best and the median over HTTP, in ms; and that of the sidebar's read alone. Then stores as
many prompts and replies with the index and without it, A B A B …, by the store's own functions, and prints what one
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
from sqlalchemy import Connection, text

from bench import stored
from bench.product import LLAMALITH, OURS
from llamalith_app.contracts.conversations import Message
from llamalith_app.contracts.jobs import JobRequest
from llamalith_app.store import conversation_list, workers
from llamalith_app.store.database import write_engine
from llamalith_app.store.jobs import submission, transitions
from llamalith_app.store.migrate import migrate
from llamalith_app.store.users import ADMIN_ID

PROMPT_CHARS, REPLY_CHARS = 300, 1500
START_S = 30
WITHOUT_INDEX = ("message_added", "message_deleted")
"""The triggers that keep the index of words."""
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


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """`llamalith web` on this database, and a client that is logged in. There is no Redis."""
    password = secrets.token_urlsafe(16)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
        "DATABASE_URL": f"sqlite:///{path}",
        "REDIS_URL": f"unix://{path.parent}/nobody.sock",
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
            yield client
    finally:
        web.terminate()
        await web.wait()


async def over_http(path: Path, rounds: int, frequent: str, n_turns: int) -> None:
    async with serving(path) as client:
        for address, words in PAGES.items():
            url = address.format(rare=f"rare{n_turns // 2}", begun=frequent[:3], frequent=frequent, middle=n_turns // 2)
            times = []
            for number in range(rounds + 3):
                started = time.perf_counter()
                answer = await client.get(url)
                took = 1000 * (time.perf_counter() - started)
                answer.raise_for_status()
                if number >= 3:
                    times.append(took)
            show(words, times)


def show(words: str, times: list[float]) -> None:
    print(f"| {words} | {min(times):.1f} | {statistics.median(times):.1f} |", flush=True)


def sidebar(path: Path, rounds: int) -> None:
    engine = write_engine(path)
    with engine.connect() as connection:
        times = []
        for _ in range(rounds + 3):
            started = time.perf_counter()
            conversation_list.sidebar(connection, ADMIN_ID)
            times.append(1000 * (time.perf_counter() - started))
    show("the sidebar's read alone", times[3:])
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
        reply=reply,
        finish_reason="stop",
        prompt_tokens=1,
        prompt_tokens_reused=0,
        completion_tokens=1,
        omitted_messages=0,
    )


def writes(folder: Path, n: int, words: list[str]) -> None:
    """Prints the microseconds of processor time of a submit and of a finish, each in a transaction of its own."""
    prompts, replies = texts(200, PROMPT_CHARS, words), texts(200, REPLY_CHARS, words)
    spent: dict[tuple[str, str], list[float]] = {}
    engines = {}
    for side in ("with the index", "without"):
        migrate(path := folder / f"{side}.db")
        engines[side] = engine = write_engine(path)
        with engine.begin() as connection:
            workers.register(connection, host="h", pid=1, lock_path="", models=["m"], n_slots=1, now=datetime.now(UTC))
            for trigger in WITHOUT_INDEX if side == "without" else ():
                connection.execute(text(f"DROP TRIGGER {trigger}"))
    for number in range(n):
        for side, engine in engines.items():
            lightly = engine.execution_options(durable=False)
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
            spent.setdefault(("submit", side), []).append(1e6 * (submitted - started))
            spent.setdefault(("finish", side), []).append(1e6 * (time.process_time() - claimed_at))
    print("\n| processor time, µs (mean) | with the index | without | difference |\n|---|---|---|---|")
    for what in ("submit", "finish"):
        with_it, without = (statistics.mean(spent[what, side]) for side in engines)
        print(f"| {what} | {with_it:.0f} | {without:.0f} | {with_it - without:+.0f} ({with_it / without - 1:+.0%}) |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--writes", type=int, default=2000)
    options = parser.parse_args()
    words = some_words(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pages.db")
        started = time.perf_counter()
        build(path, options.conversations, options.turns, words)
        n_turns = options.conversations * options.turns
        print(
            f"{options.conversations:,} conversations, {2 * n_turns:,} messages, {path.stat().st_size / 2**20:.0f} MiB,"
        )
        print(f"written in {time.perf_counter() - started:.0f} s\n\n| ms | best | median |\n|---|---|---|")
        sidebar(path, options.rounds)
        asyncio.run(over_http(path, options.rounds, words[0], n_turns))
        writes(Path(folder), options.writes, words)


if __name__ == "__main__":
    main()
