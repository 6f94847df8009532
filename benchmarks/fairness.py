"""What a flood of one tenant does to another's time to first token, and whether shares follow the weights.

    python -m benchmarks.fairness [--seconds 20] [--append]

One tenant keeps 200 requests in flight, another sends one request a second, alone and beside the flood; then three
tenants of different weights ask for more than there is. The real engine around a simulated model in a time of its own
(timeline.py): exact, the same on every machine, and worth as much as the stated step times. HTTP, which adds the same
to both, is not in it.
"""

from __future__ import annotations

import argparse
import itertools

from benchmarks import report
from benchmarks.timeline import H200_8B, H200_8B_NOW, Timeline, percentile
from service.engine.simulated import Options

CONSTANT = Options(step_s=0.02)
FLOOD, PROMPT, OUTPUT, BOUND = 200, 512, 128, 512
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}
SHAPES = {"a": (100, 60), "b": (300, 20), "c": (40, 90)}
"""Tokens in and out."""


def one_a_second(options: Options, prompt: int, max_sequences: int, seconds: int, flood: bool) -> tuple[float, ...]:
    """Of the tenant that sends one request a second: p50 and p99 of its time to first token; ITL p99 of the flood."""
    line = Timeline(options, max_sequences=max_sequences, max_tokens_per_step=8192, max_prefill_tokens_per_step=BOUND)
    if flood:
        line.closed_loop("flood", FLOOD, PROMPT, OUTPUT)
    line.open_loop("other", (5.0 + k + k * 0.137 % 0.3 for k in range(seconds)), prompt, OUTPUT)
    line.run(6.0 + seconds)
    times = [asked.ttft for asked in line.of("other")]
    gaps = [b - a for asked in line.of("flood", 2.0) for a, b in itertools.pairwise(asked.times)]
    return percentile(times, 0.5), percentile(times, 0.99), percentile(gaps, 0.99) if gaps else 0.0


def shares(seconds: int) -> dict[str, float]:
    """Virtual tokens served, as shares, after two seconds of warm-up."""
    line = Timeline(H200_8B, max_sequences=48, max_tokens_per_step=8192, max_prefill_tokens_per_step=BOUND)
    for name, weight in WEIGHTS.items():
        line.closed_loop(name, 100, *SHAPES[name], weight=weight)
    line.run(2.0)
    before = line.served()
    line.run(2.0 + seconds)
    got = {name: served - before[name] for name, served in line.served().items()}
    return {name: amount / sum(got.values()) for name, amount in got.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20, help="simulated, for each case")
    parser.add_argument("--append", action="store_true", help="to RESULTS.md")
    args = parser.parse_args()
    lines = [
        f"`python -m benchmarks.fairness --seconds {args.seconds}`: simulated model and time, real engine, no HTTP. "
        f"The flood has {FLOOD} requests of {PROMPT} tokens in and {OUTPUT} out in flight; bound of prompts {BOUND}.",
        "",
        "| step time | slots | prompt of the other | TTFT alone, p99 ms | beside the flood, p50, p99 | ratio of p99 |"
        " ITL p99 of the flood, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    machines = (("20 ms, constant", CONSTANT), ("prototype's kernels", H200_8B), ("first measured", H200_8B_NOW))
    for (name, options), max_sequences, prompt in itertools.product(machines, (64, 256), (512, 1024, 2048)):
        _, lone, _ = one_a_second(options, prompt, max_sequences, args.seconds, flood=False)
        p50, p99, gap = one_a_second(options, prompt, max_sequences, args.seconds, flood=True)
        cells = f"{lone * 1e3:.1f} | {p50 * 1e3:.1f}, {p99 * 1e3:.1f} | {p99 / lone:.2f} | {gap * 1e3:.1f}"
        lines.append(f"| {name} | {max_sequences} | {prompt} | {cells} |")
        print(lines[-1], flush=True)
    total = sum(WEIGHTS.values())
    lines += ["", "| tenant | weight's share | share of virtual tokens | off by |", "|---|---|---|---|"]
    for name, share in shares(args.seconds).items():
        due = WEIGHTS[name] / total
        lines.append(f"| {name}, {SHAPES[name]} tokens | {due:.3f} | {share:.3f} | {share / due - 1:+.1%} |")
        print(lines[-1], flush=True)
    if args.append:
        report.append("Fair shares", lines)


if __name__ == "__main__":
    main()
