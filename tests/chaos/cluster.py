"""Runs the product's processes on this machine, restarts them when they die, and kills, freezes and drains them.

Only processes are touched that this object started, that hold a locked pid file of `up`, or that are children of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import bcrypt
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from llamalith_app.store.database import LOCK_DEADLINE_S
from llamalith_app.supervise import pidfile, up
from tests.chaos.faults import REAL_WORKER, UNDER_UP, UP, VALKEY, WEBS, WORKERS, Fault
from tests.product.conftest import clean_environ, free_port

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-chaos"
FAKE_MODELS = ("fake-a", "fake-b")
REAL_MODEL = "smollm2"
GRACE_S = 3.0
READY_S = 60.0
FLUSH_S = 2.0
END_S = 60.0
ENGINE_END_S = 10.0
"""A stopped engine must be gone within this time after its worker."""
UP_WORKER_END_S = 30.0
"""The same after its `up`: includes the time in which the next `up` starts and stops the leftover worker."""

COMPLAINT = re.compile(r'"level":"(error|critical)"|^Traceback')
HARMLESS = re.compile(r"Upkeep task failed unexpectedly|_GatheringFuture exception was never retrieved.*CancelledError")
"""Logged by SAQ when Redis is away during its upkeep or its stop. Nothing depends on either."""
HELD_UP = re.compile(r"database is locked|no connection free|ended before it could give back its jobs")
"""Right for a process that was frozen, or while a frozen process holds the database's lock; otherwise a fault."""

SCRIPT = [
    {"when": "slow", "step_s": 0.01},
    {"when": "quick", "step_s": 0.0005},
    {"when": "", "step_s": 0.002},
]
"""Seconds for each token, by a word in the prompt. A reply has 64 tokens."""


class Command(NamedTuple):
    argv: tuple[str, ...]
    environ: dict[str, str]


