"""P6: from a job's 2xx to its start, with an idle worker and a loaded model, one job at a time.

Uses the job's own times. `created_at` is taken before the commit that the 2xx waits for, and `started_at` before the
commit of the claim, so the figure includes the submit's wait for the disk.
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
