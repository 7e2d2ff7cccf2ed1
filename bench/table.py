"""Figures as a table: medians and best values of alternating measurements, their ratio, and the goal. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

HEAD = (
    "",
    "figure",
    "other: median (best)",
    "product: median (best)",
    "product / other: medians (bests)",
    "goal",
    "met",
)

Better = Literal["more", "less"]
T = TypeVar("T")


class Row(NamedTuple):
    number: str
    what: str
    other: str
    product: str
    ratio: str
    goal: str
    is_met: bool | None
    """None if there is no goal, or if nothing was measured."""


async def alternate(n_pairs: int, contenders: Mapping[str, Callable[[int], Awaitable[T]]]) -> dict[str, list[T]]:
    """A B A B …: in every pair calls each contender with the number of the pair."""
    seen: dict[str, list[T]] = {name: [] for name in contenders}
    for pair in range(n_pairs):
        for name, measure in contenders.items():
            seen[name].append(await measure(pair))
    return seen


def compared(
    number: str,
    what: str,
    other: Sequence[float],
    product: Sequence[float],
    *,
    unit: str,
    better: Better,
    goal: float,
) -> Row:
    """A row whose goal is a ratio of medians: a minimum if more is better, else a maximum."""
    ratio = statistics.median(product) / statistics.median(other)
    bests = best(product, better) / best(other, better)
    sign, is_met = ("≥", ratio >= goal) if better == "more" else ("≤", ratio <= goal)
    return Row(
        number,
        what,
        formatted(other, unit, better),
        formatted(product, unit, better),
        f"{ratio:.2f} ({bests:.2f})",
        f"{sign} {goal}",
        is_met,
    )


def formatted(values: Sequence[float], unit: str, better: Better) -> str:
    return f"{short(statistics.median(values))} ({short(best(values, better))}) {unit}"


def best(values: Sequence[float], better: Better) -> float:
    return max(values) if better == "more" else min(values)


def percentile(values: Sequence[float], percent: int) -> float:
    """The percentile; of a single value, that value."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def short(value: float) -> str:
    """With three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def render(rows: Sequence[Row], head: Sequence[str] = HEAD) -> str:
    """The rows as a Markdown table."""
    cells = [tuple(head), ("---",) * len(head)]
    cells += [(*row[:-1], {True: "yes", False: "**no**", None: ""}[row.is_met]) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
