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
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from adapters.blobs import BlobStore
from adapters.kernels import triton_lora
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig
from adapters.plan import build_plan
from benchmarks.engine import Driver, store_adapters
from service.engine import graphs as graphs_module
from service.engine.attention import StepLayout
from service.engine.config import EngineConfig
from service.engine.graphs import StepGraphs, _Places

CONTEXT = 600
PROMPT = 512

# (block_k, k of a split, warps, stages, programs, rows)
SHRINK = [
    (128, 512, 4, 4, 4, False),
    (128, 512, 4, 3, 32, False),
    (256, 512, 4, 2, 32, False),
    (512, 512, 4, 1, 32, False),
    (128, 512, 4, 3, 32, True),
    (256, 512, 4, 2, 32, True),
    (512, 512, 4, 1, 32, True),
    (256, 1024, 4, 2, 32, True),
    (512, 1024, 8, 2, 32, True),
]
# (block_n, chunk, warps, stages, programs, rows)
EXPAND = [
    (256, 1024, 4, 3, 4, False),
    (256, 256, 4, 1, 32, False),
    (512, 512, 4, 1, 32, False),
    (256, 1024, 4, 3, 32, False),
    (256, 256, 4, 1, 32, True),
    (512, 512, 4, 1, 32, True),
    (512, 1024, 4, 2, 32, True),
    (1024, 1024, 8, 1, 32, True),
]
SHRINK_64 = [
    (64, 1024, 4, 3, 4, False),
    (64, 1024, 4, 3, 32, False),
    (64, 512, 4, 3, 32, False),
    (128, 512, 4, 2, 32, True),
    (256, 512, 8, 1, 32, True),
]
EXPAND_64 = [
    (128, 512, 4, 3, 4, False),
    (128, 128, 4, 1, 32, False),
    (128, 128, 4, 1, 32, True),
    (256, 256, 8, 1, 32, True),
    (64, 256, 4, 2, 32, True),
]


