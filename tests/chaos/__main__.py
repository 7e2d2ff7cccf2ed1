"""`make chaos`: kills processes under load, and checks that each request answered 2xx gets exactly one answer.

    python -m tests.chaos [--seconds 600] [--seed N] [--real-share 0.05]

It runs `llamalith up`, whose worker uses the deterministic fake engine. Beside it, on the same data, run a second web
and two workers, one with the fake engine and one with the real small model. Exit code 1 means that a promise was
broken; the folder with logs, history and database is then kept.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
import time
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path

from tests.chaos.run import run

SHOWN = 20
"""Violations printed for each rule, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=600, help="of faults")
    parser.add_argument("--seed", type=int, default=None, help="default: from the time")
    parser.add_argument(
        "--real-share", type=float, default=0.05, help="of submits to the real model; 0: no such worker"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    options = parser.parse_args()
    # A run that is started under nohup would hand its ignored SIGHUP on to the product.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    seed = int(time.time()) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="llamalith-chaos-"))
    print(f"seed {seed}; in {folder}", flush=True)
    result = asyncio.run(run(folder, seed=seed, seconds=options.seconds, real_share=options.real_share))
    for rule, violations in groupby(result.violations, attrgetter("rule")):
        print(f"VIOLATION {rule}")
        for violation in islice(violations, SHOWN):
            print(f"    {violation.what}")
    print(result.report)
    if result.violations:
        print(f"{len(result.violations)} violations; everything is kept in {folder}")
        sys.exit(1)
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
