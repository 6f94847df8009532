"""Each GPU kernel against the time its bytes (or products) must take.

    python -m benchmarks.kernels

Times are medians of CUDA graph replays. Floors: bytes over a device copy's measured bandwidth. Shapes: Llama-3.1-8B.
benchmarks/step_tuning.py chooses launch configurations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton

from benchmarks.kernel_cases import SITES, AttentionSetup, LoraCase, LoraSetup, OneRowSetup, TailSetup, copy_bandwidth
from service.engine.build import prefer_cublaslt

TENSOR_FLOPS = 790e12
"""bf16 products of an H200, measured on 8192-cubed ones."""


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


def report_one_row(bandwidth: float) -> list[dict[str, object]]:
    """Kernels start early here, each beside the end of the one before, as in a step."""
    rows: list[dict[str, object]] = []
    print(f"\n{'one row':<12} {'library us':>10} {'own us  floor ratio':>24} {'with adapter  floor ratio':>26}")
    for site in SITES:
        setup = OneRowSetup(site)
        library, base, adapter = (setup.time(kernel) for kernel in ("library", "base", "adapter"))
        floor, both = (n / bandwidth * 1e6 for n in (setup.weight_bytes, setup.weight_bytes + setup.adapter_bytes))
        print(
            f"{site:<12} {library:10.1f} {base:9.1f} {floor:6.1f} {base / floor:7.2f} "
            f"{adapter:11.1f} {both:6.1f} {adapter / both:7.2f}",
            flush=True,
        )
        rows.append({"case": f"one row, {site}", "library_us": library, "us": base, "floor_us": floor})
        rows.append({"case": f"one row with an adapter, {site}", "us": adapter, "floor_us": both})
        del setup
    return rows


TAILS = ((64, 1, 0), (512, 1, 0), (512, 1, 63), (768, 2, 205), (2048, 4, 0))
"""(tokens, adapters of prompts, tokens with an adapter each beside the product)"""


def report_tails(bandwidth: float, sites: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"\n{'adapters in tails':<40} {'base us':>9} {'with tails':>10} {'reader us  floor ratio':>24}")
    for tokens, adapters, decoding in TAILS:
        for site in sites:
            setup = TailSetup(site, tokens, adapters, decoding)
            base, product, reader = (setup.time(kernel) for kernel in ("base", "product", "reader"))
            floor = setup.bytes / bandwidth * 1e6
            name = f"{site:<8} T={tokens:<5} adapters={adapters} beside={decoding}"
            times = f"{base:9.1f} {product:10.1f} {reader:9.1f} {floor:6.1f} {reader / floor:7.2f}"
            print(f"{name:<40} {times}", flush=True)
            rows.append({"case": name, "base_us": base, "product_us": product, "us": reader, "floor_us": floor})
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
            line(f"decode that writes B={batch}", setup.time(writes=True), floor + write)
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


def _environment() -> dict[str, str]:
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,32,64,256,4096", help="token counts")
    parser.add_argument("--sites", default=",".join(SITES), help="of " + ", ".join(SITES))
    parser.add_argument("--only", choices=["lora", "attention", "one_row", "tails"], help="a part of the report")
    parser.add_argument("--json", type=Path, help="also write the report's numbers here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    prefer_cublaslt()  # as the engine
    tokens = [int(v) for v in args.tokens.split(",")]
    sites = args.sites.split(",")
    bandwidth = copy_bandwidth()
    print(f"{_environment()}  device copy {bandwidth / 1e12:.3f} TB/s\n")
    rows: list[dict[str, object]] = []
    if args.only in (None, "lora"):
        rows += report_lora(bandwidth, tokens, sites)
    if args.only in (None, "attention"):
        rows += report_attention(bandwidth)
    if args.only in (None, "one_row"):
        rows += report_one_row(bandwidth)
    if args.only in (None, "tails"):
        rows += report_tails(bandwidth, sites)
    if args.json:
        args.json.write_text(json.dumps({**_environment(), "bandwidth": bandwidth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
