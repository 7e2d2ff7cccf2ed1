"""Memory of each process of a running product, and what importing the web application costs.

.venv/bin/python bench/footprint.py [--data-dir ./data]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from llamalith_app import pidfile


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def import_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import llamalith_app.app"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    run_dir = parser.parse_args().data_dir / "run"
    for name in ("up.lock", "web.pid", "worker.pid", "valkey.pid"):
        pid = pidfile.read_pid(run_dir / name) if (run_dir / name).exists() else None
        if pid is not None:
            print(f"{name.partition('.')[0]}: {resident_mb(pid):.0f} MB")
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if name == "worker.pid":
                    print(f"engine: {resident_mb(int(child)):.0f} MB")
    print(f"importing the web application: {min(import_s() for _ in range(5)):.2f} s (best of 5)")


if __name__ == "__main__":
    main()
