"""P10: how long a token takes from the engine to a client.

From the moment when the engine process makes the frame of a step (noted by `stamped/sitecustomize.py` on the machine's
monotonic clock) to the arrival of the event with the token at an HTTP client on the same machine. On the way are the
worker, which joins the tokens of 40 ms, Valkey and the web process. Jobs and noted sequences are matched by their token
ids. The time that a browser needs to paint is not included.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from bench import prompts
from bench.client import events
from bench.product import Product, running
from bench.table import Row, percentile

MAX_TOKENS = 96
AT_ONCE = 4

Times = list[tuple[int, float]]
"""Token ids with the time of each, in seconds."""


async def token_to_client(folder: Path, config: dict[str, Any], n_rounds: int) -> Row:
    stamps = folder / "stamps"
    path = filter(None, (str(Path(__file__).with_name("stamped")), os.environ.get("PYTHONPATH")))
    environ = {"PYTHONPATH": os.pathsep.join(path), "BENCH_STAMPS": str(stamps)}
    arrived: list[Times] = []
    async with running(folder, config, **environ) as product:
        await product.ended(await product.submit("Say hello.", max_tokens=4))
        for number in range(n_rounds):
            asked = prompts.short(f"stream-{number}", AT_ONCE)
            arrived += await asyncio.gather(*(_follow(product, one[-1].content) for one in asked))
    delays = _delays(_made(stamps), arrived)
    p50, p99 = percentile(delays, 50), percentile(delays, 99)
    return Row(
        "P10",
        f"a token from the engine to an HTTP client, {AT_ONCE} jobs at once, {len(delays)} tokens",
        "",
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        "",
        "p99 ≤ 60 ms",
        p99 <= 60,
    )


async def _follow(product: Product, content: str) -> Times:
    job_id = await product.submit(content, max_tokens=MAX_TOKENS)
    times: Times = []
    async with product.api.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        async for _, data in events(answer):
            times += [(token, time.monotonic()) for token in data.get("tokens", ())]
    return times


def _made(stamps: Path) -> list[Times]:
    """When the tokens of each sequence were made."""
    made: dict[int, Times] = {}
    for line in stamps.read_text().splitlines():
        at, sequences = json.loads(line)
        for sequence_id, tokens in sequences:
            made.setdefault(sequence_id, []).extend((token, at) for token in tokens)
    return list(made.values())


def _delays(made: list[Times], arrived: list[Times]) -> list[float]:
    """Milliseconds of every token. Raises SystemExit if a stream has tokens that no engine wrote."""
    by_tokens = {tuple(token for token, _ in times): times for times in made}
    delays = []
    for times in arrived:
        written = by_tokens.get(tuple(token for token, _ in times))
        if written is None:
            raise SystemExit("the tokens of an event stream are not those of the engine")
        delays += [1000 * (there - here) for (_, there), (_, here) in zip(times, written, strict=True)]
    return delays
