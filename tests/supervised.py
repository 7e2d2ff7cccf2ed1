"""A supervisor as a process, for the tests of supervision.

supervised.py RUN_DIR GRACE_S NAME=MODE...   runs one process for each (`managed.py`); valkey=FOLDER is a real one
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from llamalith_app import logs
from llamalith_app.settings.config import Config
from llamalith_app.supervise import up, valkey

MANAGED = str(Path(__file__).with_name("managed.py"))


def managed_process(name: str, mode: str, *, run_dir: Path) -> up.ManagedProcess:
    if name == "valkey":
        folder = Path(mode)
        socket = folder / "valkey.sock"
        valkey.make_folders(folder=folder, socket=socket)
        argv = valkey.argv(valkey.find_binary(), folder=folder, socket=socket)
        return up.ManagedProcess("valkey", tuple(argv), drains=False)
    return up.ManagedProcess(name, (sys.executable, MANAGED, name, mode, str(run_dir)), drains=mode != "tool")


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


if __name__ == "__main__":
    logs.start("up", Config(data_dir=Path(sys.argv[1]), log_format="json"))
    sys.exit(asyncio.run(supervise(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])))
