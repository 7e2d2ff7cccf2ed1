"""P6: from a job's 2xx to its start, the worker idle and the model loaded, one job at a time.

The job's own times are read: `created_at` is taken before the commit that the 2xx waits for, `started_at` before that
of the claim, so the figure holds the accept's wait for the disk too.
"""

from __future__ import annotations

from datetime import datetime

from bench.product import Product
from bench.table import Row, percentile


async def start_after_accept(product: Product, n_jobs: int) -> Row:
    await product.ended(await product.submit("Say hello.", max_tokens=4))
    waits = []
    for _ in range(n_jobs):
        job = await product.ended(await product.submit("Say hello.", max_tokens=4))
        created, started = (datetime.fromisoformat(job[name]) for name in ("created_at", "started_at"))
        waits.append((started - created).total_seconds() * 1000)
    p50, p99 = percentile(waits, 50), percentile(waits, 99)
    return Row(
        "P6",
        f"a job's start after its 2xx, {n_jobs} jobs one after another",
        "",
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms",
        "",
        "p50 ≤ 5 ms, p99 ≤ 25 ms",
        p50 <= 5 and p99 <= 25,
    )
