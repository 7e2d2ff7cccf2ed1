"""The product's processes on this machine: started, started again when they die, killed, frozen and drained.

Parts are found by the pids that this object started, and their engines as their children; nothing else is touched.
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

from llamalith_app import up, valkey
from llamalith_app.store.database import LOCK_DEADLINE_S
from tests.chaos.faults import REAL_WORKER, VALKEY, WEBS, WORKERS, Fault
from tests.product.conftest import clean_environ, free_port

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-chaos"
FAKE_MODELS = ("fake-a", "fake-b")
REAL_MODEL = "smollm2"
GRACE_S = 3.0
READY_S = 60.0
FLUSH_S = 2.0
END_S = 30.0

COMPLAINT = re.compile(r'"level":"(error|critical)"|^Traceback')
HARMLESS = re.compile(r"Upkeep task failed unexpectedly|_GatheringFuture exception was never retrieved.*CancelledError")
"""SAQ's own, where Redis is away while it looks after its hints, or while it ends. Nothing depends on either."""
HELD_UP = re.compile(r"database is locked|ended before it could give back its jobs")
"""Right while one that was frozen in the middle of a write holds the lock, and wrong otherwise."""

SCRIPT = [
    {"when": "slow", "step_s": 0.01},
    {"when": "quick", "step_s": 0.0005},
    {"when": "", "step_s": 0.002},
]
"""Seconds that a token takes by the word in its prompt; a reply has 64 of them."""


class Part(NamedTuple):
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
        self._freezes: list[tuple[datetime, datetime]] = []
        """From when to when something was frozen that may have held the lock of the database."""
        self._ending = False
        self._parts = self._make_parts()

    def _make_parts(self) -> dict[str, Part]:
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
        parts = {
            name: Part(up.command("web", "--port", str(port), *data_dir, *parent), environ)
            for name, port in self.ports.items()
        }
        fake = (sys.executable, "-m", "tests.chaos.worker", str(self.data_dir), str(script), str(GRACE_S))
        for name in WORKERS:
            parts[name] = Part((*fake, str(self._parent_fd)), environ | {"LLM_MODELS": ",".join(FAKE_MODELS)})
        if self._with_real:
            worker = up.command("worker", "--grace", str(GRACE_S), *data_dir, *parent)
            parts[REAL_WORKER] = Part(worker, environ | {"LLM_MODELS": REAL_MODEL})
        folder = self.data_dir / "valkey"
        self._socket = folder / "valkey.sock"
        parts[VALKEY] = Part(
            tuple(valkey.argv(valkey.find_binary(), folder=folder, socket=self._socket)), dict(os.environ)
        )
        return parts

    async def run_once(self, *arguments: str) -> tuple[int, str]:
        """One of the product's commands, to its end."""
        process = await asyncio.create_subprocess_exec(
            *up.command(*arguments, "--data-dir", str(self.data_dir)),
            cwd=self.folder,
            env=self._parts[WEBS[0]].environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        return process.returncode or 0, told.decode()

    async def start(self) -> None:
        """All parts; the database must be there."""
        valkey.make_folders(folder=self.data_dir / "valkey", socket=self._socket)
        for name in (VALKEY, *(name for name in self._parts if name != VALKEY)):
            self._keepers[name] = asyncio.create_task(self._keep(name))
        await self.until_ready()

    async def until_ready(self) -> None:
        """Everything runs and says that it can serve; what does not is told as unexpected."""
        try:
            async with asyncio.timeout(READY_S):
                await up.until(self._is_ready)
        except TimeoutError:
            down = [name for name in self._parts if name not in self._processes]
            deaf = [name for name, port in self.ports.items() if not await up.serves("127.0.0.1", port)]
            self.unexpected.append(f"after {READY_S} s these are not there: {down}, and these not ready: {deaf}")

    async def _is_ready(self) -> bool:
        return (
            len(self._processes) == len(self._parts)
            and not self._down_s
            and all([await up.serves("127.0.0.1", port) for port in self.ports.values()])
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
                    pass_fds=() if name == VALKEY else (self._parent_fd,),
                    start_new_session=True,
                    preexec_fn=valkey.dies_with_parent() if name == VALKEY else None,
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
        process = self._processes.get(fault.target)
        if process is None or process.returncode is not None or fault.target in self._down_s:
            return False
        if fault.target in self._frozen and fault.act != "kill engine":
            # It would never find out, as it must, that others took over meanwhile.
            return False
        if fault.act == "kill engine":
            pids = self._engines(process.pid)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if pids:
                self.counts[f"SIGKILL engine of {fault.target}"] += len(pids)
            return bool(pids)
        if fault.act == "freeze":
            process.send_signal(signal.SIGSTOP)
            self._frozen[fault.target] = asyncio.create_task(self._thaw(fault.target, process, fault.for_s))
            self.counts[f"SIGSTOP {fault.target}"] += 1
            return True
        self._down_s[fault.target] = fault.for_s
        number = signal.SIGKILL if fault.act == "kill" else signal.SIGTERM
        process.send_signal(number)
        self.counts[f"{number.name} {fault.target}"] += 1
        return True

    async def calm(self) -> None:
        """Thaws what is frozen, and waits until everything runs again."""
        for task in list(self._frozen.values()):
            await task
        await self.until_ready()

    async def _thaw(self, name: str, process: asyncio.subprocess.Process, for_s: float) -> None:
        began = datetime.now(UTC)
        try:
            async with asyncio.timeout(for_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
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
        """Drains the parts of the product, ends Valkey, and kills what does not end."""
        self._ending = True
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
        for names in (set(self._keepers) - {VALKEY}, {VALKEY}):
            for number in (signal.SIGTERM, signal.SIGABRT, signal.SIGKILL):
                left = [name for name in names if name in self._processes]
                for name in left:
                    self._processes[name].send_signal(number)
                    if number is signal.SIGABRT:
                        pid = self._processes[name].pid
                        self.unexpected.append(f"{name} (pid {pid}) did not end on SIGTERM within {END_S} s")
                if left:
                    await asyncio.wait([self._keepers[name] for name in left], timeout=END_S)
        os.close(self._alive_fd)
        os.close(self._parent_fd)

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
                if any(word.startswith(bytes(self.folder)) for word in words):
                    found.append(f"pid {path.parent.name}: {b' '.join(words).decode(errors='replace')}")
        return found


def kills(counts: Mapping[str, int]) -> int:
    return sum(n for name, n in counts.items() if name.startswith("SIGKILL"))
