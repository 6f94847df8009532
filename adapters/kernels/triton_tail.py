"""Launches the kernels of adapters in the tails (tail.py says what that is).

    stage     A, B and scale of the adapters that are not there yet                   once a step
    expand    y[t, :d] += w · scale · s B,   y = x [W0 ; A]^T = [x W0^T | s]          once a site, in place; or
              y[t, :d] +  w · scale · s B + residual, elsewhere
    gated     the same for gate and up, and activation(gate) · up in the same pass

Of the two kernels beside a product that a site costs otherwise (triton_lora.py) shrink is part of the product, and
expand, which has no table to look anything up in, one round trip to memory (with several slots two: which of them a
tile's tokens have comes first). That pays where many tokens share few
adapters: prompts, and many sequences that decode with one. Deltas of other tokens of the same step, which those two
kernels have computed beside the product, are added by the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.kernels import tail
from adapters.kernels.tail import GRANULE, SLOTS, Tail
from adapters.kernels.tail_kernels import expand_kernel, gated_kernel, stage_kernel
from adapters.kernels.tail_plan import ENDS, STAGED, TILE, TailPlan
from adapters.kernels.triton_lora import Tables, multiprocessors
from adapters.site import Site

PIECE = 512
"""Columns that one step of a staging program copies, of GRANULE rows."""


class Tails:
    """The tails of a model's sites: where they lie, and what stands in them."""

    def __init__(self, sites: Iterable[tuple[Site, Tail]], targets: int, device: torch.device | str) -> None:
        """targets: number of all target indices."""
        where = torch.zeros(targets, 2, 4, dtype=torch.int64)
        scales_at = torch.zeros(targets, dtype=torch.int64)
        pieces: list[tuple[int, int, int]] = []
        for site, (whole, _, b, scales) in sites:
            count, k, d = len(site.targets), site.in_features, site.out_features
            for j, (target, offset, width) in enumerate(zip(site.targets, site.offsets, site.widths, strict=True)):
                a_at = whole.data_ptr() + (d + j * GRANULE) * k * whole.element_size()
                b_at = b.data_ptr() + offset * b.element_size()
                where[target, 0] = torch.tensor([a_at, k, count * GRANULE * k, k])
                where[target, 1] = torch.tensor([b_at, d, GRANULE * d, width])
                scales_at[target] = scales[j].data_ptr()
                pieces += [(target, side, n) for side, size in ((0, k), (1, width)) for n in range(0, size, PIECE)]
        self.slots = tail.Slots()
        vector = 16 // whole.element_size()
        self._vector = vector if bool((where[..., 1:] % vector == 0).all() and (where[..., 0] % 16 == 0).all()) else 1
        self._where, self._scales_at = where.to(device), scales_at.to(device)
        self._pieces = torch.tensor(pieces, dtype=torch.int32).to(device)

    def stage(self, plan: TailPlan, tables: Tables) -> None:
        """Copies what the plan lists; to be launched before the step's first product."""
        stage_kernel[(4 * multiprocessors(tables.data.device),)](
            tables.data,
            tables.ranks,
            tables.offsets,
            tables.scales,
            self._where,
            self._scales_at,
            self._pieces,
            len(self._pieces),
            plan.staged,
            tables.ranks.stride(0),
            GRANULE=GRANULE,
            STAGED=STAGED,
            BN=PIECE,
            VEC=self._vector,
            num_warps=4,
        )


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is launched."""

    rows: int
    columns: int
    """Of a program: of rows TILE (tail_plan.py) or half of it, of columns a power of two, 16 or more."""
    num_warps: int = 4

    def __post_init__(self) -> None:
        if self.rows not in (TILE // 2, TILE):
            raise ValueError(f"rows: expected {TILE // 2} or {TILE}, found {self.rows}")


# Each the best in sum of up to 14, each kernel alone on an 8B model's shapes (H200, benchmarks/RESULTS.md).
PLAIN = Config(32, 64)
"""Of both kernels without deltas from beside."""
WITH_OTHERS = Config(16, 64)
"""Of both with some."""
GATED_SLOTS = Config(16, 128, num_warps=2)
"""Of the gate with several slots and without."""


def expand(
    y: Tensor,
    b: Tensor,
    scales: Tensor,
    offsets: tuple[int, ...],
    widths: tuple[int, ...],
    plan: TailPlan,
    delta: Tensor | None = None,
    config: Config | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Adds to the first d columns of y [T, d + spare], in place, what its last ones and the plan say, and delta [T, d]
    for the tokens whose place is BESIDE; returns them, [T, d]. With residual [T, d] y stays as it is, and what is
    returned is a tensor of its own, their sum with residual. offsets, widths: columns of each target. b,
    scales: as in Tail."""
    tokens, d = _check(y, b, plan, len(widths)), sum(widths)
    if residual is not None and (residual.shape != (tokens, d) or not residual.is_contiguous()):
        raise ValueError(f"residual: expected [{tokens}, {d}] in order, found {list(residual.shape)}")
    config = config or (PLAIN if delta is None else WITH_OTHERS)
    vector = 16 // y.element_size()
    chunks = sum(-(-width // config.columns) for width in widths)
    out = y[:, :d] if residual is None else torch.empty_like(residual)
    expand_kernel[(-(-tokens // config.rows) * chunks,)](
        y,
        out,
        y if residual is None else residual,
        y if delta is None else delta,
        b,
        scales,
        plan.tells,
        plan.places,
        plan.weights,
        tokens,
        y.stride(0),
        out.stride(0),
        NT=len(widths),
        OFFSETS=offsets,
        WIDTHS=widths,
        CHUNKS=chunks,
        D=d,
        SLOTS=plan.shape.slots,
        SCALES=SLOTS,
        GRANULE=GRANULE,
        ENDS=ENDS,
        BESIDE=delta is not None,
        RESIDUAL=residual is not None,
        BM=config.rows,
        TILE=TILE,
        BN=config.columns,
        WHOLE=all(width % config.columns == 0 for width in widths),
        VEC=vector if all(n % vector == 0 for n in (*offsets, *widths)) else 1,
        num_warps=config.num_warps,
    )
    return out


def gated(
    y: Tensor,
    b: Tensor,
    scales: Tensor,
    gate: str,
    plan: TailPlan,
    delta: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """y [T, 2 width + spare] -> [T, width]: activation(gate + its delta) · (up + its delta); as `expand`. gate: of
    layers.GATES."""
    tokens, width = _check(y, b, plan, 2), b.shape[1] // 2
    config = config or (WITH_OTHERS if delta is not None else PLAIN if plan.shape.slots == 1 else GATED_SLOTS)
    h = y.new_empty(tokens, width)
    gated_kernel[(-(-tokens // config.rows) * -(-width // config.columns),)](
        y,
        y if delta is None else delta,
        h,
        b,
        scales,
        plan.tells,
        plan.places,
        plan.weights,
        tokens,
        y.stride(0),
        WIDTH=width,
        SLOTS=plan.shape.slots,
        SCALES=SLOTS,
        GRANULE=GRANULE,
        ENDS=ENDS,
        BESIDE=delta is not None,
        GATE=gate,
        FAST=y.is_cuda,  # Triton's interpreter has no libdevice
        BM=config.rows,
        TILE=TILE,
        BN=config.columns,
        num_warps=config.num_warps,
    )
    return h


def _check(y: Tensor, b: Tensor, plan: TailPlan, targets: int) -> int:
    """Rows of y."""
    tokens = y.shape[0]
    if tokens > plan.shape.tokens:
        raise ValueError(f"y: {tokens} rows are more than the {plan.shape.tokens} tokens that the plan has room for")
    least = b.shape[1] + plan.shape.slots * targets * GRANULE
    if y.stride(1) != 1 or y.shape[1] < least:
        raise ValueError(f"y: expected rows of adjacent elements, {least} or more, found {list(y.shape)}")
    return tokens
