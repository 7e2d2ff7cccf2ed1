"""What a person sees of the product: it starts, answers, outlives the death of each of its parts, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.product.conftest import LLAMALITH, WITH_SHARED, Product, clean_environ, free_port, is_alive, running, start
from tests.settle import eventually

pytestmark = pytest.mark.slow

STORY = "Write a very long story about a dragon, with every detail of its life."
FOX = " The quick brown fox jumps over the lazy dog near the river."
"""14 tokens."""


async def in_prefill(product: Product) -> int:
    """A job whose prompt is read for a second or more: nothing that was read before begins like it."""
    job_id = await product.submit(f"{uuid4()}{FOX * 30}", parameters={"max_tokens": 1})
    await product.in_phase(job_id, "prefill")
    return job_id


async def in_decode(product: Product) -> int:
    job_id = await product.submit(STORY)
    await product.in_phase(job_id, "decode")
    return job_id


IN_PHASE = pytest.mark.parametrize("begin", [in_prefill, in_decode])
Begin = Callable[[Product], Awaitable[int]]


async def gone(*pids: int) -> None:
    async def look() -> bool:
        return not any(map(is_alive, pids))

    await eventually(look)


async def restarted(product: Product, part: str, old: int) -> int:
    async def look() -> int | None:
        new = product.try_pid(part)
        return new if new not in (None, old) and is_alive(new) else None

    new = await eventually(look)
    assert new is not None
    return new


@WITH_SHARED
async def test_a_prompt_gets_a_real_answer_and_the_next_one_builds_on_it(product: Product) -> None:
    to = {"conversation_id": "two turns"}
    first = await product.ended(await product.submit("Say hello.", system_prompt="You are kind.", **to))
    second = await product.ended(await product.submit("Say it again.", **to))
    assert [first["status"], second["status"]] == ["done", "done"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["completion_tokens"]
    messages = (await product.api.get("/api/conversations/two turns/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]


@WITH_SHARED
async def test_three_prompts_at_once_are_answered_in_turn_order(product: Product) -> None:
    ids = [await product.submit(f"Say {word}.", conversation_id="at once") for word in ("one", "two", "three")]
    for job_id in ids:
        assert (await product.ended(job_id))["status"] == "done"
    messages = (await product.api.get("/api/conversations/at once/messages")).json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert [message["content"] for message in messages[::2]] == ["Say one.", "Say two.", "Say three."]


@WITH_SHARED
async def test_a_named_grammar_is_enforced_while_decoding(product: Product) -> None:
    job = await product.ended(
        await product.submit("Describe a dragon as JSON with the keys name and colour.", grammar_name="json")
    )
    assert job["status"] == "done"
    assert job["result"].startswith("{")
    # The grammar allows blanks at the end.
    assert job["finish_reason"] == "length" or job["result"].rstrip().endswith("}")


@WITH_SHARED
async def test_a_long_prompt_shows_rising_counts_to_a_client_that_polls(product: Product) -> None:
    job_id = await product.submit(f"{uuid4()}{FOX * 55}", parameters={"max_tokens": 1})
    seen: list[int] = []
    while (job := await product.job(job_id))["status"] not in ("done", "error"):
        progress = job["progress"] or {}
        if progress.get("phase") == "prefill":
            seen.append(progress["prompt_tokens_done"])
            assert progress["prompt_tokens"] > 700
        await asyncio.sleep(0.05)
    assert seen == sorted(seen)
    assert len(set(seen)) >= 5, seen


@WITH_SHARED
async def test_a_prompt_that_does_not_fit_is_reported_in_tokens(product: Product) -> None:
    job = await product.ended(await product.submit("word " * 10_000))
    assert job["status"] == "error"
    assert job["error"]["kind"] == "context_overflow"
    assert re.search(r"has \d{5} tokens; 874 fit \(context of 1024 tokens, 150 kept", job["result"])


@WITH_SHARED
async def test_turns_that_do_not_fit_are_left_out_and_counted(product: Product) -> None:
    # Imported, so that the model reads only what is not left out. 874 tokens fit; the second turn alone has more.
    prompts = [FOX * 40, FOX * 65, "Say goodbye."]
    turns = [
        {
            "id": number,
            "parent": number - 1 if number else None,
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Well."}],
        }
        for number, prompt in enumerate(prompts)
    ]
    made = await product.api.post(
        "/api/conversations/import", json={"format": "llamalith-conversation-1", "turns": turns}
    )
    full = made.json()["conversation_id"]
    job = await product.ended(await product.submit("Say hello.", conversation_id=full))
    assert job["status"] == "done"
    assert job["omitted_messages"] == 4
    # The third turn is still there.
    alone = await product.ended(await product.submit("Say hello."))
    assert alone["prompt_tokens"] < job["prompt_tokens"] < 874


@WITH_SHARED
@IN_PHASE
async def test_a_killed_engine_costs_a_job_less_than_two_seconds(product: Product, begin: Begin) -> None:
    job_id = await begin(product)
    (engine,) = product.engine_pids()
    os.kill(engine, signal.SIGKILL)
    job = await product.ended(job_id)
    assert (job["status"], job["attempt"]) == ("done", 2)
    (first, second) = product.attempts(job_id)
    assert (first[0], second[0]) == ("failed", "done")
    assert first[1] < 2


@WITH_SHARED
@IN_PHASE
async def test_a_killed_worker_is_started_again_and_its_job_with_it(product: Product, begin: Begin) -> None:
    job_id = await begin(product)
    worker, (engine,) = product.pid("worker"), product.engine_pids()
    os.kill(worker, signal.SIGKILL)
    await gone(worker, engine)
    job = await product.ended(job_id)
    assert (job["status"], job["attempt"]) == ("done", 2)
    assert [outcome for outcome, _ in product.attempts(job_id)] == ["lost", "done"]
    (taken,) = [
        line
        for line in map(json.loads, product.log().splitlines())
        if line["event"] == "lease taken away" and line["job_id"] == job_id
    ]
    # Not when its heartbeat had stood still for long enough, which is 9 seconds.
    assert re.fullmatch(r"worker \d+ ended", taken["why"])


@WITH_SHARED
async def test_a_killed_valkey_costs_nothing_and_is_started_again(product: Product) -> None:
    running_job = await in_decode(product)
    old = product.pid("valkey")
    os.kill(old, signal.SIGKILL)
    during = await product.submit("Say hello.")
    await restarted(product, "valkey", old)
    after = await product.submit("Say hello.")
    for job_id in (running_job, during, after):
        job = await product.ended(job_id)
        assert (job["status"], job["attempt"]) == ("done", 1)


@WITH_SHARED
async def test_a_killed_web_process_is_started_again_with_all_that_it_accepted(product: Product) -> None:
    ids = [await product.submit("Say hello.") for _ in range(3)]
    old = product.pid("web")
    os.kill(old, signal.SIGKILL)
    await restarted(product, "web", old)

    async def answers() -> bool:
        try:
            return (await product.api.get("/healthz")).status_code == 200
        except httpx.TransportError:
            return False

    await eventually(answers)
    for job_id in ids:
        assert (await product.ended(job_id))["status"] == "done"


async def test_a_drain_ends_everything_and_gives_long_jobs_back(tmp_path: Path) -> None:
    async with running(tmp_path) as product:
        job_id = await product.submit(STORY)
        await product.in_phase(job_id, "loading", "prefill", "decode")
        pids = [product.pid(part) for part in ("web", "worker", "valkey")] + product.engine_pids()
        assert await product.stop() == 0
        assert not any(map(is_alive, pids))
        connection = sqlite3.connect(product.data_dir / "llamalith.db")
        statuses = connection.execute("SELECT status, attempt FROM jobs").fetchall()
        workers = connection.execute("SELECT count(*) FROM workers WHERE ended_at IS NULL").fetchone()
        connection.close()
    assert statuses == [("done", 1)]
    assert workers == (0,)


async def test_ctrl_c_twice_ends_everything_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as product:
        await in_decode(product)
        pids = [product.pid(part) for part in ("web", "worker", "valkey")] + product.engine_pids()
        product.up.send_signal(signal.SIGINT)

        async def stopping() -> bool:
            return "stopping" in product.log()

        await eventually(stopping)
        product.up.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(product.up.wait(), 10) == 130
        await gone(*pids)


async def test_after_kill_9_of_up_nothing_is_left_and_the_next_start_goes_on(tmp_path: Path) -> None:
    product = await start(tmp_path)
    await product.until_ready()
    job_id = await in_decode(product)
    pids = [product.pid(part) for part in ("web", "worker", "valkey")]
    product.up.kill()
    await product.up.wait()
    await product.api.aclose()
    async with running(tmp_path) as again:
        assert not any(map(is_alive, pids))
        assert (await again.ended(job_id))["status"] == "done"


@WITH_SHARED
async def test_a_second_up_on_the_same_data_is_refused_by_name(product: Product) -> None:
    second = await start(product.folder)
    assert await asyncio.wait_for(second.up.wait(), 20) == 2
    assert f"another llamalith up (pid {product.up.pid})" in product.log()
    await second.api.aclose()


async def test_secrets_are_made_once_shown_once_and_kept_private(tmp_path: Path) -> None:
    product = await start(tmp_path)
    lines = await product.until_ready()
    await product.stop()
    # One block, and nothing behind the ready line: a person looks for all four at the end.
    assert [line.split()[:2] for line in lines[-4:]] == [
        *(["llamalith:", "wrote"], ["llamalith:", "admin"], ["llamalith:", "API"], ["llamalith:", "ready"])
    ]
    assert lines[-1] == f"llamalith: ready http://127.0.0.1:{product.port}/chat"
    shown = "\n".join(lines)
    env = tmp_path / "data" / ".env"
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    token = product.api.headers["Authorization"].removeprefix("Bearer ")
    assert token in shown
    assert re.search(r"admin password +\S{16}", shown)
    assert token not in product.log()
    again = await start(tmp_path, product.port)
    assert await again.until_ready() == lines[-1:]
    await again.stop()
    for one in (product, again):
        await one.api.aclose()


async def test_a_port_that_is_taken_is_reported_in_one_line(tmp_path: Path) -> None:
    port = free_port()
    stranger = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    product = await start(tmp_path, port)
    assert await asyncio.wait_for(product.up.wait(), 20) == 2
    assert f"cannot listen on 127.0.0.1:{port}: another program listens there" in product.log()
    assert product.up.stdout is not None
    # Nobody could read the password later: the .env that was written holds its hash.
    assert b"admin password" in await product.up.stdout.read()
    stranger.close()
    await product.api.aclose()


async def test_two_slots_run_two_conversations_side_by_side_on_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"worker_settings": {"worker_count": 2}, "model_settings": {"smollm2": {"max_tokens": 150}}}'
    )
    async with running(tmp_path) as product:
        ids = [await product.submit(STORY) for _ in range(2)]
        jobs = [await product.ended(job_id) for job_id in ids]
    assert [job["status"] for job in jobs] == ["done", "done"]
    assert jobs[1]["started_at"] < jobs[0]["processed_at"]


@pytest.mark.parametrize("command", ["web", "worker"])
@pytest.mark.parametrize("missing", ["N8N_API_TOKEN", "SECRET_KEY", "ADMIN_PASSWORD_HASH"])
def test_web_and_worker_refuse_to_start_without_a_secret(tmp_path: Path, command: str, missing: str) -> None:
    secrets = {
        "N8N_API_TOKEN": "a-token-of-the-tests",
        "SECRET_KEY": "a secret key of the tests, of 32 bytes",
        "ADMIN_PASSWORD_HASH": "$2b$12$" + "a" * 53,
    }
    del secrets[missing]
    done = subprocess.run(
        [LLAMALITH, command, "--data-dir", tmp_path / "d"],
        cwd=tmp_path,
        env=clean_environ(**secrets),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{missing}: missing")


def test_a_shell_that_exports_one_secret_is_shown_why_none_were_made(tmp_path: Path) -> None:
    done = subprocess.run(
        [LLAMALITH, "up", "--data-dir", tmp_path / "d"],
        cwd=tmp_path,
        env=clean_environ(N8N_API_TOKEN="a-token-of-the-tests"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("N8N_API_TOKEN: is set in the environment, so no .env was")
