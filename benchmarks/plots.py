"""Draws docs/images/throughput.svg from figures.json: each server's share of what its card allows, row by row.

pip install matplotlib && python -m benchmarks.plots
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.floors import ALL_BYTES, floor

FIGURES = Path(__file__).with_name("figures.json")
OUT = Path(__file__).parent.parent / "docs" / "images" / "throughput.svg"
COLOURS = {"vLLM": "#9aa5b1", "SGLang": "#5f7f9e", "loraplex": "#d1603d"}


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "loraplex", "font.family": "sans-serif", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figures = json.loads(FIGURES.read_text())
    rows = figures["rows"]
    figure, axes = pyplot.subplots(figsize=(11, 4.4))
    width = 0.8 / len(COLOURS)
    for number, (server, colour) in enumerate(COLOURS.items()):
        card = figures["servers"][server]["card"]
        places = [place + number * width for place in range(len(rows))]
        shares = [
            row[server] / floor(row["concurrency"], row["adapters"] * ALL_BYTES, **figures["cards"][card])
            for row in rows
        ]
        bars = axes.bar(places, shares, width * 0.92, label=f"{server}, {card}", color=colour)
        axes.bar_label(bars, [f"{row[server]:,}" for row in rows], fontsize=7, padding=2)
    axes.set_xticks([place + width for place in range(len(rows))], [row["row"] for row in rows], fontsize=8)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("share of the card's floor")
    axes.set_title("Output tokens/s (on the bars) against what each card allows", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize=8)
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
