"""Draws the curves over load from `{"peer": {"1": [[tok/s], [first_s]], …}, "product": …}` on standard input.

    .venv-bench/bin/python bench/picture.py docs/bench.png

Runs in the peer's environment, which has matplotlib, and imports none of our modules.
"""

import json
import statistics
import sys

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

NAMES = {"peer": "llama-server", "product": "Llamalith"}
STYLES = {"peer": {"color": "#888888", "marker": "s"}, "product": {"color": "#0b6bcb", "marker": "o"}}


def main(path: str) -> None:
    curves = json.load(sys.stdin)
    figure, (rates, firsts) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, curve in curves.items():
        levels = sorted(map(int, curve))
        for axes, column in ((rates, 0), (firsts, 1)):
            values = [curve[str(level)][column] for level in levels]
            medians = [statistics.median(one) for one in values]
            axes.plot(levels, medians, label=NAMES[name], **STYLES[name])
            if column == 0:
                axes.fill_between(
                    levels,
                    [min(one) for one in values],
                    [max(one) for one in values],
                    alpha=0.15,
                    linewidth=0,
                    color=STYLES[name]["color"],
                )
    for axes, title in ((rates, "output tokens a second"), (firsts, "seconds to the first text (median)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.set_xlabel("jobs at once (8 slots)")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
