"""Each GPU kernel against the time its bytes (or products) must take; and the search for launch configurations.

    python -m benchmarks.kernels                     the report
    python -m benchmarks.kernels --sweep             tries configurations, writes adapters/kernels/tuned.json
    python -m benchmarks.kernels --sweep --ranks 16,64 --tokens 64 --sites qkv,o --seconds 120

Times are medians of CUDA graph replays. Floors: bytes over a device copy's measured bandwidth. Shapes: Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
import triton

from adapters.kernels import tuning
from adapters.kernels.device_plan import rank_bucket
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig
from benchmarks.kernel_cases import SITES, AttentionSetup, LoraCase, LoraSetup, copy_bandwidth

TENSOR_FLOPS = 790e12
"""bf16 products of an H200, measured on 8192-cubed ones."""
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "shrink": {
        "splits": (1, 2, 4, 8, 16, 32),
        "block_k": (64, 128, 256),
        "programs": (2, 4, 6, 8, 12),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (2, 4, 8),
    },
    "expand": {
        "chunk": (128, 256, 512, 1024, 2048),
        "block_n": (64, 128, 256, 512),
        "programs": (2, 4, 6, 8, 12),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (2, 4, 8),
        "block_r": (16, 32, 64),
    },
}


def report_lora(bandwidth: float, tokens: list[int], sites: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"{'':<50} {'shrink us  floor ratio':>24} {'expand us  floor ratio':>24} {'both us  floor ratio':>24}")
    for t in tokens:
        cases = [(1, (16,)), (t, (8,)), (t, (16,)), (t, (64,)), (t, (8, 16, 64))]
        if t > 512:
            cases = [(1, (16,)), (8, (16,)), (8, (8, 16, 64))]
        elif t == 1:
            cases = [(1, (8,)), (1, (16,)), (1, (64,))]
        for adapters, ranks in cases:
            for site in sites:
                setup = LoraSetup(LoraCase(site, t, adapters, ranks))
                cells, row = [], {"case": str(setup.case), "layers": setup.layers}
                for kernel in ("shrink", "expand", "both"):
                    us, floor = setup.time(kernel), setup.bytes(kernel) / bandwidth * 1e6
                    cells.append(f"{us:9.1f} {floor:6.1f} {us / floor:6.2f}")
                    row |= {f"{kernel}_us": us, f"{kernel}_floor_us": floor}
                print(f"{setup.case!s:<50} {cells[0]:>24} {cells[1]:>24} {cells[2]:>24}", flush=True)
                rows.append(row)
                del setup
    return rows


def report_attention(bandwidth: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"\n{'':<40} {'us':>9} {'floor':>8} {'ratio':>7}")

    def line(name: str, us: float, floor: float, note: str = "") -> None:
        print(f"{name:<40} {us:9.1f} {floor:8.1f} {us / floor:7.2f}  {note}", flush=True)
        rows.append({"case": name, "us": us, "floor_us": floor})

    for batch, context in ((1, 600), (32, 600), (64, 600), (256, 600), (1, 16000), (16, 8000)):
        setup = AttentionSetup([(1, context)] * batch)
        floor = setup.kv_bytes / bandwidth * 1e6
        parts = {n: round(setup.time_decode(n), 1) for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or batch * n <= 128}
        line(f"decode B={batch} context={context}", setup.time(), floor, f"by parts: {parts}")
        if context == 600:
            write = 4 * setup.k.nbytes / bandwidth * 1e6
            line(f"kv_write T={batch}", setup.time_write(), write)
        del setup
    for n, length, before in ((8, 512, 0), (2, 4096, 0), (1, 512, 7680)):
        setup = AttentionSetup([(length, before + length)] * n)
        us = setup.time()
        floor, rate = setup.flops / TENSOR_FLOPS * 1e6, setup.flops / us / 1e6
        line(f"prefill {n} x {length} after {before}", us, floor, f"{rate:.0f} TFLOP/s")
        del setup
    mixed = AttentionSetup([(1, 600)] * 60 + [(512, 512)] * 4)
    line("mixed: 60 decode, 4 x 512 prompts", mixed.time(), mixed.kv_bytes / bandwidth * 1e6)
    return rows


def _allowed(kernel: str, config: ShrinkConfig | ExpandConfig, bucket: int) -> bool:
    """Configurations that make sense and fit in shared memory."""
    if isinstance(config, ExpandConfig):
        if config.chunk % config.block_n or config.block_r > bucket:
            return False
        return config.block_r * config.block_n * 2 * config.num_stages <= 200_000
    return (config.block_r + 16) * config.block_k * 2 * config.num_stages <= 200_000


def tune(kernel: str, setups: list[LoraSetup], deadline: float) -> tuple[ShrinkConfig | ExpandConfig, float, float]:
    """Coordinate descent from the present choice, for the product of the times of all set-ups (one adapter, all
    distinct: the same graph serves both). Returns the best configuration, its score and that of the start."""
    first = setups[0]
    plan, shape = first.plan, first.plan.shape
    arguments = (first.k, first.d, shape.entries, plan.bucket, shape.block_m, 2)
    best = tuning.shrink_config(*arguments) if kernel == "shrink" else tuning.expand_config(*arguments)

    def score(config: ShrinkConfig | ExpandConfig) -> float:
        total = 1.0
        # What shrink leaves to expand grows with its splits, so each is judged by both.
        shrink = config if isinstance(config, ShrinkConfig) else None
        expand = config if isinstance(config, ExpandConfig) else None
        for setup in setups:
            try:
                total *= setup.time("both", shrink, expand, repeats=5)
            except (triton.OutOfResources, triton.CompilationError):
                return float("inf")
        return total ** (1 / len(setups))

    start = low = score(best)
    tried = {best}
    improved = True
    while improved:
        improved = False
        for name, values in CHOICES[kernel].items():
            for value in values:
                if time.monotonic() > deadline:
                    return best, low, start
                config = dataclasses.replace(best, **{name: value})
                if isinstance(config, ExpandConfig) and name == "block_n" and config.chunk < config.block_n:
                    config = dataclasses.replace(config, chunk=config.block_n)
                if config in tried or not _allowed(kernel, config, plan.bucket):
                    continue
                tried.add(config)
                found = score(config)
                # Less than 1 % is noise.
                if found < low * 0.99:
                    best, low, improved = config, found, True
    return best, low, start


def sweep(tokens: list[int], ranks: list[int], sites: list[str], seconds: float) -> None:
    begin = time.monotonic()
    todo = [(site, t, r, kernel) for r in ranks for t in tokens for site in sites for kernel in ("expand", "shrink")]
    for number, (site, t, rank, kernel) in enumerate(todo):
        left = begin + seconds - time.monotonic()
        if left < 2:
            print(f"out of time: {len(todo) - number} of {len(todo)} left untouched")
            break
        many = t if t <= 512 else 8
        setups = [LoraSetup(LoraCase(site, t, n, (rank,))) for n in sorted({1, many})]
        # What a case leaves of its share of the time goes to the later ones.
        config, low, start = tune(kernel, setups, time.monotonic() + left / (len(todo) - number))
        k, widths = SITES[site]
        name = tuning.key(kernel, k, sum(widths), t, rank_bucket(rank))
        print(f"{name:<40} {start:8.2f} -> {low:8.2f} us  {config}", flush=True)
        tuning.save({name: config}, _environment())
        del setups


def _environment() -> dict[str, str]:
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="search configurations and write tuned.json")
    parser.add_argument("--tokens", default="", help="token counts (default 1,32,64,256; the report adds 4096)")
    parser.add_argument("--ranks", default="16", help="ranks to sweep")
    parser.add_argument("--sites", default=",".join(SITES), help="of " + ", ".join(SITES))
    parser.add_argument("--seconds", type=float, default=480, help="time for the sweep")
    parser.add_argument("--only", choices=["lora", "attention"], help="one half of the report")
    parser.add_argument("--json", type=Path, help="also write the report's numbers here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    default = "1,32,64,256" if args.sweep else "1,32,64,256,4096"
    tokens = [int(v) for v in (args.tokens or default).split(",")]
    sites = args.sites.split(",")
    if args.sweep:
        sweep(tokens, [int(v) for v in args.ranks.split(",")], sites, args.seconds)
        return
    bandwidth = copy_bandwidth()
    print(f"{_environment()}  device copy {bandwidth / 1e12:.3f} TB/s\n")
    rows: list[dict[str, object]] = []
    if args.only != "attention":
        rows += report_lora(bandwidth, tokens, sites)
    if args.only != "lora":
        rows += report_attention(bandwidth)
    if args.json:
        args.json.write_text(json.dumps({**_environment(), "bandwidth": bandwidth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