class Cluster:
    """All processes of one run. `folder` is for configuration, data and logs."""

    def __init__(self, folder: Path, *, with_real: bool) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.database = self.data_dir / "llamalith.db"
        self.ports = {name: free_port() for name in WEBS}
        self.counts: Counter[str] = Counter()
        """How often each fault was done to each target."""
        self.unexpected: list[str] = []
        """Deaths that no fault caused, and other unexpected events."""
        self._parent_fd, self._alive_fd = os.pipe()
        self._with_real = with_real
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._down_s: dict[str, float] = {}
        """How long processes that are being killed are to stay down."""
        self._frozen: dict[str, asyncio.Task[None]] = {}
        self._watched: set[asyncio.Task[None]] = set()
        """Waits for stopped engines to be gone after their worker was killed."""
        self._caused: Counter[str] = Counter()
        """Deaths under `up` that faults caused, by `up`'s name of the process."""
        self._freezes: list[tuple[datetime, datetime]] = []
        """When a process was frozen that may have held the database's lock."""
        self._stopping = False
        self._commands = self._make_commands()

    def _make_commands(self) -> dict[str, Command]:
        script, config = self.folder / "script.json", self.folder / "config.json"
        script.write_text(json.dumps(SCRIPT))
        paths = {name: str(self.folder / f"{name}.gguf") for name in FAKE_MODELS}
        config.write_text(
            json.dumps(
                {
                    # The bundled model needs no path.
                    "available_models": [*FAKE_MODELS, *([REAL_MODEL] if self._with_real else [])],
                    "model_paths": paths,
                    "model_settings": {
                        **{name: {"n_ctx": 8192, "n_slots": 4} for name in FAKE_MODELS},
                        **({REAL_MODEL: {"n_slots": 2, "max_tokens": 12}} if self._with_real else {}),
                    },
                }
            )
        )
        environ = clean_environ(
            LLAMALITH_CONFIG=str(config),
            LLAMALITH_LOG_FORMAT="json",
            SECRET_KEY="a secret key of the chaos, of 32 bytes",
            ADMIN_PASSWORD_HASH=bcrypt.hashpw(b"nobody logs in", bcrypt.gensalt(6)).decode(),
            N8N_API_TOKEN=TOKEN,
            PYTHONPATH=str(ROOT),
            # A process that does not stop in time is aborted, and then logs where each of its threads is.
            PYTHONFAULTHANDLER="1",
        )
        data_dir, parent = ("--data-dir", str(self.data_dir)), ("--parent-fd", str(self._parent_fd))
        models, grace = ",".join(FAKE_MODELS), ("--grace", str(GRACE_S))
        (port,) = (port for name, port in self.ports.items() if name in UNDER_UP)
        whole = (sys.executable, "-m", "tests.chaos.up", str(script), models, "--port", str(port), *data_dir, *grace)
        commands = {UP: Command(whole, environ)}
        for name in (*WEBS, *WORKERS):
            if name in UNDER_UP:
                continue
            fake = (sys.executable, "-m", "tests.chaos.worker", "--script", str(script), "--models", models, *grace)
            argv = up.command("web", "--port", str(self.ports[name])) if name in WEBS else fake
            commands[name] = Command((*argv, *data_dir, *parent), environ)
        if self._with_real:
            worker = up.command("worker", *grace, *data_dir, *parent)
            commands[REAL_WORKER] = Command(worker, environ | {"LLM_MODELS": REAL_MODEL})
        self._socket = self.data_dir / "valkey" / "valkey.sock"
        return commands

    async def run_command(self, *arguments: str) -> tuple[int, str]:
        """Runs one of the product's commands; returns its exit code and output."""
        process = await asyncio.create_subprocess_exec(
            *up.command(*arguments, "--data-dir", str(self.data_dir)),
            cwd=self.folder,
            env=self._commands[UP].environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async def start(self) -> None:
        """Starts all processes. The database must exist."""
        for name in self._commands:
            self._keepers[name] = asyncio.create_task(self._keep(name))
        await self.until_ready()

    async def until_ready(self) -> None:
        """Waits until everything runs and is ready; what is not after READY_S seconds is noted as unexpected."""
        try:
            async with asyncio.timeout(READY_S):
                await up.wait_until(self._is_ready)
        except TimeoutError:
            down = [name for name in (*self._commands, *UNDER_UP) if self._pid(name) is None]
            deaf = [name for name, port in self.ports.items() if not await up.is_ready("127.0.0.1", port)]
            self.unexpected.append(f"after {READY_S} s these are not there: {down}, and these not ready: {deaf}")

    async def _is_ready(self) -> bool:
        return (
            all(self._pid(name) is not None for name in (*self._commands, *UNDER_UP))
            and not self._down_s
            and all([await up.is_ready("127.0.0.1", port) for port in self.ports.values()])
        )

    async def _keep(self, name: str) -> None:
        command = self._commands[name]
        while not self._stopping:
            with (self.folder / f"{name}.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *command.argv,
                    cwd=self.folder,
                    env=command.environ,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self._parent_fd,),
                    start_new_session=True,
                )
            self._processes[name] = process
            code = await process.wait()
            del self._processes[name]
            down_s = self._down_s.pop(name, None)
            if down_s is None and not self._stopping:
                self.unexpected.append(f"{name} (pid {process.pid}) ended by itself with {up.in_words(code)}")
            await asyncio.sleep(down_s or 0.2)

    def do(self, fault: Fault) -> bool:
        """Begins the fault. Returns False if its target does not run just now."""
        if fault.act == "flush":
            self._flushing = asyncio.create_task(self._flush())
            return True
        pid = self._pid(fault.target)
        if pid is None or fault.target in self._down_s:
            return False
        match fault.act:
            case "kill engine":
                return self._signal_engines(pid, signal.SIGKILL, f"SIGKILL engine of {fault.target}") > 0
            case "freeze engine":
                name = f"engine of {fault.target}"
                engines = self._engines(pid)
                if not engines or name in self._frozen:
                    return False
                self._freeze(name, engines, fault.for_s)
                return True
            case "freeze engine and kill":
                return self._freeze_engines_and_kill(fault, pid)
        if fault.target in self._frozen:
            # Killed while frozen, it could not show that it notices the lost leases, which it must.
            return False
        if fault.act == "freeze":
            self._freeze(fault.target, [pid], fault.for_s)
            return True
        self._kill(fault, pid, {"kill": signal.SIGKILL, "drain": signal.SIGTERM, "hang up": signal.SIGHUP}[fault.act])
        return True

    def _freeze_engines_and_kill(self, fault: Fault, pid: int) -> bool:
        worker = self._pid("worker-1") if fault.target == UP else pid
        engines = [] if worker is None else self._engines(worker)
        if not engines:
            return False
        self.counts[f"SIGSTOP engine of {fault.target}"] += len(engines)
        for engine in engines:
            _signal(engine, signal.SIGSTOP)
        self._kill(fault, pid, signal.SIGKILL)
        within_s = UP_WORKER_END_S + fault.for_s if fault.target == UP else ENGINE_END_S
        watched = asyncio.create_task(self._expect_gone(engines, within_s, f"{fault}"))
        self._watched.add(watched)
        watched.add_done_callback(self._watched.discard)
        return True

    async def _expect_gone(self, pids: list[int], within_s: float, fault: str) -> None:
        async def gone() -> bool:
            return not any(map(self._is_ours, pids))

        try:
            async with asyncio.timeout(within_s):
                await up.wait_until(gone)
        except TimeoutError:
            self.unexpected.append(f"engines {pids} are there {within_s} s after: {fault}")

    def _kill(self, fault: Fault, pid: int, number: signal.Signals) -> None:
        if fault.target in UNDER_UP:
            # `up` restarts it.
            self._caused[UNDER_UP[fault.target]] += 1
        else:
            self._down_s[fault.target] = fault.for_s
        self.counts[f"{number.name} {fault.target}"] += 1
        _signal(pid, number)

    def _signal_engines(self, worker: int, number: signal.Signals, name: str) -> int:
        engines = self._engines(worker)
        for engine in engines:
            _signal(engine, number)
        if engines:
            self.counts[name] += len(engines)
        return len(engines)

    def _freeze(self, name: str, pids: list[int], for_s: float) -> None:
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        self.counts[f"SIGSTOP {name}"] += len(pids)
        self._frozen[name] = asyncio.create_task(self._thaw(name, pids, for_s))

    def _pid(self, name: str) -> int | None:
        """The pid; None if the process does not run just now."""
        if name not in UNDER_UP:
            process = self._processes.get(name)
            return None if process is None or process.returncode is not None else process.pid
        path = self.data_dir / "run" / f"{UNDER_UP[name]}.pid"
        if not pidfile.is_held(str(path)):
            return None
        pid = pidfile.read_pid(path)
        return pid if pid is not None and self._is_ours(pid) else None

    def _is_ours(self, pid: int) -> bool:
        """Whether it lives and belongs to this run: then the folder is in its command or its environment."""
        process = Path(f"/proc/{pid}")
        try:
            words = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
        except OSError:
            return False
        return bytes(self.folder) in words

    async def calm(self) -> None:
        """Waits until no process is frozen any more, and until everything runs again."""
        for task in [*self._frozen.values(), *self._watched]:
            await task
        await self.until_ready()

    async def _thaw(self, name: str, pids: list[int], for_s: float) -> None:
        began = datetime.now(UTC)

        async def gone() -> bool:
            return not any(map(self._is_ours, pids))

        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(for_s):
                    await up.wait_until(gone)
            for pid in filter(self._is_ours, pids):
                _signal(pid, signal.SIGCONT)
        finally:
            del self._frozen[name]
            if name != VALKEY:
                self._freezes.append((began, datetime.now(UTC)))

    async def _flush(self) -> None:
        redis = Redis.from_url(
            f"unix://{self._socket}",
            socket_timeout=FLUSH_S,
            socket_connect_timeout=FLUSH_S,
            retry=Retry(NoBackoff(), 0),
        )
        # Valkey may be away, or frozen: the command then waits in its socket.
        with contextlib.suppress(Exception):
            await redis.flushall()
            self.counts["FLUSHALL"] += 1
        await redis.aclose()

    @staticmethod
    def _engines(worker: int) -> list[int]:
        try:
            return [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]
        except OSError:
            return []

    async def stop(self) -> None:
        """Drains all processes, and kills those that do not stop."""
        self._stopping = True
        for number in (signal.SIGTERM, signal.SIGABRT, signal.SIGKILL):
            left = list(self._processes)
            for name in left:
                self._processes[name].send_signal(signal.SIGCONT)
                self._processes[name].send_signal(number)
                if number is signal.SIGABRT:
                    pid = self._processes[name].pid
                    self.unexpected.append(f"{name} (pid {pid}) did not end on SIGTERM within {END_S} s")
            if left:
                await asyncio.wait([self._keepers[name] for name in left], timeout=END_S)
        os.close(self._alive_fd)
        os.close(self._parent_fd)
        self._note_deaths_under_up()

    def _note_deaths_under_up(self) -> None:
        """Notes processes that `up` restarted more often than faults killed them."""
        deaths: Counter[str] = Counter()
        for line in (self.folder / f"{UP}.log").read_text(errors="replace").splitlines():
            if '"process died, restarting it"' in line:
                deaths[json.loads(line)["name"]] += 1
        for name, n in deaths.items():
            if n > self._caused[name]:
                self.unexpected.append(f"{name} under up died {n} times, {self._caused[name]} times by a fault")

    def complaints(self) -> list[str]:
        """Log lines of level error. A process that dies, freezes or is away must cause warnings at most."""
        return [
            f"{path.name}: {line[:2000]}"
            for path in self.folder.glob("*.log")
            for line in path.read_text(errors="replace").splitlines()
            if COMPLAINT.search(line) and not HARMLESS.search(line) and not self._is_held_up(line)
        ]

    def _is_held_up(self, line: str) -> bool:
        if not HELD_UP.search(line) or not line.startswith("{"):
            return False
        logged = datetime.fromisoformat(json.loads(line)["timestamp"])
        waiting_since = logged - timedelta(seconds=LOCK_DEADLINE_S)
        return any(began < logged and waiting_since < ended for began, ended in self._freezes)

    def leftovers(self) -> list[str]:
        """Processes of this run that are still alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if self._is_ours(int(path.parent.name)):
                    found.append(f"pid {path.parent.name}: {b' '.join(words).decode(errors='replace')}")
        return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kills(counts: Mapping[str, int]) -> int:
    return sum(n for name, n in counts.items() if name.startswith("SIGKILL"))
