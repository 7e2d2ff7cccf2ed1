"""Finds out whether anything grows without limit: the whole product under a moderate mixed load for a long time.

    .venv/bin/python -m bench.soak [--seconds 3600] [--every 10] [--clients 4]

Starts `llamalith up` with the real small model in a folder of its own. Clients submit, follow, cancel, leave streams
and list jobs. Every so many seconds it reads each process's memory, descriptors and threads, the keys and memory of
Redis, and the size of the write-ahead log. At the end a straight line is fitted to each figure, without the first ten
minutes (a third, if the run is shorter): its rise in an hour, with the 95 % interval as if samples were independent. A
goal is missed if even the lower end of the interval exceeds it; the program then exits with 1. The goal for memory is
about the resident set: the proportional set also depends on other programs that use the same files.

Below half an hour the lines mean little: caches still fill, and Redis keeps a job's stream for ten minutes, so that its
keys and memory have a goal only if the first ten minutes are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from redis.asyncio import Redis

from bench.client import events
from bench.footprint import memory_mb
from bench.product import ENDED, GREEDY, Product, children_of, running
from bench.table import Row, render, short
from llamalith_app.settings.paths import valkey_socket
from llamalith_app.supervise import pidfile

WARM_UP_S = 600
MAX_TOKENS = 32
TURNS = 8
"""Turns of a conversation before a new one begins."""
EVERY_S = 2.0
"""Average time from one operation of a client to its next. A late client catches up: the amount of work, and with it
what Redis keeps, must not depend on how busy the machine is."""
MAX_WAL_MB = 64
GOALS = {"web": 1.0, "engine": 5.0}
"""Allowed growth, in MiB an hour; OTHERS for all other figures."""
OTHERS = 1.0
OF_REDIS = (("valkey", "MiB"), ("Redis", "keys"), ("Redis", "MiB used"))
ENGINE = "llamalith_app.engine"


class Sample(NamedTuple):
    at: float
    """Seconds since the start."""
    pids: dict[str, int]
    """By the name of the process."""
    figures: dict[tuple[str, str], float]
    """(process, what) -> how much."""


class Line(NamedTuple):
    """A straight line fitted to figures over time."""

    an_hour: float
    margin: float
    """Half of its 95 % interval."""


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Fits a line to at least three points of (seconds, figure)."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in points)
    error = math.sqrt(rest / (len(points) - 2) / spread)
    return Line(slope * 3600, 1.96 * error * 3600)


class Load:
    """Clients that each do one operation after another, and their counts."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._numbers = itertools.count()
        self.done: dict[str, int] = {}

    async def client(self, until: float) -> None:
        due = time.monotonic()
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            what = random.choices(("follow", "cancel", "leave", "read"), (60, 10, 10, 20))[0]  # noqa: S311 - no secret
            await getattr(self, f"_{what}")()
            self.done[what] = self.done.get(what, 0) + 1
            due += random.expovariate(1 / EVERY_S)

    async def _submit(self) -> int:
        number = next(self._numbers)
        return await self._product.submit(
            f"Tell me something about the number {number}.",
            conversation_id=f"soak-{number // (4 * TURNS)}-{number % 4}",
            system_prompt="You are brief.",
            max_tokens=MAX_TOKENS,
        )

    async def _follow(self) -> None:
        job_id = await self._submit()
        async with self._product.api.stream("GET", f"/api/jobs/{job_id}/events") as answer:
            last = [name async for name, _ in events(answer)][-1]
        if last != "done":
            raise SystemExit(f"job {job_id} ended as {last}")

    async def _cancel(self) -> None:
        job_id = await self._submit()
        await self._until_text(job_id)
        answer = await self._product.api.post(f"/api/jobs/{job_id}/cancel")
        if answer.status_code not in (200, 409):
            raise SystemExit(f"cancel: {answer.status_code} {answer.text}")

    async def _leave(self) -> None:
        await self._until_text(await self._submit())

    async def _until_text(self, job_id: int) -> None:
        async with self._product.api.stream("GET", f"/api/jobs/{job_id}/events") as answer:
            async for name, _ in events(answer):
                if name in ("delta", *ENDED):
                    return

    async def _read(self) -> None:
        number = next(self._numbers)
        for path in ("/api/jobs?limit=100", f"/api/conversations/soak-{number // (4 * TURNS)}-0/latest", "/api/models"):
            answer = await self._product.api.get(path)
            if answer.status_code != 200:
                raise SystemExit(f"{path}: {answer.status_code} {answer.text}")


