"""Batches of adapters for the LoRA kernels, and what they must give, computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.plan import LoraPlan, Rows, build_plan
from adapters.site import Site


@dataclass
class Table:
    """An arena of given factors: tensors in one flat `data`, 16-byte aligned, in no particular order."""

    data: Tensor
    ranks: Tensor
    offsets: Tensor
    scales: Tensor
    factors: dict[tuple[int, int], tuple[Tensor, Tensor, float]]
    """(row, target) -> A [r, k], B [r, d] in float64 (after rounding to the compute dtype), scale."""

    @property
    def max_rank(self) -> int:
        return max(1, int(self.ranks.max()))

    def ranks_of(self, plan: LoraPlan) -> NDArray[np.int32]:
        """[segments] the largest rank of each segment's row; 0 without an adapter."""
        return np.where(plan.seg_row < 0, 0, self.ranks.cpu().numpy().max(axis=1)[plan.seg_row])


def make_table(
    ranks: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Table:
    """ranks[row][target] (0: not targeted), shapes[target] = (k, d). Gaps between tensors hold NaN: a kernel that
    reads past its factors shows."""
    generator = torch.Generator().manual_seed(seed)
    rows, targets = len(ranks), len(shapes)
    offsets = torch.zeros(rows, targets, 2, dtype=torch.int64)
    scales = torch.zeros(rows, targets, dtype=torch.float32)
    factors: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}
    parts: list[Tensor] = []
    at = 0

    def place(tensor: Tensor) -> int:
        nonlocal at
        begin = at
        gap = 8 - tensor.numel() % 8 + 8 * (len(parts) % 5)
        parts.extend([tensor.flatten().to(dtype), torch.full((gap,), torch.nan, dtype=dtype)])
        at += tensor.numel() + gap
        return begin

    for row in reversed(range(rows)):
        for target, (k, d) in enumerate(shapes):
            r = ranks[row][target]
            if r == 0:
                continue
            a = torch.randn(r, k, generator=generator).mul(k**-0.5).to(dtype)
            b = torch.randn(r, d, generator=generator).to(dtype)
            scale = 0.5 + (row + target) % 3
            offsets[row, target, 0], offsets[row, target, 1] = place(a), place(b)
            scales[row, target] = scale
            factors[row, target] = (a.double(), b.double(), scale)
    parts.append(torch.zeros(8, dtype=dtype))
    return Table(
        data=torch.cat(parts).to(device),
        ranks=torch.tensor(ranks, dtype=torch.int32, device=device),
        offsets=offsets.to(device),
        scales=scales.to(device),
        factors=factors,
    )


def make_site(k: int, widths: Sequence[int], first_target: int = 0) -> Site:
    starts = np.cumsum([0, *widths])
    return Site(
        targets=tuple(range(first_target, first_target + len(widths))),
        offsets=tuple(int(v) for v in starts[:-1]),
        widths=tuple(widths),
        in_features=k,
        out_features=int(starts[-1]),
    )


def plan_of(sequences: Sequence[tuple[int, Rows]]) -> LoraPlan | None:
    """A plan for packed sequences of (number of tokens, rows)."""
    spans, at = [], 0
    for count, rows in sequences:
        spans.append((at, count, rows))
        at += count
    return build_plan(spans)


def expected(y: Tensor, x: Tensor, site: Site, plan: LoraPlan | None, table: Table) -> Tensor:
    """y + every delta, in float64 on the CPU."""
    out, x64 = y.detach().cpu().double().clone(), x.detach().cpu().double()
    if plan is None:
        return out
    for s, row in enumerate(plan.seg_row.tolist()):
        for p in range(plan.seg_start[s], plan.seg_start[s + 1]):
            t, w = int(plan.tokens[p]), float(plan.weights[p])
            for target, offset, width in zip(site.targets, site.offsets, site.widths, strict=True):
                if (row, target) in table.factors:
                    a, b, scale = table.factors[row, target]
                    out[t, offset : offset + width] += w * scale * (x64[t] @ a.T) @ b
    return out


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; NaN if anything is not finite."""
    return float((actual.cpu().double() - wanted).norm() / wanted.norm())


@dataclass
class Case:
    """One launch: `sequences` of (tokens, rows), adapters' ranks by row and target."""

    name: str
    k: int
    widths: tuple[int, ...]
    ranks: list[list[int]]
    sequences: list[tuple[int, Rows]]
    block_m: int = 16

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one token", 576, (192,), [[8]], [(1, ((0, 1.0),))]),
    Case("rank 1 and a width that is no multiple of anything", 100, (50, 7), [[1, 3]], [(3, ((0, 1.0),))]),
    Case(
        "every token another adapter, ranks mixed",
        576,
        (576, 192, 192),
        [[1, 1, 1], [3, 3, 3], [33, 33, 33], [64, 0, 8], [0, 16, 0], [100, 4, 1]],
        [(1, ((i, 1.0),)) for i in (3, 1, 4, 0, 5, 2)],
    ),
    Case(
        "tokens without an adapter in between",
        64,
        (128, 128),
        [[16, 16], [8, 0]],
        [(2, ()), (1, ((1, 1.0),)), (3, ()), (20, ((0, 1.0),)), (1, ())],
    ),
    Case("rank 512", 128, (192,), [[512], [5]], [(1, ((0, 1.0),)), (2, ((1, 1.0),))]),
    Case(
        "a weighted mix beside its own parts",
        576,
        (192, 64),
        [[8, 8], [16, 0], [33, 4]],
        [
            (2, ((0, 0.5), (1, -2.0), (2, 1.0))),
            (1, ((1, 1.0),)),
            (19, ((0, 1.0), (2, 0.25))),
            (2, ()),
            (1, ((2, 1.0),)),
        ],
    ),
    Case(
        "prompts, tiles of 64",
        200,
        (96, 40, 40),
        [[16, 16, 16], [100, 0, 3], [4, 8, 64]],
        [(70, ((0, 1.0),)), (1, ((2, 1.0),)), (130, ((1, 0.7),)), (5, ()), (64, ((0, 1.0), (1, 1.0)))],
        block_m=64,
    ),
]
