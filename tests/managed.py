"""A small process that the tests' supervisor manages. It imports little: they start many.

    managed.py NAME MODE RUN_DIR [--parent-fd N]

It reports what happens to it on the standard output that all of them share: `NAME WORD PID`. A test waits for a line,
or reads to the end of the output to wait until every process is gone. Modes:

    drains    ends on SIGTERM                        refuses   ends with exit code 2
    stubborn  ignores SIGTERM                        wavers    ends with exit code 2 from its second run on
    clings    ignores that its parent is gone        tool      as drains, but stopped after the others
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from llamalith_app.supervise import parent


def run(name: str, mode: str, run_dir: Path, parent_fd: int | None) -> None:
    def report(word: str) -> None:
        os.write(1, f"{name} {word} {os.getpid()}\n".encode())

    def on_term(*_: object) -> None:
        report("terminated")
        if mode != "stubborn":
            os._exit(0)

    def on_gone() -> None:
        report("orphaned")
        os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    if parent_fd is not None and mode != "clings":
        parent.watch(parent_fd, on_gone)
    second_run = run_dir / f"{name}.ran"
    if mode == "refuses" or (mode == "wavers" and second_run.exists()):
        report("refused")
        sys.exit(2)
    second_run.touch()
    # Unlike signal.pause, a read misses no signal that came just before it.
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    report("started")
    while True:
        os.read(signals, 1)


if __name__ == "__main__":
    _, name, mode, run_dir, *rest = sys.argv
    run(name, mode, Path(run_dir), int(rest[1]) if rest else None)
