"""The API beyond the recorded contract: what a caller may rely on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog
from redis.asyncio import Redis

from llamalith_app.app import Timings
from llamalith_app.contracts.jobs import Progress
from llamalith_app.settings.config import Config
from llamalith_app.store import workers
from llamalith_app.store.database import Database
from llamalith_app.store.jobs import transitions
from llamalith_app.store.record import record_id
from tests.live import publish
from tests.store.samples import finish, register_worker
from tests.web.conftest import TOKEN, serving

TEXTS = {
    "emoji": "🐉🏳️‍🌈👩‍👩‍👧‍👦",
    "right to left": "שלום עולם مرحبا \u202eabc\u202c",
    "combining marks": "e\u0301" + "\u0300" * 500 + "ẍ̈",
    "the last code point": "\U0010ffff\ufffe\ufffd",
    "controls that are not NUL": "a\tb\r\nc\x1b[31m\x7f",
    "markup": "<script>alert(1)</script>&amp;'\"",
    "SQL": "'; DROP TABLE jobs; --",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
async def test_text_comes_back_as_it_was_sent(api: httpx.AsyncClient, text: str) -> None:
    fields = {"content": text, "conversation_id": "c", "system_prompt": text, "assistant_context": text}
    job_id = (await api.post("/api/jobs", json=fields)).json()["job_id"]
    messages = (await api.get("/api/conversations/c/messages")).json()["messages"]
    assert [message["content"] for message in messages] == [text, text, text]
    assert (await api.get(f"/api/jobs/{job_id}")).json()["user_input"] == text


async def test_an_id_may_be_any_text_without_control_characters(api: httpx.AsyncClient) -> None:
    public_id = "späß/ ?&=%41#🐉"
    await api.post("/api/jobs", json={"content": "x", "conversation_id": public_id})
    (job,) = (await api.get("/api/jobs", params={"conversation_id": public_id})).json()["jobs"]
    assert job["conversation_id"] == public_id


async def test_a_prompt_of_a_million_characters_is_accepted(api: httpx.AsyncClient) -> None:
    text = "ü" * 1_000_000
    answer = await api.post("/api/jobs", json={"content": text, "conversation_id": "long"})
    assert answer.status_code == 200
    messages = (await api.get("/api/conversations/long/messages")).json()["messages"]
    assert messages[0]["content"] == text


async def test_lists_are_paged_by_the_last_id_seen(api: httpx.AsyncClient) -> None:
    for number in range(5):
        answer = await api.post("/api/jobs", json={"content": str(number), "conversation_id": f"c{number}"})
        assert answer.status_code == 200, answer.text
    seen: list[int] = []
    before: dict[str, int] = {}
    while page := (await api.get("/api/jobs", params={"limit": 2, **before})).json()["jobs"]:
        seen += [job["id"] for job in page]
        before = {"before": page[-1]["id"]}
    assert seen == [5, 4, 3, 2, 1]


async def test_a_page_of_very_long_texts_ends_early_and_the_next_page_continues(api: httpx.AsyncClient) -> None:
    for _ in range(25):
        await api.post("/api/jobs", json={"content": "x" * 1_000_000})
    pages: list[list[int]] = []
    before: dict[str, int] = {}
    while page := (await api.get("/api/jobs", params={"limit": 500, **before})).json()["jobs"]:
        pages.append([job["id"] for job in page])
        before = {"before": page[-1]["id"]}
    assert [len(page) for page in pages] == [10, 10, 5]
    assert list(itertools.chain(*pages)) == list(range(25, 0, -1))


async def test_empty_filters_filter_nothing(api: httpx.AsyncClient) -> None:
    await api.post("/api/jobs", json={"content": "x"})
    assert len((await api.get("/api/jobs?status=&conversation_id=")).json()["jobs"]) == 1


async def test_queued_jobs_show_their_position_in_the_queue_of_their_model(api: httpx.AsyncClient) -> None:
    for model in ("smollm2", "other", "smollm2", "other"):
        await api.post("/api/jobs", json={"content": "x", "model": model})
    listed = (await api.get("/api/jobs")).json()["jobs"]
    assert {job["id"]: job["progress"]["position"] for job in listed} == {1: 1, 2: 1, 3: 2, 4: 2}
    single = (await api.get("/api/jobs/4")).json()
    assert single["progress"] == {
        "phase": "queued",
        "position": 2,
        "waits_for": None,
        "prompt_tokens": None,
        "prompt_tokens_done": None,
        "completion_tokens": None,
        "tokens_per_s": None,
        "start_eta_s": None,
        "eta_s": None,
    }


async def claimed(database: Database) -> transitions.Claim:
    worker = await database.write(register_worker)
    claim = await database.write(transitions.claim, "smollm2", 1, worker, datetime.now(UTC))
    assert claim is not None
    return claim


async def test_running_jobs_show_the_progress_that_the_worker_publishes(
    api: httpx.AsyncClient, database: Database, redis_url: str
) -> None:
    await api.post("/api/jobs", json={"content": "x", "conversation_id": "c"})
    claim = await claimed(database)
    paths = ("/api/jobs/1", "/api/jobs", "/api/conversations/c/latest")

    async def shown() -> list[object]:
        one, listed, latest = [(await api.get(path)).json() for path in paths]
        return [one["progress"], listed["jobs"][0]["progress"], latest["last_job"]["progress"]]

    assert await shown() == [None, None, None]
    progress = Progress(phase="prefill", prompt_tokens=2000, prompt_tokens_done=512, tokens_per_s=300.5)
    async with Redis.from_url(redis_url) as redis:
        await publish(redis, record_id(database.path), 1, claim.attempt, progress)
        assert await shown() == [msgspec.to_builtins(progress)] * 3
        await redis.set(f"llamalith:progress:{record_id(database.path)}:1.1", b"not what we wrote")
        assert await shown() == [None, None, None]
        await publish(redis, record_id(database.path), 1, claim.attempt - 1, progress)
        assert await shown() == [None, None, None], "of an attempt that is over"
        await publish(redis, record_id(database.path), 1, claim.attempt, progress)
    await database.write(finish, claim)
    assert await shown() == [None, None, None], "of a job that has ended"


async def test_an_accepted_job_leaves_one_hint_that_holds_no_prompt(api: httpx.AsyncClient, redis_url: str) -> None:
    await api.post("/api/jobs", json={"content": "a secret prompt"})
    async with Redis.from_url(redis_url) as redis:
        hint: Any = await redis.blpop(["saq:llamalith:smollm2:queued"], timeout=5)
        stored: Any = await redis.get(hint[1])
    assert hint[1].endswith(b":j1.a1")
    assert json.loads(stored)["kwargs"] == {"job_id": 1}
    assert b"secret" not in stored


async def test_a_submit_does_not_wait_for_an_absent_redis(config: Config, absent_redis_url: str) -> None:
    async with serving(msgspec.structs.replace(config, redis_url=absent_redis_url)) as api:
        answers = [await api.post("/api/jobs", json={"content": "x"}) for _ in range(20)]
        listed = await api.get("/api/jobs")
    assert {answer.status_code for answer in answers} == {200}
    assert [job["id"] for job in listed.json()["jobs"]] == list(range(20, 0, -1))


async def test_a_submit_does_not_wait_for_a_frozen_redis(config: Config, tmp_path: Path) -> None:
    # So long that an answer that waited for its hint would come too late on any machine.
    timings = Timings(redis_timeout_s=60)
    path = tmp_path / "frozen.sock"
    with socket.socket(socket.AF_UNIX) as frozen:
        # The kernel takes connections for it; nobody ever reads.
        frozen.bind(str(path))
        frozen.listen()
        async with serving(msgspec.structs.replace(config, redis_url=f"unix://{path}"), timings) as api:
            await api.get("/healthz")
            async with asyncio.timeout(15):
                answer = await api.post("/api/jobs", json={"content": "x"})
    assert answer.status_code == 200


@pytest.mark.parametrize("given", ["abc-123_X.y", "a" * 128])
async def test_a_valid_request_id_goes_into_the_answer_the_log_and_the_job(
    api: httpx.AsyncClient, database_path: Path, given: str
) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        answer = await api.post("/api/jobs", json={"content": "x"}, headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["request_id"] == given
    assert (line["method"], line["route"], line["status"], line["principal"]) == (
        "POST",
        "/api/jobs",
        200,
        "token:1",
    )
    with sqlite3.connect(database_path) as connection:
        assert connection.execute("SELECT request_id FROM jobs").fetchall() == [(given,)]
    connection.close()


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", "é"])
async def test_any_other_request_id_is_replaced(api: httpx.AsyncClient, given: str) -> None:
    answer = await api.get("/healthz", headers=[(b"X-Request-ID", given.encode())])
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])


async def test_probes_are_open_and_readyz_names_what_is_missing(
    config: Config, absent_redis_url: str, database: Database
) -> None:
    async with serving(config) as api:
        del api.headers["Authorization"]
        assert (await api.get("/healthz")).json() == {"status": "ok"}
        assert (await api.head("/healthz")).status_code == 200
        no_worker = await api.get("/readyz")
    assert no_worker.status_code == 503
    assert no_worker.json() == {
        "ready": False,
        "database": "ok",
        "redis": "ok",
        "worker": "no worker is alive",
    }
    worker = await database.write(register_worker)
    await database.write(workers.heartbeat, worker, datetime.now(UTC))
    async with serving(config) as api:
        ready = await api.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    async with serving(msgspec.structs.replace(config, redis_url=absent_redis_url)) as api:
        no_redis = await api.get("/readyz")
    assert (no_redis.status_code, no_redis.json()["redis"], no_redis.json()["worker"]) == (
        503,
        "no answer",
        "ok",
    )


async def test_cors_allows_no_origin_unless_configured(api: httpx.AsyncClient) -> None:
    answer = await api.get("/healthz", headers={"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_cors_allows_configured_origins_and_no_others(config: Config) -> None:
    origins = ("http://n8n.example:5678",)
    async with serving(msgspec.structs.replace(config, cors_origins=origins)) as api:
        mine = await api.get("/api/jobs", headers={"Origin": origins[0]})
        other = await api.get("/api/jobs", headers={"Origin": "http://n8n.example"})
        preflight = await api.options(
            "/api/jobs",
            headers={
                "Origin": origins[0],
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
    assert mine.headers["access-control-allow-origin"] == origins[0]
    assert "access-control-allow-credentials" not in mine.headers
    assert "access-control-allow-origin" not in other.headers
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origins[0]


async def test_the_openapi_document_describes_every_route_and_shape(api: httpx.AsyncClient) -> None:
    document = (await api.get("/api/openapi.json")).json()
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {path for path, _ in operations} == {
        "/api/jobs",
        "/api/jobs/{job_id}",
        "/api/jobs/{job_id}/cancel",
        "/api/jobs/cancel",
        "/api/jobs/{job_id}/attempts",
        "/api/jobs/{job_id}/retry",
        "/api/jobs/{job_id}/answer-now",
        "/api/jobs/compare",
        "/api/jobs/retry",
        "/api/jobs/{job_id}/events",
        "/api/conversations",
        "/api/conversations/{conversation_id}",
        "/api/conversations/import",
        "/api/conversations/{conversation_id}/restore",
        "/api/conversations/{conversation_id}/export",
        "/api/conversations/{conversation_id}/events",
        "/api/conversations/{conversation_id}/reply",
        "/api/conversations/{conversation_id}/cancel",
        "/api/conversations/{conversation_id}/messages",
        "/api/conversations/{conversation_id}/latest",
        "/api/conversations/{conversation_id}/tree",
        "/api/conversations/{conversation_id}/head",
        "/api/conversations/{conversation_id}/fork",
        "/api/conversations/{conversation_id}/turns/{turn_id}",
        "/api/jobs/{job_id}/regenerate",
        "/api/models",
        "/api/models/{name}/load",
        "/api/models/{name}/unload",
        "/api/submit",
        "/api/status/{conversation_id}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/models/load",
        "/v1/models/unload",
        "/healthz",
        "/readyz",
    }
    for (path, method), operation in operations.items():
        assert operation["summary"], path
        media_type = "text/event-stream" if path.endswith("/events") else "application/json"
        done = operation["responses"].get("200") or operation["responses"]["202"]
        assert done["content"][media_type]["schema"], path
        refusals = {status for status in operation["responses"] if status >= "400"}
        if path.endswith("z"):
            continue
        assert {"401", "503"} <= refusals
        takes_unknown = path.endswith(("/reply", "/messages", "/latest")) or path.startswith("/api/status/")
        names_model = path.startswith("/v1/") and method == "post"
        assert ("404" in refusals) is (("{" in path and not takes_unknown) or names_model), path
        assert ("413" in refusals) is ("requestBody" in operation), path
        makes = path.endswith(
            ("/retry", "/reply", "/submit", "/regenerate", "/compare", "/completions", "/responses")
        ) or (
            path,
            method,
        ) == (
            "/api/jobs",
            "post",
        )
        assert ("429" in refusals) is makes, path
        is_exclusive = path.endswith(
            ("/fork", "/turns/{turn_id}", "/restore", "/import", "/load", "/unload", "/answer-now")
        )
        is_exclusive |= (path, method) in (("/api/jobs/{job_id}", "patch"), ("/api/conversations", "patch"))
        assert ("409" in refusals) is (makes or is_exclusive), path
        for status in refusals:
            is_openai = path.startswith("/v1/")
            media_type = "application/json" if is_openai or status == "401" else "application/problem+json"
            shown = operation["responses"][status]["content"][media_type]["schema"]
            assert shown == {"$ref": f"#/components/schemas/{'OpenAIErrorBody' if is_openai else 'Problem'}"}
    content = document["components"]["schemas"]["JobCreate"]["properties"]["content"]["anyOf"][0]
    assert content["maxLength"] == 1_000_000
    limit = next(
        parameter for parameter in operations["/api/jobs", "get"]["parameters"] if parameter["name"] == "limit"
    )
    assert (limit["schema"]["minimum"], limit["schema"]["maximum"]) == (1, 500)


@pytest.mark.slow
def test_importing_the_web_application_imports_neither_engine_nor_worker() -> None:
    code = (
        "import sys, llamalith_app.app;"
        "print([name for name in sys.modules if name.split('.')[0] == 'llama_cpp'"
        " or name.startswith(('llamalith_app.engine', 'llamalith_app.jobs.worker'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
async def test_a_2xx_is_preceded_by_an_fdatasync_of_its_write(config: Config, tmp_path: Path) -> None:
    """Seen from outside, by strace: request in, record on disk, answer out."""
    trace = tmp_path / "trace"
    async with serving(config) as api:
        await api.get("/healthz")
        tracer = await asyncio.create_subprocess_exec(
            *("strace", "-f", "-tt", "-s", "200", "-o", str(trace)),
            *("-e", "trace=fdatasync,fsync,recvfrom,recvmsg,read,sendto,sendmsg,write,writev"),
            *("-p", str(os.getpid())),
            stderr=asyncio.subprocess.PIPE,
        )
        assert tracer.stderr is not None
        while b"attached" not in await tracer.stderr.readline():
            pass
        answers = [await api.post("/api/jobs", json={"content": f"traced {n}"}) for n in range(5)]
        tracer.send_signal(signal.SIGINT)
        await tracer.communicate()
    assert {answer.status_code for answer in answers} == {200}
    waiting = None
    n_seen = 0
    for line in trace.read_text(errors="replace").splitlines():
        if "POST /api/jobs" in line and "HTTP/1.1 200" not in line and not re.search(r"(sendto|write)\w*\(", line):
            waiting = "sync"
        elif waiting == "sync" and re.search(r"f(data)?sync(\(| resumed)", line) and "= 0" in line:
            waiting = "answer"
        # At the beginning of what is sent: a log line may have these words too.
        elif re.search(r'(sendto|sendmsg|write|writev)\(.*?(\d, |iov_base=)"HTTP/1\.1 200 OK', line):
            assert waiting == "answer", "answered before it was on disk"
            waiting = None
            n_seen += 1
    assert n_seen == 5


CANARIES = {name: f"canary-{name}-7f3a" for name in ("prompt", "system", "context", "title", "cookie", "query")}


async def test_no_user_text_and_no_secret_is_logged(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with serving(config) as api:
            good = {
                "content": CANARIES["prompt"],
                "system_prompt": CANARIES["system"],
                "assistant_context": CANARIES["context"],
                "conversation_id": CANARIES["title"],
            }
            headers = {"Cookie": f"session={CANARIES['cookie']}"}
            for path, body in (
                ("/api/jobs", good),
                ("/api/jobs", {**good, "model": CANARIES["prompt"]}),
                ("/api/jobs", {**good, "grammar_name": CANARIES["prompt"]}),
                ("/api/jobs", [CANARIES["prompt"]]),
                (f"/api/conversations/{CANARIES['title']}/reply", good),
                ("/api/submit", {"user_input": CANARIES["prompt"], "session_id": CANARIES["title"]}),
            ):
                await api.post(path, json=body, headers=headers)
            await api.get(f"/api/jobs?conversation_id={CANARIES['query']}&limit={CANARIES['query']}")
            await api.get(f"/{CANARIES['query']}")
            await api.get("/api/jobs", headers={"Authorization": f"Bearer {CANARIES['cookie']}"})
    shown = repr(lines) + "".join(capfd.readouterr())
    assert len(lines) >= 9
    for canary in [*CANARIES.values(), TOKEN]:
        assert canary not in shown
