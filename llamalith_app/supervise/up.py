"""Runs the whole product on one machine: starts its processes, restarts those that die, drains and stops them.

A lock allows one `up` for each data directory. Processes that an earlier `up` left running are stopped first. Knows
processes as commands with a pid; knows nothing of jobs, SQL, or what the processes say to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import structlog

from llamalith_app.errors import ConfigError, LlamalithError
from llamalith_app.settings.config import Config
from llamalith_app.settings.paths import valkey_socket
from llamalith_app.supervise import parent, pidfile, signals, valkey

EXIT_CONFIG = 2
STABLE_S = 30.0
"""A process that has run this long starts again without backoff."""
MAX_BACKOFF_S = 10.0
VALKEY_START_S = 5.0
STOP_MARGIN_S = 20.0
"""Beyond the grace, before a process is killed: a worker releases its jobs and its engines save their states."""
FIRST_POLL_S = 0.05
MAX_POLL_S = 10.0
"""Each poll of the web is a line in its log."""

log = structlog.get_logger(__name__)


class ManagedProcess(NamedTuple):
    """A command that the supervisor runs."""

    name: str
    argv: tuple[str, ...]
    drains: bool = True
    """True: gets `--parent-fd N`, by which it notices that its parent is gone, and is drained before the others are
    stopped. False: the kernel ends it with its parent."""


class ProcessFailed(LlamalithError):
    """A process could not start. It has written the reason to its own log."""

    type = "process-failed"

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with {in_words(code)}")
        self.code = code if code > 0 else 1


def restart_backoff_s(n_short_runs: int) -> float:
    """Seconds before the next start, after so many runs in a row that ended within STABLE_S.

    The first three restarts come at once, since jobs wait for them; then the backoff doubles up to MAX_BACKOFF_S.
    """
    return 0.0 if n_short_runs <= 3 else min(MAX_BACKOFF_S, 0.5 * 2.0 ** (n_short_runs - 4))


def in_words(returncode: int) -> str:
    """How a process ended, for a log line."""
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


class Supervisor:
    """Starts, restarts and stops processes.

    `run_dir` holds their pid files; only one supervisor at a time may use it. `grace_s`: seconds for a drain;
    `stop_margin_s`: further seconds before a process is killed.
    """

    def __init__(self, run_dir: Path, *, grace_s: float, stop_margin_s: float = STOP_MARGIN_S) -> None:
        self._run_dir = run_dir
        self._grace_s = grace_s
        self._stop_margin_s = stop_margin_s
        self._running: dict[ManagedProcess, asyncio.subprocess.Process] = {}
        self._started: set[str] = set()
        """Names of the processes whose pid files this supervisor wrote."""
        self._stop = asyncio.Event()
        self._next_kills = False
        """A signal has come after which the next one stops everything at once."""
        # No other process holds the write end: the kernel closes it when this process ends.
        self._parent_fd, self._alive_fd = os.pipe()

    async def run(self, work: Coroutine[None, None, None]) -> int:
        """Runs `work`, which calls the methods below, until a signal; then drains and stops all processes.

        Returns the exit code. A second signal kills everything at once, this process included.
        """
        loop = asyncio.get_running_loop()
        for number in signals.requests_to_end():
            loop.add_signal_handler(number, self._on_signal, number)
        working = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stop):
            task.cancel()
        await asyncio.wait({working, stop})
        draining = [managed for managed in self._running if managed.drains]
        await self._stop_processes(draining, self._grace_s + self._stop_margin_s)
        await self._stop_processes(list(self._running), self._stop_margin_s)
        for name in self._started:
            self._pid_path(name).unlink(missing_ok=True)
        os.close(self._alive_fd)
        os.close(self._parent_fd)
        if working.cancelled():
            return 0
        try:
            working.result()
        except ProcessFailed as error:
            log.error("cannot start", reason=str(error))
            return error.code
        return 0

    async def stop_leftover(self, name: str) -> None:
        """Stops the process of this name that an earlier supervisor left running, if there is one.

        Raises ConfigError if it survives SIGKILL.
        """
        fd, was_running = await pidfile.take_over(self._pid_path(name))
        os.close(fd)
        if was_running:
            log.warning("stopped a process that an earlier start left running", name=name)

    async def run_to_end(self, managed: ManagedProcess) -> None:
        """Runs a process and waits for its end. Raises ProcessFailed if its exit code is not 0."""
        process = await self._start(managed)
        code = await process.wait()
        del self._running[managed]
        if code:
            raise ProcessFailed(managed.name, code)

    async def keep_running(self, managed: ManagedProcess) -> NoReturn:
        """Starts a process, and restarts it when it dies. Raises ProcessFailed if its first run ends in EXIT_CONFIG."""
        n_runs = n_short_runs = 0
        while True:
            started = time.monotonic()
            try:
                process = await self._start(managed)
                code = await process.wait()
                del self._running[managed]
                reason = in_words(code)
            except (OSError, ConfigError) as error:
                code, reason = -1, str(error)
            n_runs += 1
            if code == EXIT_CONFIG and n_runs == 1:
                raise ProcessFailed(managed.name, code)
            n_short_runs = 1 if time.monotonic() - started >= STABLE_S else n_short_runs + 1
            backoff_s = restart_backoff_s(n_short_runs)
            log.warning("process died, restarting it", name=managed.name, reason=reason, in_s=backoff_s)
            await asyncio.sleep(backoff_s)

    async def _start(self, managed: ManagedProcess) -> asyncio.subprocess.Process:
        # A child of the process that died may hold its lock a moment longer.
        lock_fd, _ = await pidfile.take_over(self._pid_path(managed.name))
        try:
            process = await asyncio.create_subprocess_exec(
                *managed.argv,
                *(("--parent-fd", str(self._parent_fd)) if managed.drains else ()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(lock_fd, self._parent_fd) if managed.drains else (lock_fd,),
                # Ctrl-C in the terminal is for this process alone, which then drains in order.
                start_new_session=True,
                preexec_fn=None if managed.drains else parent.preexec_die_with_parent(),
            )
            self._running[managed] = process
            self._started.add(managed.name)
            with contextlib.suppress(OSError):  # on a full disk; a later start then cannot stop the process, only wait
                pidfile.write_pid(lock_fd, process.pid)
        finally:
            os.close(lock_fd)
        log.info("process started", name=managed.name, pid=process.pid)
        return process

    async def _stop_processes(self, processes: Iterable[ManagedProcess], patience_s: float) -> None:
        """SIGTERM to all; after `patience_s` seconds SIGKILL."""
        stopping = {managed: self._running[managed] for managed in processes}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for managed, process in stopping.items():
                if process.returncode is None:
                    log.info("stopping process", name=managed.name, signal=number.name)
                    pidfile.signal_group(process.pid, number)
            try:
                async with asyncio.timeout(patience_s):
                    await asyncio.gather(*(process.wait() for process in stopping.values()))
                break
            except TimeoutError:
                log.warning("processes do not stop", names=[managed.name for managed in stopping], after_s=patience_s)
        for managed in stopping:
            del self._running[managed]

    def _on_signal(self, number: int) -> None:
        if self._next_kills and signals.kills_when_repeated(number):
            for process in self._running.values():
                if process.returncode is None:  # the pid of an ended process may belong to another one by now
                    pidfile.signal_group(process.pid, signal.SIGKILL)
            os._exit(128 + number)
        self._next_kills |= signals.kills_when_repeated(number)
        if not self._stop.is_set():
            log.info(
                "stopping; a second SIGTERM or SIGINT kills everything at once", signal=signal.Signals(number).name
            )
        self._stop.set()

    def _pid_path(self, name: str) -> Path:
        return self._run_dir / f"{name}.pid"


async def run(config: Config, *, host: str, port: int, grace_s: float, on_ready: Callable[[str], None]) -> int:
    """Runs the product until SIGTERM, SIGINT or SIGHUP; returns the exit code.

    `on_ready` is called once, with the URL of the page, when web, worker and queue can serve.
    Raises ConfigError if another `up` holds the data directory, the port is taken, or there is no Valkey.
    """
    run_dir = config.data_dir / "run"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_path = run_dir / "up.lock"
    lock = pidfile.try_lock(lock_path)
    if lock is None:
        raise ConfigError([f"another llamalith up (pid {pidfile.read_pid(lock_path)}) runs on {config.data_dir}"])
    pidfile.write_pid(lock, os.getpid())
    supervisor = Supervisor(run_dir, grace_s=grace_s)
    return await supervisor.run(_product(supervisor, config, host, port, grace_s, on_ready))


async def _product(
    supervisor: Supervisor, config: Config, host: str, port: int, grace_s: float, on_ready: Callable[[str], None]
) -> None:
    # All processes read the same .env, whatever file appears in the current folder later.
    env_file = ("--env-file", str(config.env_file)) if config.env_file else ()
    settings = ("--data-dir", str(config.data_dir), *env_file)
    for name in ("web", "worker", "valkey", "migrate"):
        await supervisor.stop_leftover(name)
    check_port(host, port)
    try:
        async with asyncio.TaskGroup() as processes:
            if config.embedded_redis:
                await _start_valkey(supervisor, config, processes)
            migrate = command("migrate", "--quiet", *settings)
            await supervisor.run_to_end(ManagedProcess("migrate", migrate, drains=False))
            web = command("web", "--host", host, "--port", str(port), *settings)
            worker = command("worker", *settings, "--grace", str(grace_s))
            processes.create_task(supervisor.keep_running(ManagedProcess("web", web)))
            processes.create_task(supervisor.keep_running(ManagedProcess("worker", worker)))
            await wait_until(lambda: is_ready(host, port))
            on_ready(f"http://{in_url(host)}:{port}/chat")
    except ExceptionGroup as failed:
        # The first process that failed has ended the group.
        raise failed.exceptions[0] from None


async def _start_valkey(supervisor: Supervisor, config: Config, processes: asyncio.TaskGroup) -> None:
    folder, socket_path = config.data_dir / "valkey", valkey_socket(config.data_dir)
    valkey.make_folders(folder=folder, socket=socket_path)
    argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket_path)
    processes.create_task(supervisor.keep_running(ManagedProcess("valkey", tuple(argv), drains=False)))
    try:
        async with asyncio.timeout(VALKEY_START_S):
            await wait_until(lambda: valkey.answers(socket_path))
    except TimeoutError:
        # No promise of the product depends on it.
        log.warning("Valkey does not answer yet; going on without it", log=str(folder / "valkey.log"))


def command(*arguments: str) -> tuple[str, ...]:
    """The argv of one of our own commands. -P keeps a file in the current folder from being imported as a package."""
    return (sys.executable, "-P", "-m", "llamalith_app.cli", *arguments)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if this process could not listen on the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = (
            "another program listens there; choose another port with --port"
            if error.errno == errno.EADDRINUSE
            else error.strerror or str(error)
        )
        raise ConfigError([f"cannot listen on {host}:{port}: {reason}"]) from None


async def is_ready(host: str, port: int) -> bool:
    """Whether `/readyz` answers 200, which means that web, worker and queue can serve; False after 5 s."""
    try:
        async with asyncio.timeout(5.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /readyz HTTP/1.1\r\nHost: {in_url(host)}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.readline()).split(b" ")[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Polls the condition until it is true, less and less often."""
    pause_s = FIRST_POLL_S
    while not await condition():
        await asyncio.sleep(pause_s)
        pause_s = min(MAX_POLL_S, 1.1 * pause_s)


def in_url(host: str) -> str:
    """The host as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
