"""P9: jobs that alternate between two models of which only one fits the memory budget.

Loads are counted in the worker's log; waits are the jobs' times from `created_at` to `started_at`. All jobs are
accepted at once, so in any order the last one waits for all the others. The waits are compared with `max_wait_s` of
class `normal`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import prompts
from bench.product import GREEDY, running
from bench.table import Row

MAX_TOKENS = 16
N_CTX = 1024
N_SLOTS = 8
BUDGET_MB = 700
"""One model with KV cache and engine is estimated at some 510 MiB, so two do not fit."""
MAX_WAIT_S = 120
MAX_LOADS = 6


async def two_that_do_not_fit(folder: Path, model: Path, n_jobs: int) -> Row:
    folder.mkdir()
    names = ("one", "two")
    for name in names:
        shutil.copyfile(model, folder / f"{name}.gguf")
    async with running(folder, _config(folder, names)) as product:
        asked = [messages[-1].content for messages in prompts.short("models", n_jobs)]
        job_ids = [
            await product.submit(content, model=names[n % 2], max_tokens=MAX_TOKENS) for n, content in enumerate(asked)
        ]
        ended = await asyncio.gather(*(product.ended(job_id, poll_s=2) for job_id in job_ids))
        n_loads = len(product.logged("model loaded"))
    longest = max(_wait_s(job) for job in ended)
    return Row(
        "P9",
        f"{n_jobs} jobs alternating between two models of which one fits",
        f"{n_jobs} loads, first in, first out",
        f"{n_loads} loads, longest wait {longest:.0f} s",
        "",
        f"≤ {MAX_LOADS} loads, no wait > {MAX_WAIT_S} s",
        n_loads <= MAX_LOADS and longest <= MAX_WAIT_S,
    )


def _config(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "available_models": names,
        "model_paths": {name: str(folder / f"{name}.gguf") for name in names},
        "model_settings": {name: GREEDY | {"n_ctx": N_CTX} for name in names},
        "worker_settings": {"worker_count": N_SLOTS},
        "memory_budget_mb": BUDGET_MB,
        "max_wait_s": {"normal": MAX_WAIT_S},
    }


def _wait_s(job: Mapping[str, Any]) -> float:
    created, started = (datetime.fromisoformat(job[name]) for name in ("created_at", "started_at"))
    return (started - created).total_seconds()
