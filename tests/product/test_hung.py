"""Processes that hang while others die or are asked to end, and terminals that close: nothing is left behind, and no
job pays for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import termios
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.product.conftest import (
    LLAMALITH,
    WITH_SHARED,
    Product,
    clean_environ,
    configure,
    free_port,
    is_alive,
    running,
    start,
)
from tests.product.test_product import STORY, gone, in_decode
from tests.settle import eventually

pytestmark = pytest.mark.slow


async def writing(product: Product) -> tuple[int, int]:
    """A long job that writes its reply; its id, and its engine's pid."""
    job_id = await in_decode(product)
    (engine,) = product.engine_pids()
    return job_id, engine


@WITH_SHARED
async def test_an_engine_that_hangs_dies_with_its_worker_and_its_job_runs_on_at_once(product: Product) -> None:
    job_id, engine = await writing(product)
    os.kill(engine, signal.SIGSTOP)
    os.kill(product.pid("worker"), signal.SIGKILL)
    await gone(engine)
    job = await product.ended(job_id)
    assert (job["status"], job["attempt"]) == ("done", 2)
    assert (await product.api.get("/readyz")).status_code == 200


@pytest.mark.parametrize("worker_hangs", [False, True])
async def test_what_a_killed_up_left_hanging_is_ended_by_the_next(tmp_path: Path, worker_hangs: bool) -> None:
    first = await start(tmp_path, grace_s=0)
    await first.until_ready()
    job_id, engine = await writing(first)
    worker = first.pid("worker")
    os.kill(engine, signal.SIGSTOP)
    if worker_hangs:
        os.kill(worker, signal.SIGSTOP)
    first.up.kill()
    # Not its `wait`, which waits for everybody who holds its output as well.
    await gone(first.up.pid)
    await first.api.aclose()
    async with running(tmp_path) as second:
        await gone(engine, worker)
        job = await second.ended(job_id)
    assert job["status"] == "done"


async def test_a_drain_ends_an_engine_that_hangs_and_spends_no_attempt(tmp_path: Path) -> None:
    product = await start(tmp_path, grace_s=0)
    await product.until_ready()
    job_id, engine = await writing(product)
    os.kill(engine, signal.SIGSTOP)
    assert await product.stop() == 0
    await product.api.aclose()
    assert not is_alive(engine)
    assert [outcome for outcome, _ in product.attempts(job_id)] == ["released"]


async def reader(fd: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    """What is written to the terminal; closing the transport closes the terminal."""
    shown = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(shown)
    reading, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    return shown, reading


def has_terminal(fd: int) -> Callable[[], object]:
    """What a child calls to get the terminal behind `fd` as its own: it is hung up on when that closes."""
    return lambda: fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


async def test_a_terminal_that_closes_again_and_again_spends_no_attempt_of_a_long_job(tmp_path: Path) -> None:
    configure(tmp_path, max_tokens=1500)
    port = free_port()
    job_id = 0
    for _ in range(3):
        ours, theirs = pty.openpty()
        up = await asyncio.create_subprocess_exec(
            *(str(LLAMALITH), "up", "--port", str(port), "--data-dir", "data", "--grace", "0"),
            cwd=tmp_path,
            env=clean_environ(LLAMALITH_CONFIG="config.json"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=has_terminal(theirs),
        )
        os.close(theirs)
        up.stdout, reading = await reader(ours)
        product = Product(tmp_path, port, up)
        try:
            await product.until_ready()
            job_id = job_id or await product.submit(STORY)
            await product.in_phase(job_id, "decode")
            parts = [product.pid(name) for name in ("web", "worker", "valkey")]
            parts += product.engine_pids()
            reading.close()
            assert await asyncio.wait_for(up.wait(), 60) == 0
            assert [pid for pid in parts if is_alive(pid)] == []
        finally:
            await product.api.aclose()
            with contextlib.suppress(ProcessLookupError):
                up.kill()
    assert [outcome for outcome, _ in product.attempts(job_id)] == ["released"] * 3


@WITH_SHARED
async def test_no_process_holds_a_descriptor_that_is_anothers_affair(product: Product) -> None:
    await in_decode(product)
    pids = {"up": product.up.pid} | {name: product.pid(name) for name in ("web", "worker", "valkey")}
    (pids["engine"],) = product.engine_pids()

    async def template() -> int | None:
        found = [int(pid) for task in Path(f"/proc/{pids['engine']}/task").iterdir() for pid in children(task)]
        return found[0] if found else None

    found = await eventually(template)
    assert found is not None
    pids["template"] = found
    holders: dict[str, set[str]] = defaultdict(set)
    for name, pid in pids.items():
        for target in descriptors(pid):
            holders[target].add(name)
    shared = {target: names for target, names in holders.items() if len(names) > 1}
    # Each part holds its own lock, the record is the web's and the worker's, and the pipe says whether `up` lives.
    assert {target: names for target, names in shared.items() if "data/run" in target} == {}
    assert set(map(frozenset, shared.values())) <= {frozenset({"web", "worker"}), frozenset({"up", "web", "worker"})}
    assert all("llamalith.db" in target or target.startswith("pipe:") for target, names in shared.items()), shared
    for name in ("web", "worker", "valkey"):
        assert holders[str(product.data_dir / "run" / f"{name}.pid")] == {name}


def children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def descriptors(pid: int) -> set[str]:
    """What the process has open beyond standard input, output and error; /dev/null and kernel objects left out."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if int(fd.name) > 2:
            target = str(fd.readlink())
            if target != "/dev/null" and not target.startswith("anon_inode"):
                found.add(target)
    return found
