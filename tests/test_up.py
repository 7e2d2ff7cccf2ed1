"""Supervision, with real processes, real signals and real locks."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llamalith_app.errors import ConfigError
from llamalith_app.settings.config import Config
from llamalith_app.supervise import pidfile, up
from tests.settle import eventually

pytestmark = pytest.mark.slow

SUPERVISED = Path(__file__).with_name("supervised.py")
PATIENCE_S = 20.0


class Supervised:
    """A supervisor in a process of its own, and what its processes report."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdout, self._stderr = process.stdout, process.stderr
        self.reported: list[str] = []

    def signal(self, number: int) -> None:
        # Not through asyncio's process object: it could reap the child before its watcher does.
        if is_alive(self.pid):
            os.kill(self.pid, number)

    async def dies(self) -> None:
        """Kills the supervisor alone; waits for its death, not for the end of the output, which its processes hold."""
        self.signal(signal.SIGKILL)
        while is_alive(self.pid):
            await asyncio.sleep(0.005)

    async def reports(self, name: str, word: str) -> int:
        """Waits until the process reports the word; returns its pid."""
        while True:
            reporter, pid = await self._next(word)
            if reporter == name:
                return pid

    async def started(self, *names: str) -> dict[str, int]:
        """Waits until each of the processes has started; returns their pids."""
        pids: dict[str, int] = {}
        while set(pids) < set(names):
            name, pid = await self._next("started")
            pids[name] = pid
        return pids

    async def all_gone(self) -> list[str]:
        """Waits until no process is left that could report anything; returns all reports."""
        async with asyncio.timeout(PATIENCE_S):
            for line in (await self._stdout.read()).decode().splitlines():
                self.reported.append(" ".join(line.split()[:2]))
        return self.reported

    async def _next(self, word: str) -> tuple[str, int]:
        async with asyncio.timeout(PATIENCE_S):
            while line := (await self._stdout.readline()).decode().split():
                self.reported.append(" ".join(line[:2]))
                if line[1] == word:
                    return line[0], int(line[2])
        raise AssertionError(f"nobody reports {word}; reported: {self.reported}; log: {await self.log()}")

    async def log(self) -> str:
        async with asyncio.timeout(PATIENCE_S):
            return (await self._stderr.read()).decode()


@asynccontextmanager
async def supervised(
    run_dir: Path, *pairs: str, grace_s: float = 10.0, prefix: tuple[str, ...] = ()
) -> AsyncIterator[Supervised]:
    process = await asyncio.create_subprocess_exec(
        *(*prefix, sys.executable),
        *(str(SUPERVISED), str(run_dir), str(grace_s), *pairs),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    running = Supervised(process)
    try:
        yield running
    finally:
        # A second signal kills every process, also if a test failed half way.
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGTERM)
        await process.communicate()


async def written(path: Path, pid: int) -> None:
    """Waits until the pid is in its file: a process may report before its supervisor has written it."""

    async def is_written() -> bool:
        return pidfile.read_pid(path) == pid

    await eventually(is_written)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_process_is_restarted_at_once(tmp_path: Path) -> None:
    async with supervised(tmp_path, "web=drains", "worker=drains") as running:
        killed = (await running.started("web", "worker"))["web"]
        await written(tmp_path / "web.pid", killed)
        os.kill(killed, signal.SIGKILL)
        assert await running.reports("web", "started") != killed
        running.signal(signal.SIGTERM)
        assert "worker refused" not in await running.all_gone()
        assert '"reason":"signal 9","in_s":0.0' in await running.log()


@pytest.mark.parametrize(
    ("n_short_runs", "seconds"), [(1, 0), (2, 0), (3, 0), (4, 0.5), (5, 1), (6, 2), (7, 4), (8, 8), (9, 10), (99, 10)]
)
def test_the_restart_backoff_grows_to_ten_seconds(n_short_runs: int, seconds: float) -> None:
    assert up.restart_backoff_s(n_short_runs) == seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_drains_web_and_worker_then_stops_the_others_and_exits_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with supervised(tmp_path, "queue=tool", "web=drains", "worker=drains") as running:
        await running.started("queue", "web", "worker")
        running.signal(number)
        reported = await running.all_gone()
        assert await running.process.wait() == 0
    assert sorted(reported[3:5]) == ["web terminated", "worker terminated"]
    assert reported[5:] == ["queue terminated"]
    assert list(tmp_path.glob("*.pid")) == []


async def test_a_process_that_does_not_drain_in_time_is_killed(tmp_path: Path) -> None:
    async with supervised(tmp_path, "worker=stubborn", grace_s=0.1) as running:
        pid = await running.reports("worker", "started")
        running.signal(signal.SIGTERM)
        assert (await running.all_gone())[-1] == "worker terminated"
        assert await running.process.wait() == 0
        assert not is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_kills_everything_at_once(tmp_path: Path, number: signal.Signals) -> None:
    async with supervised(tmp_path, "worker=stubborn", "queue=tool", grace_s=600) as running:
        await running.started("worker", "queue")
        running.signal(number)
        await running.reports("worker", "terminated")
        running.signal(number)
        assert "queue terminated" not in await running.all_gone()
        assert await running.process.wait() == 128 + number


async def test_a_hangup_beside_other_signals_does_not_count_as_a_second_one(tmp_path: Path) -> None:
    async with supervised(tmp_path, "worker=stubborn", grace_s=0.1) as running:
        await running.started("worker")
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            running.signal(number)
        await running.all_gone()
        assert await running.process.wait() == 0


