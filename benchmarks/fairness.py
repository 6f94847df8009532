"""What a flood of one tenant does to another's time to first token, what that costs, and whether shares follow weights.

    python -m benchmarks.fairness [--requests 120] [--append]

One tenant keeps 200 requests in flight, another sends one request a second; then three tenants of different weights
ask for more than there is. The real engine around a simulated model in a time of its own (timeline.py): exact, the same
on every machine, and worth as much as the stated step times. HTTP, which adds the same to both, is not in it.

Of the second tenant: the same requests alone, each after the last has ended; then one a second beside the flood, the
first after five. Where in a step they come is spread evenly (multiples of the golden ratio).
"""

from __future__ import annotations

import argparse
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks import report
from benchmarks.timeline import H100_8B, H200_8B, H200_8B_NOW, Timeline, percentile
from service.engine.simulated import Options

MACHINES = {"prototype's kernels": H200_8B, "first measured": H200_8B_NOW, "H100, beside the engine": H100_8B}
SLOTS = (64, 256)
PROMPTS = (512, 1024, 2048)
MORE_PROMPTS = (128,)
"""Shorter than the bound: the step in progress alone takes longer than such a prompt. Nothing is promised for it."""
FLOOD, PROMPT, OUTPUT, BOUND = 200, 512, 128, 512
BEGIN = 5.0
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}
SHAPES = {"a": (100, 60), "b": (300, 20), "c": (40, 90)}
"""Tokens in and out."""


@dataclass(frozen=True)
class Beside:
    """What came of one case, in seconds and tokens per second."""

    ttft: list[float]
    """Of the other tenant."""
    gaps: list[float]
    """Between two tokens of the flood."""
    rate: float
    """Generated tokens of both."""


def line_of(options: Options, max_sequences: int) -> Timeline:
    return Timeline(options, max_sequences=max_sequences, max_tokens_per_step=8192, max_prefill_tokens_per_step=BOUND)


def alone(options: Options, prompt: int, max_sequences: int, requests: int) -> list[float]:
    """Times to first token without a flood; no request begins before the last has ended."""
    line = line_of(options, max_sequences)
    left = requests

    def send() -> None:
        nonlocal left
        if left:
            left -= 1
            line.ask("other", prompt, OUTPUT, done=lambda: line.at(line.now + 0.3, send))

    line.at(BEGIN, send)
    while left or line.engine.busy:
        line.run(line.now + 1.0)
    return [asked.ttft for asked in line.of("other")]


def beside(options: Options, prompt: int, max_sequences: int, requests: int) -> Beside:
    """One request a second beside the flood."""
    line = line_of(options, max_sequences)
    line.closed_loop("flood", FLOOD, PROMPT, OUTPUT)
    line.open_loop("other", (BEGIN + k + k * 0.618 % 0.5 for k in range(requests)), prompt, OUTPUT)
    line.run(BEGIN + requests + 2.0)
    ttft = [asked.ttft for asked in line.of("other")]
    if len(ttft) != requests:
        raise RuntimeError(f"{requests - len(ttft)} of {requests} requests have no first token yet")
    gaps = [b - a for asked in line.of("flood", BEGIN) for a, b in itertools.pairwise(asked.times)]
    return Beside(ttft, gaps, rate(line))


def rate(line: Timeline) -> float:
    """Tokens per second, without the first seconds."""
    return sum(line.tokens(BEGIN).values()) / (line.now - BEGIN)


def flood_alone(options: Options, max_sequences: int) -> float:
    line = line_of(options, max_sequences)
    line.closed_loop("flood", FLOOD, PROMPT, OUTPUT)
    line.run(BEGIN + 20.0)
    return rate(line)


def shares(seconds: int) -> dict[str, float]:
    """Virtual tokens served, as shares, after two seconds of warm-up."""
    line = line_of(H200_8B, 48)
    for name, weight in WEIGHTS.items():
        line.closed_loop(name, 100, *SHAPES[name], weight=weight)
    line.run(2.0)
    before = line.served()
    line.run(2.0 + seconds)
    got = {name: served - before[name] for name, served in line.served().items()}
    return {name: amount / sum(got.values()) for name, amount in got.items()}


def row(case: tuple[str, int, int, int]) -> str:
    name, max_sequences, prompt, requests = case
    options = MACHINES[name]
    lone = percentile(alone(options, prompt, max_sequences, requests), 0.99)
    found = beside(options, prompt, max_sequences, requests)
    p50, p99, worst = (percentile(found.ttft, share) * 1e3 for share in (0.5, 0.99, 1.0))
    gaps = ", ".join(f"{percentile(found.gaps, share) * 1e3:.1f}" for share in (0.5, 0.99))
    cells = f"{lone * 1e3:.1f} | {p50:.1f}, {p99:.1f}, {worst:.1f} | {p99 / lone / 1e3:.2f}"
    without = flood_alone(options, max_sequences)
    speed = f"{found.rate:.0f}, {without:.0f} | {found.rate / without - 1:+.0%}"
    return f"| {name} | {max_sequences} | {prompt} | {cells} | {gaps} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=120, help="of the second tenant, in each case")
    parser.add_argument("--append", action="store_true", help="to RESULTS.md")
    args = parser.parse_args()
    lines = [
        f"`python -m benchmarks.fairness --requests {args.requests}`: **predictions**: simulated model and time, real "
        f"engine, no HTTP, nothing was run on a device. The flood has {FLOOD} requests of {PROMPT} tokens in and "
        f"{OUTPUT} out in flight; the other {args.requests} requests, one a second; bound {BOUND}. Times in ms.",
        "",
        "| step time | slots | prompt of the other | TTFT alone, p99 | beside the flood, p50, p99, max | ratio of p99 |"
        " between tokens of the flood, p50, p99 | tokens/s of both, of a flood alone | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = [*itertools.product(MACHINES, SLOTS, PROMPTS), *itertools.product(MACHINES, SLOTS, MORE_PROMPTS)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(row, ((*case, args.requests) for case in cases)):
            lines.append(line)
            print(line, flush=True)
    total = sum(WEIGHTS.values())
    lines += ["", "| tenant | weight's share | share of virtual tokens | off by |", "|---|---|---|---|"]
    for name, share in shares(20).items():
        due = WEIGHTS[name] / total
        lines.append(f"| {name}, {SHAPES[name]} tokens | {due:.3f} | {share:.3f} | {share / due - 1:+.1%} |")
        print(lines[-1], flush=True)
    if args.append:
        report.append("Fair shares", lines)


if __name__ == "__main__":
    main()
