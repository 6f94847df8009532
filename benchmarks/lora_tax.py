"""What LoRA costs: one adapter, and a different one per stream, against the base at the same concurrency, in one run.

    python -m benchmarks.lora_tax MODEL --adapters DIR --loadgen PATH --concurrency 64 --turns 3

The base is measured on a server that has no adapter yet, then, once all adapters are on the device, in turns with
them: so what merely having adapters costs a base request stands beside what using them costs. Arguments as for
benchmarks/throughput.py. Results go to RESULTS.md.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks import report
from benchmarks.throughput import adapters_of, make, measure, options, running, upload

ROWS = {"base": "none", "one adapter": "identical", "all distinct": "distinct"}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    folders = adapters_of(args)
    url = f"http://127.0.0.1:{args.port}"
    rates: dict[str, list[float]] = {}

    def turn(name: str, distribution: str) -> None:
        found = measure(url, f"{distribution}:{args.concurrency}", args)
        if found["errors"]:
            raise RuntimeError(f"{name}: {found['errors']} requests failed")
        rates.setdefault(name, []).append(found["output_tok_s"])

    with running(args.model, args.port, args.data, args.serve.split()):
        for _ in range(args.turns):
            turn("base, no adapter there", "none")
        upload(url, folders)
        for targets, count in args.make:
            make(url, args.model, targets, range(count))
        for _ in range(args.turns):
            for name, distribution in ROWS.items():
                turn(name, distribution)
    write(rates, len(folders) + sum(count for _, count in args.make), args)


def write(rates: dict[str, list[float]], adapters: int, args: argparse.Namespace) -> None:
    base = statistics.median(rates["base"])
    lines = [
        f"`python -m benchmarks.lora_tax ... --concurrency {args.concurrency} --turns {args.turns}`; "
        f"{adapters} adapters, {args.input_len} tokens in, {args.output_len} out, server `{args.serve}`. {args.note}",
        "",
        "| | output tokens/s, median (least, most) | cost against the base |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        cost = 1.0 - statistics.median(values) / base
        lines.append(
            f"| {name} | {statistics.median(values):.0f} ({min(values):.0f}, {max(values):.0f}) | {cost:+.1%} |"
        )
    report.append("The cost of LoRA", lines)


if __name__ == "__main__":
    main()
