"""Launch configurations of the LoRA kernels, judged by what a whole step takes: base products run beside them.

    python -m benchmarks.step_tuning MODEL --adapters DIR --cases decode:64,mixed:64

MODEL has a few layers (benchmarks/random_base.py --layers 4): steps are alike in every layer. A case is `decode:N`, N
sequences that decode, or `mixed:N`, N - 1 of them beside a prompt of 512 tokens. Each policy is measured with one
adapter for all and with a different one for each, against steps without LoRA; graphs are captured anew for each.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
import triton

from adapters.kernels import triton_lora, tuning
from adapters.kernels.device_plan import WALKED, rank_block, rank_bucket
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig
from benchmarks.engine import driving
from benchmarks.step_case import Case

CONTEXT = 600
PROMPT = 512

SHRINK = {
    16: [
        ShrinkConfig(16, 128, 512, 4, 3, 32),
        ShrinkConfig(16, 128, 512, 4, 3, 8),
        ShrinkConfig(16, 256, 512, 4, 2, 32),
        ShrinkConfig(16, 128, 256, 4, 2, 32),
        ShrinkConfig(16, 128, 1024, 4, 4, 32),
        ShrinkConfig(16, 128, 512, 2, 3, 32),
        ShrinkConfig(16, 128, 1024, 2, 4, 32),
        ShrinkConfig(16, 128, 1024, 2, 5, 32),
        ShrinkConfig(16, 128, 2048, 2, 6, 32),
    ],
    64: [
        ShrinkConfig(16, 64, 1024, 4, 3, 4),
        ShrinkConfig(16, 64, 512, 4, 3, 32),
        ShrinkConfig(16, 128, 1024, 4, 3, 8),
        ShrinkConfig(16, 64, 2048, 4, 4, 4),
        ShrinkConfig(16, 128, 2048, 8, 3, 4),
    ],
}
EXPAND = {
    16: [
        ExpandConfig(16, 256, 1024, 4, 3, 32),
        ExpandConfig(16, 256, 512, 4, 2, 32),
        ExpandConfig(16, 256, 256, 4, 1, 32),
        ExpandConfig(16, 512, 1024, 4, 2, 32),
        ExpandConfig(16, 256, 2048, 4, 3, 32),
        ExpandConfig(16, 128, 1024, 4, 4, 32),
        ExpandConfig(16, 128, 512, 2, 3, 32),
        ExpandConfig(16, 256, 1024, 4, 2, 0, 80),
        ExpandConfig(16, 256, 1024, 4, 2, 0),
        ExpandConfig(16, 128, 1024, 4, 2, 0, 128),
        ExpandConfig(16, 256, 512, 2, 2, 0),
    ],
    64: [
        ExpandConfig(16, 128, 512, 4, 3, 4),
        ExpandConfig(16, 128, 128, 4, 1, 32),
        ExpandConfig(16, 128, 1024, 4, 3, 8),
        ExpandConfig(16, 256, 512, 8, 2, 8),
        ExpandConfig(16, 64, 512, 4, 3, 8),
    ],
}
"""By entries of a tile; see `fitted`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--cases", default="decode:1,decode:64,mixed:64")
    parser.add_argument("--layers", type=int, default=32, help="report times as of so many layers")
    parser.add_argument("--save", action="store_true", help="write the best to tuned.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("service").setLevel(logging.INFO)  # how long warm-up and graphs took
    options = {"device": "cuda", "max_sequences": 64, "max_tokens_per_step": 640}
    with driving(args.model, sorted(args.adapters.iterdir()), options) as (driver, digests):
        graphs = driver.engine.runner.graphs
        rows = list(driver.engine.residency.try_lease(tuple(digests), object()).rows)
        layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
        for name in args.cases.split(","):
            kind, streams = name.split(":")
            prompts = [PROMPT] if kind == "mixed" else []
            case = Case(driver, graphs, rows, int(streams) - len(prompts), prompts, CONTEXT)
            for block_m in sorted({v.block_m for v in case.places.variants if v and v.block_m}):
                with torch.inference_mode():
                    found = tune(case, f"{name}, tiles of {block_m}", block_m, args.layers / layers)
                if args.save:
                    note = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                    tuning.save(found, note | {"triton": triton.__version__})


def fitted(candidate: ShrinkConfig | ExpandConfig, bucket: int, block_m: int) -> ShrinkConfig | ExpandConfig:
    """The candidate for ranks of this class. Where they are walked, expand's blocks of ranks are its own and shrink's
    those of the plan, and the splits few, as expand holds them all."""
    if bucket <= WALKED:
        return replace(candidate, block_r=bucket)
    if isinstance(candidate, ShrinkConfig):
        return replace(candidate, block_r=rank_block(block_m), most_splits=8 if block_m <= 16 else 4)
    return replace(candidate, programs=candidate.programs or 32)


def timed(case: Case, kind: str, block_m: int) -> float:
    """ms of a replay, captured anew."""
    case.capture(kind, block_m)
    return case.time(kind)[0]


def tune(case: Case, name: str, block_m: int, factor: float) -> dict[str, ShrinkConfig | ExpandConfig]:
    """The best of the candidates for this case, under its key."""
    distinct = case.plans["distinct"]
    if distinct is None:
        raise ValueError("no adapters")
    bucket = rank_bucket(int(case.graphs._kernels.ranks(distinct).max()))
    entries = case.places.shape.tokens
    defaults = triton_lora.shrink_config, triton_lora.expand_config
    base = timed(case, "none", block_m)
    kinds = ("one", "distinct") if case.places.shape.sequences > 1 else ("one",)
    if case.places.shape.tiles:  # which tiles are used is decided by the batch
        kinds = ("distinct",) if block_m == 16 else ("one",)
    print(f"{name}: without LoRA {base:.3f} ms; added for {factor:g} times as many layers, by {kinds}:", flush=True)

    def measured(what: object) -> float:
        try:
            times = [(timed(case, kind, block_m) - base) * factor for kind in kinds]
        except (triton.OutOfResources, triton.CompilationError) as error:
            print(f"    {what}: {type(error).__name__}", flush=True)
            return float("inf")
        print(f"    {' '.join(f'{each:.2f}' for each in times)}  {what}", flush=True)
        return sum(times)

    best: dict[str, ShrinkConfig | ExpandConfig] = {}
    scores = {None: measured("as configured")}
    for kernel, candidates in (("shrink", SHRINK[block_m]), ("expand", EXPAND[block_m])):
        low = min(scores.values())
        setting = f"{kernel}_config"
        chosen = getattr(triton_lora, setting)
        for candidate in candidates:
            config = fitted(candidate, bucket, block_m)
            setattr(triton_lora, setting, lambda *_, config=config: config)
            score = measured(config)
            if score < low * 0.98:  # the rest is noise
                low, chosen = score, getattr(triton_lora, setting)
                best[tuning.key(kernel, entries, bucket, block_m)] = config
        setattr(triton_lora, setting, chosen)
        scores[kernel] = low
    triton_lora.shrink_config, triton_lora.expand_config = defaults
    return best


if __name__ == "__main__":
    main()
