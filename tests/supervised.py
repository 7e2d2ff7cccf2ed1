"""Real processes for the tests of supervision: a supervisor, and the small processes that it manages.

    supervised.py supervise RUN_DIR GRACE_S NAME=MODE...      runs one process for each; valkey=FOLDER is a real one
    supervised.py managed NAME MODE RUN_DIR [--parent-fd N]   a process that it runs

A managed process reports what happens to it on the standard output that all of them share: `NAME WORD PID`. A test
waits for a line, or reads to the end of the output to wait until every process is gone. Modes:

    drains    ends on SIGTERM                        refuses   ends with exit code 2
    stubborn  ignores SIGTERM                        wavers    ends with exit code 2 from its second run on
    clings    ignores that its parent is gone        tool      as drains, but stopped after the others
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from llamalith_app import logs
from llamalith_app.settings.config import Config
from llamalith_app.supervise import parent, up, valkey


def managed_process(name: str, mode: str, *, run_dir: Path) -> up.ManagedProcess:
    if name == "valkey":
        folder = Path(mode)
        socket = folder / "valkey.sock"
        valkey.make_folders(folder=folder, socket=socket)
        argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket)
        return up.ManagedProcess("valkey", tuple(argv), drains=False)
    return up.ManagedProcess(
        name, (sys.executable, __file__, "managed", name, mode, str(run_dir)), drains=mode != "tool"
    )


async def supervise(run_dir: Path, grace_s: float, pairs: list[str]) -> int:
    supervisor = up.Supervisor(run_dir, grace_s=grace_s, stop_margin_s=2.0)

    async def work() -> None:
        processes = [managed_process(*pair.split("=", 1), run_dir=run_dir) for pair in pairs]
        for managed in processes:
            await supervisor.stop_leftover(managed.name)
        try:
            async with asyncio.TaskGroup() as keepers:
                for managed in processes:
                    keepers.create_task(supervisor.keep_running(managed))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    return await supervisor.run(work())


def run_managed(name: str, mode: str, run_dir: Path, parent_fd: int | None) -> None:
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
    if sys.argv[1] == "supervise":
        logs.start("up", Config(data_dir=Path(sys.argv[2]), log_format="json"))
        sys.exit(asyncio.run(supervise(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])))
    _, _, name, mode, run_dir, *rest = sys.argv
    run_managed(name, mode, Path(run_dir), int(rest[1]) if rest else None)
