"""What the bound for prompts that ride with decoding sequences buys and costs, predicted by the cost model.

    python -m benchmarks.scheduling [--append]

64 streams, 512 tokens in, 128 out, closed loop, 256 requests, on the simulated engine in a time of its own
(timeline.py).
The scheduler is the real one; the step times are the model's, so these are predictions, to be measured on the device.
"""

from __future__ import annotations

import argparse
import itertools

from benchmarks import report
from benchmarks.timeline import H200_8B, H200_8B_NOW, Timeline, percentile
from service.engine.simulated import Options

STREAMS, PROMPT, OUTPUT, REQUESTS = 64, 512, 128, 256
BOUNDS = (0, 2048, 1024, 512, 384, 256, 128)


def predict(options: Options, bound: int) -> tuple[float, float, float, float]:
    """(output tokens/s, TTFT p50, ITL p50, ITL p99; seconds) with a bound of so many tokens; 0: none."""
    line = Timeline(options, max_sequences=64, max_tokens_per_step=8192, max_prefill_tokens_per_step=bound)
    left = REQUESTS

    def send() -> None:
        nonlocal left
        if left:
            left -= 1
            line.ask("", PROMPT, OUTPUT, done=send)

    for _ in range(STREAMS):
        send()
    while line.engine.busy:
        line.run(line.now + 0.05)
    done = list(line.asked.values())
    gaps = [b - a for asked in done for a, b in itertools.pairwise(asked.times)]
    ended = max(asked.times[-1] for asked in done)
    ttft = percentile([asked.ttft for asked in done], 0.5)
    return len(done) * OUTPUT / ended, ttft, percentile(gaps, 0.5), percentile(gaps, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--append", action="store_true", help="to RESULTS.md")
    args = parser.parse_args()
    lines = [
        "`python -m benchmarks.scheduling`: **predictions** of the cost model with the real scheduler, nothing was run "
        f"on a device. {STREAMS} streams, {PROMPT} tokens in, {OUTPUT} out, closed loop, {REQUESTS} requests.",
        "",
        "| step time in ms | bound | output tokens/s | TTFT p50 ms | ITL p50 ms | ITL p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, options in (("as first measured", H200_8B_NOW), ("as the prototype's kernels", H200_8B)):
        each = (options.decode_token_s or 0.0) * 1e3
        text = f"{name}: {options.step_s * 1e3:g} + {options.token_s * 1e3:g} p + {each:g} d"
        for bound in BOUNDS:
            rate, ttft, p50, p99 = predict(options, bound)
            cells = f"{rate:.0f} | {ttft * 1e3:.0f} | {p50 * 1e3:.1f} | {p99 * 1e3:.1f}"
            lines.append(f"| {text} | {bound or 'none'} | {cells} |")
            print(lines[-1], flush=True)
    if args.append:
        report.append("Prompts that ride with decoding sequences, predicted", lines)


if __name__ == "__main__":
    main()
