"""The product's processes on this machine: started, started again when they die, killed, frozen and drained.

A process is found by the pid that this object started, by the locked pid file of `up`, or as the child of one of
these; nothing else is touched.
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
from tests.chaos.faults import PARTS_OF_UP, REAL_WORKER, UP, VALKEY, WEBS, WORKERS, Fault
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
"""An engine that hangs is gone so soon after its worker."""
UP_WORKER_END_S = 30.0
"""The same after its `up`, whose next start ends the worker that is left: the time of that start is in it."""

COMPLAINT = re.compile(r'"level":"(error|critical)"|^Traceback')
HARMLESS = re.compile(r"Upkeep task failed unexpectedly|_GatheringFuture exception was never retrieved.*CancelledError")
"""SAQ's own, where Redis is away while it looks after its hints, or while it ends. Nothing depends on either."""
HELD_UP = re.compile(r"database is locked|no connection free|ended before it could give back its jobs")
"""Right of one that was frozen, or while such a one holds the lock, and wrong otherwise."""

SCRIPT = [
    {"when": "slow", "step_s": 0.01},
    {"when": "quick", "step_s": 0.0005},
    {"when": "", "step_s": 0.002},
]
"""Seconds that a token takes by the word in its prompt; a reply has 64 of them."""


class ManagedProcess(NamedTuple):
    argv: tuple[str, ...]
    environ: dict[str, str]


