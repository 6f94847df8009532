"""Draws docs/images/throughput.svg from h200.json: each server's share of what the machine allows, row by row.

pip install matplotlib && python -m benchmarks.plots
"""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = Path(__file__).with_name("h200.json")
OUT = Path(__file__).parent.parent / "docs" / "images" / "throughput.svg"
COLOURS = {"vLLM": "#9aa5b1", "SGLang": "#5f7f9e", "loraplex": "#d1603d"}


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "loraplex", "font.family": "sans-serif", "svg.fonttype": "none"}
    from matplotlib import pyplot

    rows = json.loads(FIGURES.read_text())["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(COLOURS)
    for number, (server, colour) in enumerate(COLOURS.items()):
        places = [place + number * width for place in range(len(rows))]
        shares = [row[server] / row["floor"] for row in rows]
        bars = axes.bar(places, shares, width * 0.92, label=server, color=colour)
        axes.bar_label(bars, [f"{row[server]:,}" for row in rows], fontsize=7, padding=2)
    axes.set_xticks([place + width for place in range(len(rows))], [row["row"] for row in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the floor")
    axes.set_title("Output tokens/s (on the bars) against what the H200 allows", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
