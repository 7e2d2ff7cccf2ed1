"""`llamalith worker` with the fake engine in place of the real one; everything else is the product's own.

python -m tests.chaos.worker DATA_DIR SCRIPT GRACE_S PARENT_FD
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop

from llamalith_app.commands.process import begin
from llamalith_app.jobs.worker import run
from tests import fake_engine


def main(data_dir: str, script: str, grace_s: str, parent_fd: str) -> None:
    config = begin("worker", Path(data_dir), int(parent_fd))
    uvloop.run(run(config, grace_s=float(grace_s), engine_argv=fake_engine.argv(Path(script))))


if __name__ == "__main__":
    main(*sys.argv[1:])
