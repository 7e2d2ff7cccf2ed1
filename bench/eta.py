"""How accurate ETAs are: the median of |ETA - actual| / actual in a mixed load.

More jobs than slots, of all lengths, are submitted at once. Every half second each open job is read with its
`progress.eta_s`. After its end each of these ETAs is compared with the time that it really took from then on. ETAs with
less than a second to go are left out.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time

from bench import prompts
from bench.product import ENDED, Product
from bench.table import Row

POLL_S = 0.5
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
        for at, eta_s in seen[:-1]:
            actual = ended_at - at
            if actual >= LEAST_S:
                if eta_s is None:
                    n_silent += 1
                else:
                    errors.append(abs(eta_s - actual) / actual)
    found = f"median {statistics.median(errors):.0%}" if errors else "no ETA"
    return Row(
        "ETA",
        f"median error of an ETA, {n_jobs} mixed jobs, {len(errors)} readings ({n_silent} more without an ETA)",
        "",
        found,
        "",
        "shown",
        None,
    )


async def _followed(product: Product, job_id: int) -> list[tuple[float, float | None]]:
    """(time of the reading, ETA in seconds) for each reading; the last has the time of the end."""
    seen: list[tuple[float, float | None]] = []
    while True:
        job = await product.job(job_id)
        seen.append((time.monotonic(), (job["progress"] or {}).get("eta_s")))
        if job["status"] in ENDED:
            return seen
        await asyncio.sleep(POLL_S)
