"""The embedded Valkey, with the real server."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from redis.asyncio import Redis

from llamalith_app.errors import ConfigError
from llamalith_app.supervise import parent, valkey


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    socket = folder / "valkey.sock"
    valkey.make_folders(folder=folder, socket=socket)
    process = await asyncio.create_subprocess_exec(
        *valkey.argv(valkey.find_binary(), folder=folder, socket=socket),
        start_new_session=True,
        preexec_fn=parent.preexec_die_with_parent(),
    )
    try:
        async with asyncio.timeout(20):
            while not await valkey.answers(socket):
                assert process.returncode is None, (folder / "valkey.log").read_text()
                await asyncio.sleep(0.01)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def client(folder: Path) -> Redis:
    return Redis.from_url(f"unix://{quote(str(folder / 'valkey.sock'))}?db=0")


async def test_it_keeps_its_data_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "a folder with spaces"
    async with server(folder) as process, client(folder) as redis:
        await redis.set("hint", "kept")
        # The fsync every second matters for power cuts only: a killed server's writes are in the kernel.
        process.kill()
        await process.wait()
    assert not await valkey.answers(folder / "valkey.sock")
    async with server(folder), client(folder) as redis:
        assert await redis.get("hint") == b"kept"


async def test_it_listens_on_a_socket_for_this_user_only(tmp_path: Path) -> None:
    async with server(tmp_path / "valkey"), client(tmp_path / "valkey") as redis:
        assert await redis.config_get("port") == {"port": "0"}
        assert await redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert stat.S_IMODE((tmp_path / "valkey" / "valkey.sock").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "valkey").stat().st_mode) == 0o700


async def test_a_socket_without_a_server_does_not_answer(tmp_path: Path) -> None:
    assert not await valkey.answers(tmp_path / "valkey.sock")
    (tmp_path / "valkey.sock").touch()
    assert not await valkey.answers(tmp_path / "valkey.sock")


async def test_a_frozen_server_does_not_answer(tmp_path: Path) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silence, tmp_path / "valkey.sock"):
        assert not await valkey.answers(tmp_path / "valkey.sock")


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    # In a shared folder such as /tmp the link could be another user's.
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="must be a folder of this user"):
        valkey.make_folders(folder=tmp_path / "ours", socket=tmp_path / "ours" / "valkey.sock")


def test_the_wheel_contains_the_binary() -> None:
    assert os.access(valkey.find_binary(), os.X_OK)


def test_a_chosen_binary_that_cannot_run_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-server: no Valkey or Redis server"):
        valkey.find_binary(tmp_path / "no-such-server")
