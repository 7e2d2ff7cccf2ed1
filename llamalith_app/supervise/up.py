"""The whole product on one machine: starts its parts, starts again what dies, drains and ends them.

One `up` a data directory, held by a lock; the parts of one that is gone are replaced. Knows the parts as
commands with a pid: nothing of what they say to each other, of jobs or SQL.
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
from llamalith_app.logs import say
from llamalith_app.settings.config import Config
from llamalith_app.settings.paths import valkey_socket
from llamalith_app.supervise import parent, pidfile, signals, valkey

EXIT_CONFIG = 2
STEADY_S = 30.0
LONGEST_PAUSE_S = 10.0
VALKEY_START_S = 5.0
LATE_S = 20.0
"""Seconds beyond the grace until a part is killed: a worker gives jobs back and its engines save what they hold."""
PROBE_EVERY_S = 0.05
LONGEST_PROBE_PAUSE_S = 10.0
"""Of something that is away for long: each look is a line in the log."""

log = structlog.get_logger(__name__)


class ManagedProcess(NamedTuple):
    name: str
    argv: tuple[str, ...]
    ours: bool = True
    """Ours: is told by `--parent-fd N` when its parent is gone, and is drained first. Else the kernel ends it
    with its parent, and it is ended after those of ours."""


class PartFailed(LlamalithError):
    """A part could not even start; it has said why itself."""

    type = "part-failed"

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with {in_words(code)}")
        self.code = code if code > 0 else 1


def pause_s(n_short_lives: int) -> float:
    """Seconds before the next start, after so many lives in a row that ended within STEADY_S.

    The first deaths may be accidents, and jobs wait for the restart; a part that goes on dying is left to rest.
    """
    return 0.0 if n_short_lives <= 3 else min(LONGEST_PAUSE_S, 0.5 * 2.0 ** (n_short_lives - 4))


def in_words(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


class Supervisor:
    """Starts parts and ends them. `run_dir`: their pid files; one supervisor at a time may work in it."""

    def __init__(self, run_dir: Path, *, grace_s: float) -> None:
        self._run_dir = run_dir
        self._grace_s = grace_s
        self._running: dict[ManagedProcess, asyncio.subprocess.Process] = {}
        self._started: set[str] = set()
        """Names of parts whose pid files are of this supervisor."""
        self._stop = asyncio.Event()
        self._insisted = False
        """It was asked to end by a signal that counts where a second one ends everything at once."""
        # Nobody else holds the write end: the kernel closes it with this process, however that ends.
        self._parent_fd, self._alive_fd = os.pipe()

    async def run(self, work: Coroutine[None, None, None]) -> int:
        """Runs `work`, which calls `replace`, `once`, `keep`, until a signal; then drains and ends all parts.

        Answers the exit code. A second signal ends everything, this process too, at once.
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
        await self._end([part for part in self._running if part.ours], self._grace_s + LATE_S)
        await self._end(list(self._running), LATE_S)
        for name in self._started:
            self._pid_path(name).unlink(missing_ok=True)
        os.close(self._alive_fd)
        os.close(self._parent_fd)
        if working.cancelled():
            return 0
        try:
            working.result()
        except PartFailed as error:
            log.error("cannot start", reason=str(error))
            return error.code
        return 0

    async def replace(self, name: str) -> None:
        """Ends what an earlier supervisor left of this part. Raises ConfigError where it cannot be ended."""
        fd, was_there = await pidfile.replace(self._pid_path(name))
        os.close(fd)
        if was_there:
            log.warning("replaced what an earlier start left running", part=name)

    async def once(self, part: ManagedProcess) -> None:
        """Runs a part to its end. Raises PartFailed where that is not exit code 0."""
        process = await self._start(part)
        code = await process.wait()
        del self._running[part]
        if code:
            raise PartFailed(part.name, code)

    async def keep(self, part: ManagedProcess) -> NoReturn:
        """Starts a part, and again when it dies. Raises PartFailed if its first life ends in EXIT_CONFIG."""
        n_lives = n_short_lives = 0
        while True:
            started = time.monotonic()
            try:
                process = await self._start(part)
                code = await process.wait()
                del self._running[part]
                reason = in_words(code)
            except (OSError, ConfigError) as error:
                code, reason = -1, str(error)
            n_lives += 1
            if code == EXIT_CONFIG and n_lives == 1:
                raise PartFailed(part.name, code)
            n_short_lives = 1 if time.monotonic() - started >= STEADY_S else n_short_lives + 1
            pause = pause_s(n_short_lives)
            log.warning("part died, is started again", part=part.name, reason=reason, in_s=pause)
            await asyncio.sleep(pause)

    async def _start(self, part: ManagedProcess) -> asyncio.subprocess.Process:
        # A process that the part started may hold its lock a moment longer than the part.
        lock_fd, _ = await pidfile.replace(self._pid_path(part.name))
        try:
            process = await asyncio.create_subprocess_exec(
                *part.argv,
                *(("--parent-fd", str(self._parent_fd)) if part.ours else ()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(lock_fd, self._parent_fd) if part.ours else (lock_fd,),
                # Ctrl-C in the terminal is for this process alone, which then drains in order.
                start_new_session=True,
                preexec_fn=None if part.ours else parent.dies_with_parent(),
            )
            self._running[part] = process
            self._started.add(part.name)
            with contextlib.suppress(OSError):  # a full disk: then a later start waits for it instead of ending it
                pidfile.write_pid(lock_fd, process.pid)
        finally:
            os.close(lock_fd)
        log.info("part started", part=part.name, pid=process.pid)
        return process

    async def _end(self, parts: Iterable[ManagedProcess], patience_s: float) -> None:
        ending = {part: self._running[part] for part in parts}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for part, process in ending.items():
                if process.returncode is None:
                    log.info("ending part", part=part.name, signal=number.name)
                    pidfile.signal_group(process.pid, number)
            try:
                async with asyncio.timeout(patience_s):
                    await asyncio.gather(*(process.wait() for process in ending.values()))
                break
            except TimeoutError:
                log.warning("parts do not end", parts=[part.name for part in ending], after_s=patience_s)
        for part in ending:
            del self._running[part]

    def _on_signal(self, number: int) -> None:
        if self._insisted and signals.insists(number):
            for process in self._running.values():
                if process.returncode is None:  # else its pid may be another's by now
                    pidfile.signal_group(process.pid, signal.SIGKILL)
            os._exit(128 + number)
        self._insisted |= signals.insists(number)
        if not self._stop.is_set():
            log.info("stopping; a second SIGTERM or SIGINT ends everything at once", signal=signal.Signals(number).name)
        self._stop.set()

    def _pid_path(self, name: str) -> Path:
        return self._run_dir / f"{name}.pid"


async def run(config: Config, *, host: str, port: int, grace_s: float) -> int:
    """Runs the product until SIGTERM, SIGINT or SIGHUP; answers the exit code, and prints one line when it is ready.

    Raises ConfigError where another `up` holds the data directory, the port is taken, or there is no Valkey.
    """
    run_dir = config.data_dir / "run"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_path = run_dir / "up.lock"
    lock = pidfile.try_lock(lock_path)
    if lock is None:
        raise ConfigError([f"another llamalith up (pid {pidfile.read_pid(lock_path)}) runs on {config.data_dir}"])
    pidfile.write_pid(lock, os.getpid())
    supervisor = Supervisor(run_dir, grace_s=grace_s)
    return await supervisor.run(_product(supervisor, config, host, port, grace_s))


async def _product(supervisor: Supervisor, config: Config, host: str, port: int, grace_s: float) -> None:
    # What was read here is what they read, whatever comes into the current folder later.
    env_file = ("--env-file", str(config.env_file)) if config.env_file else ()
    settings = ("--data-dir", str(config.data_dir), *env_file)
    for name in ("web", "worker", "valkey", "migrate"):
        await supervisor.replace(name)
    check_port(host, port)
    try:
        async with asyncio.TaskGroup() as parts:
            if config.embedded_redis:
                await _start_valkey(supervisor, config, parts)
            await supervisor.once(ManagedProcess("migrate", command("migrate", "--quiet", *settings), ours=False))
            web = command("web", "--host", host, "--port", str(port), *settings)
            worker = command("worker", *settings, "--grace", str(grace_s))
            parts.create_task(supervisor.keep(ManagedProcess("web", web)))
            parts.create_task(supervisor.keep(ManagedProcess("worker", worker)))
            await until(lambda: serves(host, port))
            say(f"llamalith: ready http://{in_url(host)}:{port}/chat")
    except ExceptionGroup as failed:
        # Parts fail one by one; the first to do so has ended the others.
        raise failed.exceptions[0] from None


async def _start_valkey(supervisor: Supervisor, config: Config, parts: asyncio.TaskGroup) -> None:
    folder, socket_path = config.data_dir / "valkey", valkey_socket(config.data_dir)
    valkey.make_folders(folder=folder, socket=socket_path)
    argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket_path)
    parts.create_task(supervisor.keep(ManagedProcess("valkey", tuple(argv), ours=False)))
    try:
        async with asyncio.timeout(VALKEY_START_S):
            await until(lambda: valkey.answers(socket_path))
    except TimeoutError:
        # Nothing that the product promises needs it.
        log.warning("Valkey does not answer yet; going on without it", log=str(folder / "valkey.log"))


def command(*arguments: str) -> tuple[str, ...]:
    """The argv of one of our own commands. -P: a file in the current folder never stands in for a package."""
    return (sys.executable, "-P", "-m", "llamalith_app.cli", *arguments)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where the address cannot be listened on."""
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


async def serves(host: str, port: int) -> bool:
    """True if web says that web, worker and queue can serve."""
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


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    pause_s = PROBE_EVERY_S
    while not await true():
        await asyncio.sleep(pause_s)
        pause_s = min(LONGEST_PROBE_PAUSE_S, 1.1 * pause_s)


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