async def test_a_hangup_does_nothing_under_nohup(tmp_path: Path) -> None:
    async with supervised(tmp_path, "worker=drains", prefix=("nohup",)) as running:
        killed = await running.reports("worker", "started")
        running.signal(signal.SIGHUP)
        os.kill(killed, signal.SIGKILL)
        # It restarts its processes as before.
        assert await running.reports("worker", "started") != killed
        running.signal(signal.SIGTERM)
        await running.all_gone()
        assert await running.process.wait() == 0


async def test_a_stopped_process_drains_all_the_same(tmp_path: Path) -> None:
    async with supervised(tmp_path, "worker=drains", grace_s=600) as running:
        os.kill(await running.reports("worker", "started"), signal.SIGSTOP)
        running.signal(signal.SIGTERM)
        assert "worker terminated" in await running.all_gone()


async def test_nothing_is_left_running_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    pairs = ("web=drains", "worker=drains", f"valkey={tmp_path / 'its data'}")
    async with supervised(tmp_path, *pairs) as running:
        await running.started("web", "worker")
        await running.dies()
        # Valkey holds the output too, so the end of the output is also Valkey's end.
        assert {"web orphaned", "worker orphaned"} <= set(await running.all_gone())


async def test_processes_that_a_dead_supervisor_left_running_are_stopped_and_replaced(tmp_path: Path) -> None:
    async with supervised(tmp_path, "worker=clings") as first:
        left = await first.reports("worker", "started")
        await written(tmp_path / "worker.pid", left)
        await first.dies()
        async with supervised(tmp_path, "worker=clings") as second:
            assert await second.reports("worker", "started") != left
            assert (await first.all_gone())[-1] == "worker terminated"
            second.signal(signal.SIGTERM)
            assert "stopped a process that an earlier start left running" in await second.log()


async def test_a_stale_pid_file_does_not_kill_a_stranger(tmp_path: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    try:
        (tmp_path / "worker.pid").write_text(f"{stranger.pid}\n")
        async with supervised(tmp_path, "worker=drains") as running:
            pid = await running.reports("worker", "started")
            await written(tmp_path / "worker.pid", pid)
            assert stranger.returncode is None
            assert is_alive(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_process_that_refuses_its_configuration_at_its_first_run_ends_all_with_exit_code_2(
    tmp_path: Path,
) -> None:
    async with supervised(tmp_path, "web=refuses", "worker=drains") as running:
        await running.all_gone()
        assert await running.process.wait() == 2


async def test_a_process_that_has_run_is_restarted_whatever_its_exit_code(tmp_path: Path) -> None:
    async with supervised(tmp_path, "web=wavers") as running:
        os.kill(await running.reports("web", "started"), signal.SIGKILL)
        await running.reports("web", "refused")
        await running.reports("web", "refused")
        running.signal(signal.SIGTERM)
        await running.all_gone()
        assert await running.process.wait() == 0


async def test_a_second_start_on_a_data_directory_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = pidfile.try_lock(tmp_path / "run" / "up.lock")
    assert lock is not None
    try:
        pidfile.write_pid(lock, 4711)
        with pytest.raises(ConfigError, match=r"pid 4711\) runs on "):
            await up.run(Config(data_dir=tmp_path), host="127.0.0.1", port=1, grace_s=1, on_ready=print)
    finally:
        os.close(lock)


def test_a_port_that_another_program_listens_on_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: another program listens there"):
            up.check_port("127.0.0.1", port)
    up.check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000: Cannot assign"):
        up.check_port("192.0.2.1", 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(("status", "ready"), [("200 OK", True), ("503 Service Unavailable", False)])
async def test_ready_is_what_readyz_answers(status: str, ready: bool, host: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        assert asked.startswith(b"GET /readyz HTTP/1.1\r\nHost: %b\r\n" % up.in_url(host).encode())
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, host, 0) as server:
        assert await up.is_ready(*server.sockets[0].getsockname()[:2]) is ready


async def test_a_condition_that_stays_false_is_polled_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    async def back_after_100() -> bool:
        return len(pauses) == 100

    monkeypatch.setattr(asyncio, "sleep", note)
    await up.wait_until(back_after_100)
    assert (pauses[0], pauses[-1]) == (0.05, 10.0)
    assert pauses == sorted(pauses)


async def test_a_process_whose_pid_cannot_be_written_runs_and_is_stopped_like_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, pid: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llamalith_app.supervise.pidfile.write_pid", full)
    supervisor = up.Supervisor(tmp_path, grace_s=5)
    managed = up.ManagedProcess("sleeper", ("sleep", "100"), drains=False)
    started = asyncio.Event()

    async def work() -> None:
        keeping = asyncio.create_task(supervisor.keep_running(managed))
        while managed not in supervisor._running:
            assert not keeping.done()
            await asyncio.sleep(0)
        started.set()
        await keeping

    running = asyncio.create_task(supervisor.run(work()))
    await started.wait()
    process = supervisor._running[managed]
    supervisor._on_signal(signal.SIGTERM)
    assert await running == 0
    assert process.returncode == -signal.SIGTERM


async def test_not_listening_is_not_ready() -> None:
    with socket.socket() as closed:
        # Bound without listening: nobody else can be given the port.
        closed.bind(("127.0.0.1", 0))
        assert await up.is_ready(*closed.getsockname()) is False
