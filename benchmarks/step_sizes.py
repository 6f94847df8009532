"""What a step takes by its tokens: the engine's own CUDA graphs, replayed at every size. Without HTTP or scheduling.

    python -m benchmarks.step_sizes MODEL --adapters DIR --decoding 0,64,128,256

For each number of decoding sequences, and each size that graphs are captured for: ms without LoRA, with one adapter for
all, and with another one for each sequence; the rest of the size is one prompt. From these figures follow the bounds
of service/engine/budgets.py.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

from benchmarks.engine import Driver, driving
from benchmarks.step_case import Case
from service.engine.budgets import STEP_SIZES
from service.engine.graph_shapes import Variant


def sizes_of(driver: Driver, rows: list[int], decoding: list[int], context: int) -> None:
    """Prints a row of a table for every size. RuntimeError for an engine without graphs."""
    graphs = driver.engine.runner.graphs
    if graphs is None:
        raise RuntimeError("this engine has no CUDA graphs")
    print("| decoding | tokens | none | one | distinct | LoRA tiles |\n|---|---|---|---|---|---|", flush=True)
    for number in decoding:
        steps = [(number, 0)] if number else []
        steps += [(number, size - number) for size in STEP_SIZES if size > number]
        for count, prompt in steps:
            try:
                case = Case(driver, graphs, rows, count, [prompt] if prompt else [], context)
            except ValueError:
                continue
            with torch.inference_mode():
                times = [case.time(name) for name in ("none", "one", "distinct")]
            cells = " | ".join(f"{ms:.2f}" for ms, _ in times)
            tiles = ", ".join(_kernels(variant) for _, variant in times if variant)
            print(f"| {count} | {count + prompt} | {cells} | {tiles} |", flush=True)


def _kernels(variant: Variant) -> str:
    """Tiles of LoRA beside the products, and slots in the tails of the base weights."""
    parts = [f"{variant.slots} in tails"] if variant.slots else []
    return " and ".join([*parts, str(variant.block_m)] if variant.rank else parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--decoding", default="0,64,128,256")
    parser.add_argument("--context", type=int, default=600, help="tokens of each decoding sequence")
    parser.add_argument("--config", default="{}", help="EngineConfig fields as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("service").setLevel(logging.INFO)  # how long warm-up and graphs took
    options = {"device": "cuda"} | json.loads(args.config)
    with driving(args.model, sorted(args.adapters.iterdir()), options) as (driver, digests):
        rows = list(driver.engine.residency.try_lease(tuple(digests), object()).rows)
        sizes_of(driver, rows, [int(number) for number in args.decoding.split(",")], args.context)


if __name__ == "__main__":
    main()
