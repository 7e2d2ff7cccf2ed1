"""P11: memory and CPU of the product while it is idle and no model is loaded.

Memory is the sum over all processes of the proportional set (shared pages are counted once) and of the resident set.
CPU is the time that all processes spent on a core in so many idle seconds.

    .venv/bin/python -m bench.footprint [--data-dir ./data]

prints the same for a product that runs, process by process, and how long the import of the web application takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.product import Product, pids_in
from bench.table import Row

SETTLE_S = 3.0


async def idle(product: Product, seconds: float) -> Row:
    await asyncio.sleep(SETTLE_S)
    pids = product.pids()
    before = sum(map(busy_s, pids))
    await asyncio.sleep(seconds)
    share = (sum(map(busy_s, pids)) - before) / seconds
    proportional, resident = (sum(memory_mb(pid, name) for pid in pids) for name in ("Pss", "Rss"))
    return Row(
        "P11",
        f"everything idle, no model loaded, {len(pids)} processes, {seconds:.0f} s",
        "",
        f"{proportional:.0f} MB ({resident:.0f} MB with shared pages counted each time), {share:.1%} of a core",
        "",
        "≤ 250 MB, ≤ 1 % of a core",
        proportional <= 250 and share <= 0.01,
    )


def memory_mb(pid: int, name: str) -> float:
    """MiB of the process. `name`: Pss or Rss."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no {name}")


def busy_s(pid: int) -> float:
    """CPU seconds of the process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def import_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import llamalith_app.app"], check=True)
    return time.perf_counter() - started


def named(pids: Sequence[int]) -> None:
    for pid in pids:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        name = " ".join(word for word in argv[:6] if not word.startswith(("-", "/")))
        print(f"{pid} {name or argv[0]}: {memory_mb(pid, 'Pss'):.0f} MB ({memory_mb(pid, 'Rss'):.0f} MB resident)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    named(pids_in(parser.parse_args().data_dir))
    print(f"importing the web application: {min(import_s() for _ in range(5)):.2f} s (best of 5)")


if __name__ == "__main__":
    main()