class Cluster:
    """`folder`: where config, data and logs go."""

    def __init__(self, folder: Path, *, with_real: bool) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.database = self.data_dir / "llamalith.db"
        self.ports = {name: free_port() for name in WEBS}
        self.counts: Counter[str] = Counter()
        """What was done to whom."""
        self.unexpected: list[str] = []
        """Deaths that nobody caused."""
        self._parent_fd, self._alive_fd = os.pipe()
        self._with_real = with_real
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._down_s: dict[str, float] = {}
        """Of parts that are being ended, how long they are to stay down."""
        self._frozen: dict[str, asyncio.Task[None]] = {}
        self._watched: set[asyncio.Task[None]] = set()
        """Engines that hang and whose worker was killed, until they are gone."""
        self._caused: Counter[str] = Counter()
        """Deaths of parts of `up` that were caused here, by `up`'s name for the part."""
        self._freezes: list[tuple[datetime, datetime]] = []
        """From when to when something was frozen that may have held the lock of the database."""
        self._ending = False
        self._parts = self._make_parts()

    def _make_parts(self) -> dict[str, ManagedProcess]:
        script, config = self.folder / "script.json", self.folder / "config.json"
        script.write_text(json.dumps(SCRIPT))
        paths = {name: str(self.folder / f"{name}.gguf") for name in FAKE_MODELS}
        config.write_text(
            json.dumps(
                {
                    # The bundled model is offered beside those that have a path.
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
            # What does not end in time is aborted, and says in its log where every thread of it stood.
            PYTHONFAULTHANDLER="1",
        )
        data_dir, parent = ("--data-dir", str(self.data_dir)), ("--parent-fd", str(self._parent_fd))
        models, grace = ",".join(FAKE_MODELS), ("--grace", str(GRACE_S))
        (port,) = (port for name, port in self.ports.items() if name in PARTS_OF_UP)
        whole = (sys.executable, "-m", "tests.chaos.up", str(script), models, "--port", str(port), *data_dir, *grace)
        parts = {UP: ManagedProcess(whole, environ)}
        for name in (*WEBS, *WORKERS):
            if name in PARTS_OF_UP:
                continue
            fake = (sys.executable, "-m", "tests.chaos.worker", "--script", str(script), "--models", models, *grace)
            argv = up.command("web", "--port", str(self.ports[name])) if name in WEBS else fake
            parts[name] = ManagedProcess((*argv, *data_dir, *parent), environ)
        if self._with_real:
            worker = up.command("worker", *grace, *data_dir, *parent)
            parts[REAL_WORKER] = ManagedProcess(worker, environ | {"LLM_MODELS": REAL_MODEL})
        self._socket = self.data_dir / "valkey" / "valkey.sock"
        return parts

    async def run_once(self, *arguments: str) -> tuple[int, str]:
        """One of the product's commands, to its end."""
        process = await asyncio.create_subprocess_exec(
            *up.command(*arguments, "--data-dir", str(self.data_dir)),
            cwd=self.folder,
            env=self._parts[UP].environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        return process.returncode or 0, told.decode()

    async def start(self) -> None:
        """All parts; the database must be there."""
        for name in self._parts:
            self._keepers[name] = asyncio.create_task(self._keep(name))
        await self.until_ready()

    async def until_ready(self) -> None:
        """Everything runs and says that it can serve; what does not is told as unexpected."""
        try:
            async with asyncio.timeout(READY_S):
                await up.wait_until(self._is_ready)
        except TimeoutError:
            down = [name for name in (*self._parts, *PARTS_OF_UP) if self._pid(name) is None]
            deaf = [name for name, port in self.ports.items() if not await up.is_ready("127.0.0.1", port)]
            self.unexpected.append(f"after {READY_S} s these are not there: {down}, and these not ready: {deaf}")

    async def _is_ready(self) -> bool:
        return (
            all(self._pid(name) is not None for name in (*self._parts, *PARTS_OF_UP))
            and not self._down_s
            and all([await up.is_ready("127.0.0.1", port) for port in self.ports.values()])
        )

    async def _keep(self, name: str) -> None:
        part = self._parts[name]
        while not self._ending:
            with (self.folder / f"{name}.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *part.argv,
                    cwd=self.folder,
                    env=part.environ,
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
            if down_s is None and not self._ending:
                self.unexpected.append(f"{name} (pid {process.pid}) ended by itself with {up.in_words(code)}")
            await asyncio.sleep(down_s or 0.2)

    def do(self, fault: Fault) -> bool:
        """Begins the fault; False: there is nobody to do it to just now."""
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
            # It would never find out, as it must, that others took over meanwhile.
            return False
        if fault.act == "freeze":
            self._freeze(fault.target, [pid], fault.for_s)
            return True
        self._end(fault, pid, {"kill": signal.SIGKILL, "drain": signal.SIGTERM, "hang up": signal.SIGHUP}[fault.act])
        return True

    def _freeze_engines_and_kill(self, fault: Fault, pid: int) -> bool:
        worker = self._pid("worker-1") if fault.target == UP else pid
        engines = [] if worker is None else self._engines(worker)
        if not engines:
            return False
        self.counts[f"SIGSTOP engine of {fault.target}"] += len(engines)
        for engine in engines:
            _signal(engine, signal.SIGSTOP)
        self._end(fault, pid, signal.SIGKILL)
        within_s = UP_WORKER_END_S + fault.for_s if fault.target == UP else ENGINE_END_S
        watched = asyncio.create_task(self._see_gone(engines, within_s, f"{fault}"))
        self._watched.add(watched)
        watched.add_done_callback(self._watched.discard)
        return True

    async def _see_gone(self, pids: list[int], within_s: float, fault: str) -> None:
        async def gone() -> bool:
            return not any(map(self._is_ours, pids))

        try:
            async with asyncio.timeout(within_s):
                await up.wait_until(gone)
        except TimeoutError:
            self.unexpected.append(f"engines {pids} are there {within_s} s after: {fault}")

    def _end(self, fault: Fault, pid: int, number: signal.Signals) -> None:
        if fault.target in PARTS_OF_UP:
            # `up` starts it again.
            self._caused[PARTS_OF_UP[fault.target]] += 1
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
        """None: it is not there just now."""
        if name not in PARTS_OF_UP:
            process = self._processes.get(name)
            return None if process is None or process.returncode is not None else process.pid
        path = self.data_dir / "run" / f"{PARTS_OF_UP[name]}.pid"
        if not pidfile.is_held(str(path)):
            return None
        pid = pidfile.read_pid(path)
        return pid if pid is not None and self._is_ours(pid) else None

    def _is_ours(self, pid: int) -> bool:
        """It lives and was started for this run: the folder stands in its command or its environment."""
        process = Path(f"/proc/{pid}")
        try:
            words = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
        except OSError:
            return False
        return bytes(self.folder) in words

    async def calm(self) -> None:
        """Thaws what is frozen, and waits until everything runs again."""
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
        # It may be away or frozen: then there is nothing to lose, or the command waits for it.
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

    async def end(self) -> None:
        """Drains all parts, and kills what does not end."""
        self._ending = True
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
        self._see_deaths_in_up()

    def _see_deaths_in_up(self) -> None:
        """What `up` started again: no more often than it was killed here."""
        deaths: Counter[str] = Counter()
        for line in (self.folder / f"{UP}.log").read_text(errors="replace").splitlines():
            if '"process died, restarting it"' in line:
                deaths[json.loads(line)["name"]] += 1
        for part, n in deaths.items():
            if n > self._caused[part]:
                self.unexpected.append(f"{part} under up died {n} times, {self._caused[part]} times by a fault")

    def complaints(self) -> list[str]:
        """Lines of the logs that tell of an error; what dies, freezes or is away is a warning at most."""
        return [
            f"{path.name}: {line[:2000]}"
            for path in self.folder.glob("*.log")
            for line in path.read_text(errors="replace").splitlines()
            if COMPLAINT.search(line) and not HARMLESS.search(line) and not self._is_held_up(line)
        ]

    def _is_held_up(self, line: str) -> bool:
        if not HELD_UP.search(line) or not line.startswith("{"):
            return False
        told = datetime.fromisoformat(json.loads(line)["timestamp"])
        waiting = told - timedelta(seconds=LOCK_DEADLINE_S)
        return any(began < told and waiting < ended for began, ended in self._freezes)

    def leftovers(self) -> list[str]:
        """Processes that were started for this run and are still there."""
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
