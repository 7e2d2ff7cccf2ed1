"""`llamalith worker` with the fake engine; everything else is the product's.

python -m tests.chaos.worker --data-dir DATA_DIR --script SCRIPT --models NAME,NAME --grace S --parent-fd FD
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import uvloop

from llamalith_app.commands.process import begin
from llamalith_app.jobs.worker.process import local_engines
from llamalith_app.jobs.worker.run import run
from tests import fake_engine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.worker")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--models", required=True, help="of the configured ones, those of this worker")
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--parent-fd", type=int, required=True)
    options = parser.parse_args()
    os.environ["LLM_MODELS"] = options.models
    config = begin("worker", options.data_dir, options.parent_fd)
    engines = local_engines(config, fake_engine.argv(options.script))
    uvloop.run(run(config, grace_s=options.grace, engines=engines, supervised=True))


if __name__ == "__main__":
    main()
