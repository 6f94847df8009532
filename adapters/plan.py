"""The LoRA batch plan: which tokens of one step go through which resident blocks. Torch-free.

A token may stand in several segments (a weighted mix); the delta of a token is the sum over its segments, so a
composition costs only its own ranks and is exact. Tokens of one adapter are computed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Integer = TypeVar("Integer", bound=np.integer)
Rows = tuple[tuple[int, float], ...]
"""(arena row, weight) of each adapter of a sequence, in the order in which their deltas are added; at most one entry
per row."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Segments of one step.

    Segment s applies the block at arena row `seg_row[s]` to `tokens[seg_start[s]:seg_start[s + 1]]` with the matching
    `weights`. Inside a wave (a range of segments) no token occurs twice, so a kernel may write a wave's outputs
    without atomics; different waves must be ordered. There is one wave unless a request mixes adapters.
    """

    tokens: NDArray[np.int32]
    """[P] indices into the step's packed tokens."""
    weights: NDArray[np.float32]
    """[P]"""
    seg_row: NDArray[np.int32]
    """[S]; -1: no adapter, see `covering`."""
    seg_start: NDArray[np.int32]
    """[S + 1] positions in `tokens`."""
    waves: tuple[tuple[int, int], ...]
    """(first segment, last segment + 1) of each wave."""

    @property
    def rows(self) -> set[int]:
        """Arena rows this plan reads."""
        return set(self.seg_row.tolist())


def order_by_adapter(rows: Sequence[Rows]) -> list[int]:
    """An order of sequences in which those with the same adapters are neighbours (base-only ones last).

    The order of tokens in a packed batch is free; with this one a segment is one contiguous slice, which lets
    kernels use views instead of gathers."""
    return sorted(range(len(rows)), key=lambda i: (not rows[i], rows[i]))


def build_plan(spans: Iterable[tuple[int, int, Rows]]) -> LoraPlan | None:
    """Plan for `spans` of (first token, number of tokens, rows). None when no token has an adapter.

    A weight of 0.0 contributes nothing and is left out. The n-th adapter of a mix stands in the n-th wave: which rows
    of the arena its adapters have depends on what was loaded before, and its rounding must not."""
    waves: list[dict[int, list[tuple[int, int, float]]]] = []
    for first, count, rows in spans:
        live = [(row, weight) for row, weight in rows if weight != 0.0]
        if len(live) > 1 and len({row for row, _ in live}) != len(live):
            raise ValueError(f"rows: {rows!r} names a row twice; weights of one adapter must be added up first")
        for depth, (row, weight) in enumerate(live):
            if depth == len(waves):
                waves.append({})
            waves[depth].setdefault(row, []).append((first, count, weight))
    if not waves:
        return None

    firsts: list[int] = []
    counts: list[int] = []
    weights: list[float] = []
    seg_row: list[int] = []
    seg_start = [0]
    bounds: list[tuple[int, int]] = []
    for wave in waves:
        begin = len(seg_row)
        for row in sorted(wave):
            total = 0
            for first, count, weight in wave[row]:
                firsts.append(first)
                counts.append(count)
                weights.append(weight)
                total += count
            seg_row.append(row)
            seg_start.append(seg_start[-1] + total)
        bounds.append((begin, len(seg_row)))
    return LoraPlan(
        tokens=ranges(np.array(firsts, dtype=np.int32), counts),
        weights=np.repeat(np.array(weights, dtype=np.float32), counts),
        seg_row=np.asarray(seg_row, dtype=np.int32),
        seg_start=np.asarray(seg_start, dtype=np.int32),
        waves=tuple(bounds),
    )


def covering(plan: LoraPlan, tokens: int) -> LoraPlan:
    """The same plan with all of a step's `tokens` in its first wave: a segment of row -1 holds those that have no
    adapter. A kernel that computes this wave may write its output instead of adding to what is there."""
    count = plan.seg_start[plan.waves[0][1]]
    bare = np.ones(tokens, dtype=bool)
    bare[plan.tokens[:count]] = False
    rest = np.flatnonzero(bare).astype(np.int32)
    if not len(rest):
        return plan
    segments = plan.waves[0][1]
    starts = plan.seg_start
    return LoraPlan(
        tokens=np.concatenate((plan.tokens[:count], rest, plan.tokens[count:])),
        weights=np.concatenate((plan.weights[:count], np.zeros(len(rest), np.float32), plan.weights[count:])),
        seg_row=np.insert(plan.seg_row, segments, -1),
        seg_start=np.concatenate((starts[: segments + 1], starts[segments:] + len(rest))).astype(np.int32),
        waves=((0, segments + 1), *((first + 1, last + 1) for first, last in plan.waves[1:])),
    )


def ranges(begins: NDArray[Integer], counts: Sequence[int] | NDArray[np.integer]) -> NDArray[Integer]:
    """begins[0], begins[0] + 1, ... (counts[0] of them), begins[1], ..., in the dtype of `begins` [n]."""
    lengths = np.asarray(counts, dtype=begins.dtype)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=begins.dtype) + np.repeat(begins - (ends - lengths), lengths)