async def sample(data_dir: Path, redis: Redis, at: float) -> Sample:
    pids = parts(data_dir)
    figures: dict[tuple[str, str], float] = {}
    for part, pid in pids.items():
        figures[part, "MiB"] = memory_mb(pid, "Rss")
        figures[part, "MiB proportional"] = memory_mb(pid, "Pss")
        figures[part, "descriptors"] = _n_in(f"/proc/{pid}/fd")
        figures[part, "threads"] = _n_in(f"/proc/{pid}/task")
    figures["Redis", "keys"] = await redis.dbsize()
    figures["Redis", "MiB used"] = (await redis.info("memory"))["used_memory"] / 2**20
    wal = data_dir / "llamalith.db-wal"
    figures["SQLite", "MiB of WAL"] = wal.stat().st_size / 2**20 if wal.exists() else 0.0
    return Sample(at, pids, figures)


def _n_in(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def parts(data_dir: Path) -> dict[str, int]:
    files = {"up": "up.lock", "web": "web.pid", "worker": "worker.pid", "valkey": "valkey.pid"}
    found = {part: pid for part, name in files.items() if (pid := pidfile.read_pid(data_dir / "run" / name))}
    for child in children_of(found["worker"]):
        argv = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if ENGINE in argv:
            found["engine"] = child
    return found


def rows(samples: Sequence[Sample], warm_up_s: float) -> list[Row]:
    warm = [one for one in samples if one.at >= warm_up_s]
    found = []
    for key in samples[-1].figures:
        part, what = key
        points = [(one.at, one.figures[key]) for one in warm if key in one.figures]
        values = [value for _, value in points]
        seen = line(points)
        goal, is_met = "", None
        if what == "MiB of WAL":
            goal, is_met = f"≤ {MAX_WAL_MB} at most", max(values) <= MAX_WAL_MB
        elif what != "MiB proportional" and (warm_up_s >= WARM_UP_S or key not in OF_REDIS):
            most = most_an_hour(part, what, statistics.median(values))
            goal, is_met = f"≤ {short(most)} an hour", seen.an_hour - seen.margin <= most
        found.append(
            Row(
                part,
                what,
                short(values[0]),
                f"{short(values[-1])}, at most {short(max(values))}",
                f"{seen.an_hour:+.2f} ± {seen.margin:.2f}",
                goal,
                is_met,
            )
        )
    return found


def most_an_hour(part: str, what: str, median: float) -> float:
    """Keys come and go with the jobs of the last ten minutes, so a tenth more or less means nothing."""
    if what == "MiB":
        return GOALS.get(part, OTHERS)
    return 0.1 * median if what == "keys" else 1.0


def restarts(samples: Sequence[Sample]) -> list[str]:
    """The names of processes that were restarted."""
    pids: dict[str, set[int]] = {}
    for one in samples:
        for part, pid in one.pids.items():
            pids.setdefault(part, set()).add(pid)
    return [part for part, seen in pids.items() if len(seen) > 1]


async def soak(folder: Path, options: argparse.Namespace) -> bool:
    """Prints the table; returns whether every goal was met."""
    async with running(folder, {"model_settings": {"smollm2": GREEDY}}) as product:
        data_dir = folder / "data"
        await product.ended(await product.submit("Say hello.", max_tokens=4))
        load = Load(product)
        samples: list[Sample] = []
        started = time.monotonic()
        async with Redis(unix_socket_path=str(valkey_socket(data_dir))) as redis, asyncio.TaskGroup() as tasks:
            for _ in range(options.clients):
                tasks.create_task(load.client(started + options.seconds))
            while (at := time.monotonic() - started) < options.seconds:
                samples.append(await sample(data_dir, redis, at))
                if len(samples) % 6 == 1:
                    memory = ", ".join(f"{part} {samples[-1].figures[part, 'MiB']:.1f}" for part in samples[-1].pids)
                    print(f"{at:.0f} s: {sum(load.done.values())} done; MiB: {memory}", flush=True)
                await asyncio.sleep(options.every)
        errors = [line for line in (folder / "log").read_text().splitlines() if '"level": "error"' in line]
    warm_up_s = min(WARM_UP_S, options.seconds / 3)
    found = rows(samples, warm_up_s)
    counted = ", ".join(f"{n} {what}" for what, n in sorted(load.done.items()))
    print(f"\n{options.seconds:.0f} s, {counted}; lines from {warm_up_s:.0f} s on, load {os.getloadavg()[0]:.1f}\n")
    print(render(found, ("part", "", f"after {warm_up_s:.0f} s", "at the end", "an hour", "goal", "met")))
    again = restarts(samples)
    print(f"\nstarted again meanwhile: {', '.join(again) or 'none'}; lines of errors in the log: {len(errors)}")
    print(*errors[:5], sep="\n")
    return not again and not errors and all(row.is_met is not False for row in found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--every", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    if options.seconds < 9 * options.every:
        parser.error("--seconds: at least nine samples are needed")
    with tempfile.TemporaryDirectory(prefix="llamalith-soak-") as folder:
        is_good = asyncio.run(soak(Path(folder), options))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
