"""`llamalith web` as a real process."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.needs import need
from tests.product.conftest import LLAMALITH, clean_environ, free_port
from tests.settle import eventually
from tests.streams.sse import reading
from tests.web.conftest import HASH, TOKEN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def web(
    folder: Path, redis_url: str, *under: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """A running web that answers. `under`: a command that executes it, such as strace."""
    port = free_port()
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(*under, str(LLAMALITH), "web", "--port", str(port), "--data-dir", str(folder)),
            cwd=folder,
            env=clean_environ(
                SECRET_KEY="a secret key of the tests, of 32 bytes",
                ADMIN_PASSWORD_HASH=HASH,
                N8N_API_TOKEN=TOKEN,
                REDIS_URL=redis_url,
            ),
            stderr=log,
        )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:

            async def answers() -> bool:
                assert process.returncode is None
                try:
                    return (await client.get("/healthz")).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(answers)
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_stops_it_with_exit_code_0(tmp_path: Path, absent_redis_url: str) -> None:
    async with web(tmp_path, absent_redis_url) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_open_streams_end_with_a_reconnect_and_do_not_delay_a_stop(tmp_path: Path, absent_redis_url: str) -> None:
    async with web(tmp_path, absent_redis_url) as (process, client):
        await client.post("/api/jobs", json={"content": "x", "conversation_id": "c"})
        async with AsyncExitStack() as open_streams:
            readers = [
                await open_streams.enter_async_context(reading(client, path))
                for path in ("/api/jobs/1/events", "/api/conversations/c/events")
                for _ in range(25)
            ]
            streams = [(reader, reader.events()) for reader in readers]
            for _, source in streams:
                assert (await anext(source)).kind == "progress"
            process.send_signal(signal.SIGTERM)
            for reader, source in streams:
                assert [event async for event in source] == []
                assert reader.comments == [": the server ends; come again"]
                assert reader.retry == "1000"
            assert await asyncio.wait_for(process.wait(), 20) == 0
    log = (tmp_path / "log").read_text()
    assert "graceful shutdown exceeded" not in log
    assert "Traceback" not in log


async def test_an_answer_takes_one_system_call_and_a_long_one_arrives_whole(
    tmp_path: Path, absent_redis_url: str
) -> None:
    strace, seen = need("strace", "strace"), tmp_path / "writes"
    prompt = "word" * 50_000
    async with web(tmp_path, absent_redis_url) as (process, client):
        await client.post("/api/jobs", json={"content": prompt})
        watching = await asyncio.create_subprocess_exec(
            *(strace, "-f", "-p", str(process.pid), "-e", "trace=write,writev,sendto,sendmsg", "-o", str(seen)),
            stderr=asyncio.subprocess.PIPE,
        )
        assert watching.stderr is not None
        assert b"attached" in await watching.stderr.readline()
        reading_on = asyncio.create_task(watching.stderr.read())
        answer = await client.get("/healthz")

        async def is_traced() -> bool:
            # strace may write its line only after the answer has arrived.
            return re.search(r'"HTTP/1\.1 200.* = \d+$', seen.read_text(), re.MULTILINE) is not None

        await eventually(is_traced)
        watching.terminate()
        await asyncio.gather(watching.wait(), reading_on)
        long_one = await client.get("/api/jobs/1")
    assert answer.status_code == 200
    head = [line for line in seen.read_text().splitlines() if "HTTP/1.1 200" in line]
    assert len(head) == 1
    headers = b"".join(b"%b: %b\r\n" % header for header in answer.headers.raw)
    whole = b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + answer.content
    assert int(head[0].rsplit("= ", 1)[1]) == len(whole)
    assert long_one.json()["user_input"] == prompt


async def test_a_client_that_closes_its_side_after_the_request_still_gets_the_answer(
    tmp_path: Path, absent_redis_url: str
) -> None:
    async with web(tmp_path, absent_redis_url) as (_, client):
        for _ in range(20):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            writer.write_eof()
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()


async def test_a_disk_that_fails_to_sync_is_503_and_the_refused_job_is_not_stored(
    tmp_path: Path, absent_redis_url: str
) -> None:
    strace = need("strace", "strace")
    async with web(tmp_path, absent_redis_url) as (process, client):
        assert (await client.post("/api/jobs", json={"content": "before"})).status_code == 200
        breaker = await asyncio.create_subprocess_exec(
            *(strace, "-f", "-p", str(process.pid), "-e", "inject=fdatasync,fsync:error=EIO"),
            stderr=asyncio.subprocess.PIPE,
        )
        assert breaker.stderr is not None
        assert b"attached" in await breaker.stderr.readline()
        reading_on = asyncio.create_task(breaker.stderr.read())
        refused = await client.post("/api/jobs", json={"content": "meanwhile"}, timeout=30)
        breaker.terminate()
        await asyncio.gather(breaker.wait(), reading_on)
        after = await client.post("/api/jobs", json={"content": "after"}, timeout=30)
        listed = (await client.get("/api/jobs")).json()["jobs"]
    assert refused.status_code == 503, refused.text
    assert int(refused.headers["Retry-After"]) > 0
    assert after.status_code == 200, after.text
    assert [job["user_input"] for job in listed] == ["after", "before"]
    checking = await asyncio.create_subprocess_exec(
        *(str(LLAMALITH), "check", "--data-dir", str(tmp_path)), env=clean_environ(), stdout=asyncio.subprocess.DEVNULL
    )
    assert await checking.wait() == 0


async def test_a_crowd_that_uses_up_all_descriptors_does_no_lasting_harm(tmp_path: Path, absent_redis_url: str) -> None:
    prlimit = need("prlimit", "util-linux")
    async with web(tmp_path, absent_redis_url, prlimit, "--nofile=64") as (process, client):
        assert (await client.post("/api/jobs", json={"content": "before"})).status_code == 200
        host, port = client.base_url.host, client.base_url.port
        crowd = [await asyncio.open_connection(host, port) for _ in range(100)]

        async def all_are_taken() -> bool:
            return len(list(Path(f"/proc/{process.pid}/fd").iterdir())) >= 60

        await eventually(all_are_taken)
        for _, writer in crowd:
            writer.close()

        async def takes_work() -> bool:
            try:
                return (await client.post("/api/jobs", json={"content": "after"})).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(takes_work)


async def test_more_connections_than_the_soft_limit_of_descriptors_are_served(
    tmp_path: Path, absent_redis_url: str
) -> None:
    prlimit = need("prlimit", "util-linux")
    async with web(tmp_path, absent_redis_url, prlimit, "--nofile=64:1024") as (process, client):
        host, port = client.base_url.host, client.base_url.port
        crowd = [await asyncio.open_connection(host, port) for _ in range(100)]
        for _, writer in crowd:
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n")

        async def all_are_taken() -> bool:
            return len(list(Path(f"/proc/{process.pid}/fd").iterdir())) > 100

        await eventually(all_are_taken)
        assert (await client.post("/api/jobs", json={"content": "meanwhile"})).status_code == 200
        for _, writer in crowd:
            writer.close()


async def test_the_tls_part_of_the_shipped_nginx_conf_works_once_uncommented(tmp_path: Path) -> None:
    program, openssl = need("nginx", "nginx-light"), need("openssl", "openssl")
    key, certificate, (http, https) = tmp_path / "key.pem", tmp_path / "cert.pem", (free_port(), free_port())
    making = await asyncio.create_subprocess_exec(
        *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"),
        *("-subj", "/CN=llamalith.example.org", "-keyout", str(key), "-out", str(certificate)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await making.wait() == 0
    ours = (ROOT / "deploy" / "nginx.conf").read_text().replace("    listen 80;\n    listen [::]:80;\n", "")
    head, upstream, body = ours.partition("upstream ")
    body = re.sub(r"^( *)# (?=listen|server|ssl_|add_header|    |return|\})", r"\1", body, flags=re.MULTILINE)
    ours = head + upstream + body
    # A machine of the tests may have no IPv6.
    ours = re.sub(r"^ *listen \[::\].*\n", "", ours, flags=re.MULTILINE)
    for there, here in (
        ("listen 443 ssl;", f"listen 127.0.0.1:{https} ssl;"),
        ("listen 80;", f"listen 127.0.0.1:{http};"),
        ("/etc/ssl/certs/llamalith.example.org.pem", str(certificate)),
        ("/etc/ssl/private/llamalith.example.org.key", str(key)),
        ("127.0.0.1:8000", f"127.0.0.1:{free_port()}"),
    ):
        assert ours.count(there) == 1, there
        ours = ours.replace(there, here)
    (tmp_path / "ours.conf").write_text(ours)
    log, main = tmp_path / "nginx.log", tmp_path / "nginx.conf"
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main.write_text(
        f"pid {tmp_path}/pid;\nerror_log {log};\ndaemon off;\nuser root;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}include {tmp_path}/ours.conf;\n}}\n"
    )
    process = await asyncio.create_subprocess_exec(program, "-e", str(log), "-c", str(main))
    try:
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:

            async def answers() -> httpx.Response | None:
                assert process.returncode is None, log.read_text()
                try:
                    return await client.get(f"https://127.0.0.1:{https}/chat")
                except httpx.TransportError:
                    return None

            answer = await eventually(answers)
            plain = await client.get(f"http://127.0.0.1:{http}/chat/?a=b")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
    assert answer is not None
    assert (answer.status_code, answer.headers["strict-transport-security"]) == (301, "max-age=31536000")
    assert (plain.status_code, plain.headers["location"]) == (308, "https://llamalith.example.org/chat/?a=b")
    assert "strict-transport-security" not in plain.headers
