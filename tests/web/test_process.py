"""`llamalith web` as a process of its own."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx

from tests.product.conftest import LLAMALITH, clean_environ, free_port
from tests.settle import eventually
from tests.web.conftest import HASH, TOKEN


async def test_sigterm_ends_it_with_exit_code_0(tmp_path: Path, absent_redis_url: str) -> None:
    port = free_port()
    web = await asyncio.create_subprocess_exec(
        *(str(LLAMALITH), "web", "--port", str(port), "--data-dir", str(tmp_path)),
        cwd=tmp_path,
        env=clean_environ(
            SECRET_KEY="a secret key of the tests, of 32 bytes",
            ADMIN_PASSWORD_HASH=HASH,
            N8N_API_TOKEN=TOKEN,
            REDIS_URL=absent_redis_url,
        ),
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        async def answers() -> bool:
            assert web.returncode is None
            try:
                return (await client.get("/healthz")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(answers)
    web.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(web.wait(), 20) == 0
