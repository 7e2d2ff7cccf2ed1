"""Real processes for the tests of supervision: a supervisor of small parts, and a part.

    supervised.py supervise RUN_DIR GRACE_S NAME=MODE...   keeps a part for each; valkey=FOLDER is a real one
    supervised.py part NAME MODE RUN_DIR [--parent-fd N]   what it keeps

Parts say what happens to them on the standard output that all share: `NAME WORD PID`. So a test waits for a
line, and reads to the end of the output to wait until every process is gone. Modes of a part:

    drains    ends on SIGTERM                        refuses   ends with exit code 2
    stubborn  ignores SIGTERM                        wavers    ends with exit code 2 from its second life on
    clings    ignores that its parent is gone        tool      as drains, but not one of ours
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


def part_of(name: str, mode: str, *, run_dir: Path) -> up.ManagedProcess:
    if name == "valkey":
        folder = Path(mode)
        socket = folder / "valkey.sock"
        valkey.make_folders(folder=folder, socket=socket)
        argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket)
        return up.ManagedProcess("valkey", tuple(argv), ours=False)
    return up.ManagedProcess(name, (sys.executable, __file__, "part", name, mode, str(run_dir)), ours=mode != "tool")


async def supervise(run_dir: Path, grace_s: float, pairs: list[str]) -> int:
    supervisor = up.Supervisor(run_dir, grace_s=grace_s)

    async def work() -> None:
        kept = [part_of(*pair.split("=", 1), run_dir=run_dir) for pair in pairs]
        for part in kept:
            await supervisor.replace(part.name)
        try:
            async with asyncio.TaskGroup() as keepers:
                for part in kept:
                    keepers.create_task(supervisor.keep(part))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    return await supervisor.run(work())


def part(name: str, mode: str, run_dir: Path, parent_fd: int | None) -> None:
    def say(word: str) -> None:
        os.write(1, f"{name} {word} {os.getpid()}\n".encode())

    def on_term(*_: object) -> None:
        say("told")
        if mode != "stubborn":
            os._exit(0)

    def on_gone() -> None:
        say("orphaned")
        os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    if parent_fd is not None and mode != "clings":
        parent.watch(parent_fd, on_gone)
    second_life = run_dir / f"{name}.lived"
    if mode == "refuses" or (mode == "wavers" and second_life.exists()):
        say("refused")
        sys.exit(2)
    second_life.touch()
    # Unlike signal.pause, a read misses no signal that came just before it.
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    say("started")
    while True:
        os.read(signals, 1)


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        up.LATE_S = 2.0
        logs.start("up", Config(data_dir=Path(sys.argv[2]), log_format="json"))
        sys.exit(asyncio.run(supervise(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])))
    _, _, name, mode, run_dir, *rest = sys.argv
    part(name, mode, Path(run_dir), int(rest[1]) if rest else None)
