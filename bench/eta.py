"""How well a job's end is foretold: median of |ETA - actual| / actual, in a mixed trace.

Jobs of all lengths are accepted at once, more than there are slots; every half second each open one is read, with
what its `progress.eta_s` says. At its end each of those is compared with what it really took from then on. What has
less than a second to go is left out.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time

from bench import prompts
from bench.product import ENDED, Product
from bench.table import Row

LOOK_S = 0.5
LEAST_S = 1.0
LENGTHS = (16, 32, 64, 96, 128)


async def eta(product: Product, n_jobs: int) -> Row:
    draw = random.Random("eta")  # noqa: S311 - the same in each run
    job_ids = []
    for number, messages in enumerate(prompts.short("eta", n_jobs)):
        system = prompts.words(f"eta-{number}", draw.choice((0, 0, 60, 250)))
        content, max_tokens = messages[-1].content, draw.choice(LENGTHS)
        job_ids.append(await product.submit(content, max_tokens=max_tokens, system_prompt=system))
    errors, n_silent = [], 0
    for seen in await asyncio.gather(*(_followed(product, job_id) for job_id in job_ids)):
        ended_at = seen[-1][0]
        for at, told in seen[:-1]:
            actual = ended_at - at
            if actual >= LEAST_S:
                if told is None:
                    n_silent += 1
                else:
                    errors.append(abs(told - actual) / actual)
    product_told = f"median {statistics.median(errors):.0%}" if errors else "nothing told"
    return Row(
        "ETA",
        f"median error of a told end, {n_jobs} mixed jobs, {len(errors)} looks ({n_silent} more told nothing)",
        "",
        product_told,
        "",
        "told",
        None,
    )


async def _followed(product: Product, job_id: int) -> list[tuple[float, float | None]]:
    """When it was looked at, and in how many seconds its end was told to come; the last: when it had ended."""
    seen: list[tuple[float, float | None]] = []
    while True:
        job = await product.job(job_id)
        seen.append((time.monotonic(), (job["progress"] or {}).get("eta_s")))
        if job["status"] in ENDED:
            return seen
        await asyncio.sleep(LOOK_S)
