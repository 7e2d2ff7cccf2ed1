"""How soon a job runs again after its worker or engine was killed; real kills, the bundled model.

    .venv/bin/python bench/recovery.py [--kills 5]

Starts a product in a temporary folder. The time is from the kill to the next claim of the same job.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.product.conftest import Product, running
from tests.settle import eventually

STORY = "Write a very long story about a dragon, with every detail of its life."


async def kill(product: Product, what: str, number: int) -> float:
    job_id = await product.submit(STORY, conversation_id=f"{what}-{number}")
    await product.in_phase(job_id, "decode")
    pid = product.pid("worker") if what == "worker" else product.engine_pids()[0]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()

    async def again() -> bool:
        return bool((await product.job(job_id))["attempt"] == 2)

    await eventually(again, within_s=60)
    took = time.monotonic() - killed
    job = await product.ended(job_id)
    if job["status"] != "done":
        raise SystemExit(f"job {job_id} ended as {job['status']}: {job['result']}")
    return took


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder)) as product:
            for what in ("engine", "worker"):
                took = sorted([await kill(product, what, number) for number in range(options.kills)])
                print(f"{what} killed {len(took)} times: claimed again after {took[0]:.2f} to {took[-1]:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
