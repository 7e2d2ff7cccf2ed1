"""P1 to P3 and the curves: output tokens a second, counted in the tokens that were written.

Each server answers the same prompts from the same number of clients, each of which waits for its answer before it asks
again. The time is from the first request to the last end. Replies are greedy and end at MAX_TOKENS or when the model
ends them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from bench import prompts
from bench.client import Message, Round, Server, at_once
from bench.table import Row, alternate, compared
from llamalith_app.engine.runner import cache_type

LEVELS = {1: 2, 2: 4, 4: 8, 8: 16, 16: 32}
"""Jobs at once -> jobs of a round: enough that clients that finish early matter little."""
N_SLOTS = 8
MAX_TOKENS = 64
SHARED_JOBS = 32
SHARED_MAX_TOKENS = 48

Curve = dict[int, list[Round]]


class Bare:
    """`bare_loop.py` as a process: llama.cpp as the product has it, with nothing around it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def write(self, asked: list[list[Message]]) -> float:
        """Tokens a second over all prompts, N_SLOTS at once."""
        texts = [as_chatml(messages) for messages in asked]
        rounds = [await self._round(texts[start : start + N_SLOTS]) for start in range(0, len(texts), N_SLOTS)]
        return sum(tokens for tokens, _ in rounds) / sum(seconds for _, seconds in rounds)

    async def _round(self, texts: list[str]) -> tuple[int, float]:
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("both are pipes")
        self._process.stdin.write(json.dumps({"prompts": texts, "max_tokens": MAX_TOKENS}).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline())
        return answer["tokens"], answer["seconds"]


def as_chatml(messages: list[Message]) -> str:
    """The prompt as the model's template renders it, without its default system prompt of some 20 tokens."""
    turns = "".join(f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in messages)
    return f"{turns}<|im_start|>assistant\n"


@asynccontextmanager
async def bare(model: Path, *, n_ctx: int, n_threads: int) -> AsyncIterator[Bare]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("bare_loop.py")), str(model)),
        *map(str, (N_SLOTS, n_ctx, n_threads, cache_type(0))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"GOMP_SPINCOUNT": "300"},
    )
    if process.stdout is None or await process.stdout.readline() != b"ready\n":
        raise SystemExit("bench/bare_loop.py did not start")
    try:
        yield Bare(process)
    finally:
        process.kill()
        await process.wait()


async def curves(peer: Server, product: Server, n_pairs: int) -> tuple[Curve, Curve]:
    """Rounds of the peer and the product with short prompts, in pairs, for each of LEVELS."""

    async def one(server: Server, level: int, pair: int) -> Round:
        return await at_once(server, prompts.short(f"curve-{level}-{pair}", LEVELS[level]), level, MAX_TOKENS)

    curve: tuple[Curve, Curve] = ({}, {})
    for level in LEVELS:
        if level == N_SLOTS:
            continue
        seen = await alternate(n_pairs, {"peer": partial(one, peer, level), "product": partial(one, product, level)})
        curve[0][level], curve[1][level] = seen["peer"], seen["product"]
    return curve


def curve_rows(peer: Curve, product: Curve) -> list[Row]:
    """These levels have no goal; they are listed beside the picture."""
    rows = []
    for level in sorted(peer):
        other, own = ([one.tokens_a_second for one in curve[level]] for curve in (peer, product))
        what = f"{level} at once, short prompts, {MAX_TOKENS} out; other: llama-server"
        row = compared("", what, other, own, unit="tok/s", better="more", goal=1.0)
        rows.append(row._replace(goal="", is_met=None))
    return rows


async def eight_at_once(
    peer: Server, product: Server, loop: Bare, n_pairs: int
) -> tuple[list[Row], list[Round], list[Round]]:
    """P1 and P3: as many jobs at once as slots; peer, product and bare loop take turns on the same prompts.

    Also returns the rounds of peer and product, for the curves.
    """
    asked = partial(prompts.short, n=LEVELS[N_SLOTS])
    bare_rates: list[float] = []

    async def one(server: Server, pair: int) -> Round:
        return await at_once(server, asked(f"eight-{pair}"), N_SLOTS, MAX_TOKENS)

    async def bare_one(pair: int) -> Round:
        bare_rates.append(await loop.write(asked(f"eight-{pair}")))
        return Round(bare_rates[-1], [])

    contenders: dict[str, Callable[[int], Awaitable[Round]]] = {
        "peer": partial(one, peer),
        "product": partial(one, product),
        "bare": bare_one,
    }
    seen = await alternate(n_pairs, contenders)
    rates = {name: [one.tokens_a_second for one in rounds] for name, rounds in seen.items()}
    rows = [
        compared(
            "P1",
            f"{N_SLOTS} jobs at once, short prompts, {MAX_TOKENS} out; other: llama-server",
            rates["peer"],
            rates["product"],
            unit="tok/s",
            better="more",
            goal=1.0,
        ),
        compared(
            "P3",
            "the same; other: a bare loop over llama_decode",
            rates["bare"],
            rates["product"],
            unit="tok/s",
            better="more",
            goal=0.95,
        ),
    ]
    return rows, seen["peer"], seen["product"]


async def shared_prompt(peer: Server, product: Server, n_pairs: int) -> Row:
    """P2: jobs under one system prompt of 400 tokens, new for each pair; as many at once as slots."""

    async def one(server: Server, pair: int) -> Round:
        asked = prompts.with_system(f"shared-{pair}", SHARED_JOBS)
        return await at_once(server, asked, N_SLOTS, SHARED_MAX_TOKENS)

    seen = await alternate(n_pairs, {"peer": partial(one, peer), "product": partial(one, product)})
    rates = {name: [one.tokens_a_second for one in rounds] for name, rounds in seen.items()}
    return compared(
        "P2",
        f"{SHARED_JOBS} jobs, {N_SLOTS} at once, one new system prompt of 400 tokens, {SHARED_MAX_TOKENS} out; "
        "other: llama-server",
        rates["peer"],
        rates["product"],
        unit="tok/s",
        better="more",
        goal=2.0,
    )