def shrink_policy(
    block_k: int, per: int, warps: int, stages: int, programs: int, rows: bool
) -> Callable[..., ShrinkConfig]:
    def choose(k: int, d: int, entries: int, bucket: int, block_m: int, element_size: int) -> ShrinkConfig:
        return ShrinkConfig(min(bucket, 64), block_k, max(1, k // per), warps, stages, programs, rows)

    return choose


def expand_policy(
    block_n: int, chunk: int, warps: int, stages: int, programs: int, rows: bool
) -> Callable[..., ExpandConfig]:
    def choose(k: int, d: int, entries: int, bucket: int, block_m: int, element_size: int) -> ExpandConfig:
        return ExpandConfig(min(bucket, 64), block_n, chunk, warps, stages, programs, rows)

    return choose


class Case:
    """One kind of step, on the graphs of one shape."""

    def __init__(self, driver: Driver, graphs: StepGraphs, rows: list[int], kind: str, streams: int) -> None:
        self.graphs = graphs
        counts = np.array([1] * streams if kind == "decode" else [1] * (streams - 1) + [PROMPT], dtype=np.int32)
        contexts = np.array([CONTEXT] * streams, dtype=np.int32)
        if kind == "mixed":
            contexts[-1] = PROMPT
        size = driver.engine.pool.page_size
        width = -(-CONTEXT // size)
        table = (np.arange(streams * width, dtype=np.int32) % driver.engine.pool.num_pages).reshape(streams, width)
        owner = np.repeat(np.arange(streams), counts)
        before = contexts - counts
        positions = np.concatenate([np.arange(b, b + n) for b, n in zip(before, counts, strict=True)])
        self.layout = StepLayout(
            slots=table[owner, positions // size].astype(np.int64) * size + positions % size,
            query_lens=counts,
            context_lens=contexts,
            page_table=table,
            num_decode=streams if kind == "decode" else streams - 1,
        )
        self.positions = positions.astype(np.int64)
        self.ids = np.arange(len(positions)) % 1000
        self.wanted = np.cumsum(counts) - 1
        self.plans = {"none": None}
        for name, distinct in (("one", 1), ("distinct", len(rows))):
            begins = np.cumsum(counts) - counts
            spans = [
                (int(b), int(n), ((rows[i % distinct], 1.0),))
                for i, (b, n) in enumerate(zip(begins, counts, strict=True))
            ]
            self.plans[name] = build_plan(spans)
        found = graphs._fitting(len(self.ids), self.layout, self.wanted)
        if found is None:
            raise ValueError(f"{kind}:{streams} fits no graph")
        self.places = found[0]
        self.drawn = torch.empty(0, dtype=torch.int64, device="cuda")

    def use_tiles(self, small: bool) -> None:
        """LoRA tiles of 16 entries, or of 64."""
        before = graphs_module.SMALL_TILES
        graphs_module.SMALL_TILES = 1 << 20 if small else 0
        places = _Places(self.places.shape, self.graphs._pages, False)
        graphs_module.SMALL_TILES = before
        self.graphs._places[self.graphs._places.index(self.places)] = places
        self.places = places

    def time(self, name: str, repeats: int = 15) -> float:
        """ms of a replay, captured anew."""
        plan = self.plans[name]
        variant = None if plan is None else 0
        graph = self.graphs._capture(self.places, variant, torch.cuda.graph_pool_handle())
        self.graphs._graphs[self.places.shape, variant] = graph
        self.graphs.run(self.ids, self.positions, self.layout, plan, self.wanted, self.drawn)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--cases", default="decode:64,mixed:64,decode:1")
    parser.add_argument("--layers", type=int, default=32, help="report times as of so many layers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("service").setLevel(logging.INFO)  # how long warm-up and graphs took
    with tempfile.TemporaryDirectory() as temporary:
        config = EngineConfig(
            model_path=str(args.model),
            blobs_dir=f"{temporary}/blobs",
            cache_dir=f"{temporary}/cache",
            socket="",
            device="cuda",
            max_sequences=64,
            max_tokens_per_step=640,
        )
        begin = time.perf_counter()
        driver = Driver(config)
        graphs = driver.engine.runner.graphs
        digests = store_adapters(
            BlobStore(Path(config.blobs_dir)), sorted(args.adapters.iterdir()), driver.engine.manifest
        )
        driver.load(digests)
        lease = driver.engine.residency.try_lease(tuple(digests), object())
        rows = list(lease.rows)
        layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
        print(f"ready in {time.perf_counter() - begin:.1f} s, {len(rows)} adapters, {layers} layers", flush=True)
        for name in args.cases.split(","):
            kind, streams = name.split(":")
            case = Case(driver, graphs, rows, kind, int(streams))
            for small in (True,) if kind == "decode" else (True, False):
                case.use_tiles(small)
                with torch.inference_mode():
                    tune(case, f"{name}, tiles of {16 if small else 64}", small, args.layers / layers)
        driver.engine.close()


def tune(case: Case, name: str, small: bool, factor: float) -> None:
    shrinks, expands = (SHRINK, EXPAND) if small else (SHRINK_64, EXPAND_64)
    defaults = triton_lora.shrink_config, triton_lora.expand_config
    base = case.time("none")
    print(
        f"{name}: without LoRA {base:.3f} ms; added for {factor:g} times as many layers, one and distinct:", flush=True
    )

    def measured(what: str) -> float:
        try:
            times = [(case.time(kind) - base) * factor for kind in ("one", "distinct")]
        except Exception as error:
            print(f"    {what}: {type(error).__name__}: {str(error)[:80]}", flush=True)
            return float("inf")
        print(f"    {what}: {times[0]:.2f} {times[1]:.2f}", flush=True)
        return sum(times)

    measured("as configured")
    best = expand_policy(*expands[0])
    triton_lora.expand_config = best  # type: ignore[assignment]
    scores = []
    for values in shrinks:
        triton_lora.shrink_config = shrink_policy(*values)  # type: ignore[assignment]
        scores.append((measured(f"shrink {values}"), values))
    triton_lora.shrink_config = shrink_policy(*min(scores)[1])  # type: ignore[assignment]
    for values in expands[1:]:
        triton_lora.expand_config = expand_policy(*values)  # type: ignore[assignment]
        measured(f"shrink {min(scores)[1]} expand {values}")
    triton_lora.shrink_config, triton_lora.expand_config = defaults  # type: ignore[assignment]


if __name__ == "__main__":
    main()
