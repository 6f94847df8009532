"""The LoRA batch plan: which tokens of one step go through which resident blocks. Torch-free.

A token may stand in several segments (a weighted mix); the delta of a token is the sum over its segments, so a
composition costs only its own ranks and is exact. Tokens of one adapter are computed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


NOTHING = LoraPlan(
    tokens=np.empty(0, np.int32),
    weights=np.empty(0, np.float32),
    seg_row=np.empty(0, np.int32),
    seg_start=np.zeros(1, np.int32),
    waves=((0, 0),),
)
"""Of a step without adapters, for `covering`."""


def order_by_adapter(rows: Sequence[Rows]) -> list[int]:
    """An order of sequences in which those with the same adapters are neighbours (base-only ones last).

    The order of tokens in a packed batch is free; with this one a segment is one contiguous slice, which lets
    kernels use views instead of gathers."""
    groups: dict[Rows, list[int]] = {}
    for i, mix in enumerate(rows):
        groups.setdefault(mix, []).append(i)
    bare = groups.pop((), [])
    return [i for mix in sorted(groups) for i in groups[mix]] + bare


def build_plan(spans: Iterable[tuple[int, int, Rows]]) -> LoraPlan | None:
    """Plan for `spans` of (first token, number of tokens, rows). None when no token has an adapter.

    A weight of 0.0 contributes nothing and is left out. The n-th adapter of a mix stands in the n-th wave: which rows
    of the arena its adapters have depends on what was loaded before, and its rounding must not."""
    entries: list[int] = []
    """Wave, row, first token and number of tokens, of one after the other."""
    factors: list[float] = []
    for rows, first, count in _joined(spans):
        wave = 0
        for row, weight in rows:
            if weight != 0.0:
                entries += (wave, row, first, count)
                factors.append(weight)
                wave += 1
        if wave > 1 and len({row for row, weight in rows if weight != 0.0}) != wave:
            raise ValueError(f"rows: {rows!r} names a row twice; weights of one adapter must be added up first")
    if not entries:
        return None

    table = np.array(entries, dtype=np.int32).reshape(-1, 4)
    order = np.lexsort((table[:, 1], table[:, 0]))
    waves, rows_, firsts, counts = table[order].T
    ends = np.cumsum(counts)
    # A segment ends where the wave or the row does.
    last = np.flatnonzero(np.append((np.diff(waves) != 0) | (np.diff(rows_) != 0), True))
    bounds = np.searchsorted(waves[last], np.arange(waves[-1] + 2)).tolist()
    return LoraPlan(
        tokens=ranges(firsts, counts),
        weights=np.repeat(np.array(factors, dtype=np.float32)[order], counts),
        seg_row=rows_[last],
        seg_start=np.concatenate(([0], ends[last])).astype(np.int32),
        waves=tuple(pairwise(bounds)),
    )


def _joined(spans: Iterable[tuple[int, int, Rows]]) -> list[tuple[Rows, int, int]]:
    """(rows, first token, number of tokens); neighbours with the same rows are one."""
    joined: list[tuple[Rows, int, int]] = []
    mix: Rows = ()
    begin = end = 0
    for first, count, rows in spans:
        if first != end or rows != mix:
            joined.append((mix, begin, end - begin))
            mix, begin = rows, first
        end = first + count
    joined.append((mix, begin, end - begin))
    return joined


def covering(plan: LoraPlan, tokens: int) -> LoraPlan:
    """The same plan with all of a step's `tokens` in its first wave: a segment of row -1 holds those that have no
    adapter. A kernel that computes this wave may write its output instead of adding to what is there."""
    count = plan.seg_start[plan.waves[0][1]]
    if count == tokens:  # none stands there twice
        return plan
    bare = np.ones(tokens, dtype=bool)
    bare[plan.tokens[:count]] = False
    rest = np.flatnonzero(bare).astype(np.int32)
    segments = plan.waves[0][1]
    starts = plan.seg_start
    return LoraPlan(
        tokens=np.concatenate((plan.tokens[:count], rest, plan.tokens[count:])),
        weights=np.concatenate((plan.weights[:count], np.zeros(len(rest), np.float32), plan.weights[count:])),
        seg_row=np.insert(plan.seg_row, segments, -1),
        seg_start=np.concatenate((starts[: segments + 1], starts[segments:] + len(rest))).astype(np.int32),
        waves=((0, segments + 1), *((first + 1, last + 1) for first, last in plan.waves[1:])),
    )


def parted(plan: LoraPlan, chosen: NDArray[np.bool_]) -> tuple[LoraPlan | None, LoraPlan | None]:
    """The `chosen` [P] entries, all of the first wave and of tokens that stand in no other, and the rest; None for a
    part of no entries."""
    if not chosen.any():
        return None, plan
    return _of_entries(plan, chosen), None if chosen.all() else _of_entries(plan, ~chosen)


def _of_entries(plan: LoraPlan, entries: NDArray[np.bool_]) -> LoraPlan:
    counts = np.add.reduceat(entries, plan.seg_start[:-1], dtype=np.int32)
    kept = counts > 0
    ends = np.concatenate(([0], np.cumsum(kept))).tolist()
    return LoraPlan(
        tokens=plan.tokens[entries],
        weights=plan.weights[entries],
        seg_row=plan.seg_row[kept],
        seg_start=np.concatenate(([0], np.cumsum(counts[kept]))).astype(np.int32),
        waves=tuple((ends[first], ends[last]) for first, last in plan.waves if ends[first] < ends[last]),
    )


def ranges(begins: NDArray[Integer], counts: Sequence[int] | NDArray[np.integer]) -> NDArray[Integer]:
    """begins[0], begins[0] + 1, ... (counts[0] of them), begins[1], ..., in the dtype of `begins` [n]."""
    lengths = np.asarray(counts, dtype=begins.dtype)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=begins.dtype) + np.repeat(begins - (ends - lengths), lengths)
