"""The output tokens/s that a device's two ceilings alone would allow, nothing else costing anything.

    python -m benchmarks.floors --bandwidth 4.255 --tflops 790

Llama-3.1-8B's shapes in bfloat16, a closed loop of requests. Of each request the prompt takes its products' time; of
each step of all sequences the bytes take theirs: weights, KV entries and the factors of every adapter in the batch.
"""

from __future__ import annotations

import argparse

WEIGHT_BYTES = 15.0e9
"""Read in every step: all linears and the output layer, no embeddings."""
KV_BYTES = 131072
"""Of one token: 32 layers, 8 heads of 128, keys and values."""
PROMPT_FLOPS = 7.2e12 / 512
"""Of one token of a prompt."""
ALL_BYTES, ATTENTION_BYTES = 83.9e6, 27.3e6
"""Of an adapter of rank 16 on all seven projections, and on q, k, v and o."""


def distinct(distribution: str, adapters: int, concurrency: int, exponent: float = 1.5) -> float:
    """Adapters in a batch, on average. `distribution`: the load generator's name of it."""
    if distribution == "none":
        return 0.0
    if distribution == "identical":
        return 1.0
    if distribution == "distinct":
        return min(adapters, concurrency)
    weights = [(i + 1) ** -exponent if distribution == "zipf" else 1.0 for i in range(adapters)]
    total = sum(weights)
    return sum(1.0 - (1.0 - weight / total) ** concurrency for weight in weights)


def floor(
    concurrency: int,
    adapter_bytes: float,
    *,
    bandwidth: float,
    flops: float,
    input_len: int = 512,
    output_len: int = 128,
) -> float:
    """Output tokens/s. adapter_bytes: of all adapters of a batch; bandwidth in bytes/s, flops per second."""
    prompts = concurrency * input_len * PROMPT_FLOPS / flops
    kv = concurrency * (input_len + output_len / 2) * KV_BYTES
    steps = output_len * (WEIGHT_BYTES + kv + adapter_bytes) / bandwidth
    return concurrency * output_len / (prompts + steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bandwidth", type=float, required=True, help="TB/s of a device copy, read plus written")
    parser.add_argument("--tflops", type=float, default=790, help="of a large product in bfloat16")
    args = parser.parse_args()
    rates = {"bandwidth": args.bandwidth * 1e12, "flops": args.tflops * 1e12}
    for distribution, adapters, each in (
        ("none", 0, 0.0),
        ("identical", 1, ALL_BYTES),
        ("distinct", 64, ALL_BYTES),
        ("uniform", 64, ALL_BYTES),
        ("uniform", 256, ALL_BYTES),
        ("uniform", 500, ATTENTION_BYTES),
        ("zipf", 500, ATTENTION_BYTES),
        ("uniform", 1000, ATTENTION_BYTES),
        ("zipf", 1000, ATTENTION_BYTES),
    ):
        found = [floor(c, distinct(distribution, adapters, c) * each, **rates) for c in (1, 32, 64, 256)]
        print(f"{distribution:<10} {adapters:>5} adapters  at 1, 32, 64, 256: " + "  ".join(f"{f:7.0f}" for f in found))


if __name__ == "__main__":
    main()
