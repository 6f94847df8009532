"""What memory merging one module takes, at most, from its shape and its sources' ranks. Imports no torch.

The coefficients are measured (peak resident memory of a process, torch 2.13, one thread, 2 to 64 sources) and rounded
up; tests/adapters/test_merge_memory.py holds them against a real process. Everything is computed in float32, `svd` in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence

PROCESS_BYTES = 300_000_000
"""Python with torch, before anything is merged (measured: 0.23 to 0.25 GB)."""

SLICE_VALUES = 1 << 18
"""Pruned A and B are added up in slices of so many values of all sources: their temporaries cost MBs."""


def is_dense(method: str, d: int, k: int, ranks: Sequence[int]) -> bool:
    """Whether the merge works on a matrix [d, k]: pruning makes it of any rank. `svd` itself needs only its factors,
    and takes the matrix where the factors together are the larger ones."""
    return method.endswith("_svd") or (method == "svd" and sum(ranks) > min(d, k))


def memory_bytes(method: str, into: str, d: int, k: int, ranks: Sequence[int]) -> int:
    """Of the whole process while it merges a module [d, k] of sources with these ranks."""
    side, total, largest = max(d, k), sum(ranks), max(ranks)
    if into == "checkpoint":
        needed = 4 * (total + largest) * (d + k) + 100_000_000  # all factors beside bands of the base's weights
    elif method == "cat":
        needed = 2 * 4 * total * (d + k)
    elif is_dense(method, d, k, ranks):
        # One source's product and its pruning: 10.1 to 11 d·k values, most of them the pairs that torch.topk sorts.
        # What an election has found, the sum so far and that of its present run: 3. The SVD at the end takes 6.
        needed = 15 * 4 * d * k + 2 * 4 * largest * (d + k)
    elif method == "svd":
        # 3.2 to 5.7 float64 values for each of the factors' own, the most where their ranks are those of the matrix.
        needed = 6 * 8 * total * (d + k)
    else:
        pruned, pruning = 4 * total * side, 15 * 4 * largest * side
        adding_up = 3 * 4 * len(ranks) * min(SLICE_VALUES, largest * side)
        needed = pruned + pruning + adding_up + 4 * largest * (d + k)
    return PROCESS_BYTES + needed
