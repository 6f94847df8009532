"""Products of a single row: what a step of one decoding sequence does, base weights and adapters in one kernel.

    y = x W0ᵀ + bias + Σ w · scale · (x Aᵀ) B           x [1, k] -> y [1, d]; x Aᵀ is triton_lora.shrink's

Such a step is the time of reading the weights. A library's product for one row reads them at 2.0 to 2.8 TB/s where
this one reaches 2.7 to 3.1 (H100, 3.35 by its data sheet; benchmarks/RESULTS.md), as its programs are small and many,
and as it starts early: its first tiles are on their way while the kernel before is still at work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from adapters.kernels import early
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.one_row_kernels import one_row_kernel
from adapters.kernels.triton_lora import Tables
from adapters.site import Site

COLUMNS = 4
"""Of a program. With tiles of 4 x 1,024 elements, of which two are on their way, this was the fastest of 14 layouts in
each of an 8B model's four products."""
_TILE_BYTES = 2048
"""Of one column's part of a tile at most."""
_RANKS = 32
"""Expanded at once at most."""


@dataclass(frozen=True, slots=True)
class Deltas:
    """What the adapters of the row add: arguments as for triton_lora.expand."""

    partials: Tensor
    targets: Tensor
    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    plan: DevicePlan
    tables: Tables


def fits(site: Site) -> bool:
    """Whether no program's columns are of two targets."""
    return all(n % COLUMNS == 0 for n in (*site.offsets, *site.widths))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Deltas | None = None) -> Tensor:
    """x [1, k], weight [d, k] with adjacent elements of a row, bias [d] or None -> [1, d] in x's dtype."""
    n, k = weight.shape
    if x.shape != (1, k):
        raise ValueError(f"x: expected [1, {k}], found {list(x.shape)}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("elements of a row must be adjacent")
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    starts_early = early.can_start_early(x.device)
    tile = min(_TILE_BYTES // x.element_size(), max(64, triton.next_power_of_2(-(-k // 2))))
    grid = (-(-n // COLUMNS),)
    shared = {
        "K": k,
        "BN": COLUMNS,
        "BK": tile,
        "WHOLE": n % COLUMNS == 0 and k % (2 * tile) == 0,
        "BIAS": bias is not None,
        "EARLY": starts_early,
        "num_warps": max(1, min(4, COLUMNS * tile * x.element_size() // 2048)),
        **early.options(starts_early),
    }
    if deltas is None:
        one_row_kernel[grid](
            x,
            weight,
            y if bias is None else bias,
            y,
            *[y] * 10,
            n,
            weight.stride(0),
            0,
            0,
            ADAPTERS=False,
            WAVES=0,
            NT=1,
            OFFSETS=(0,),
            WIDTHS=(n,),
            BUCKET=16,
            BR=16,
            SPLITS=1,
            SPLITS_PADDED=1,
            **shared,
        )
        return y
    plan, tables, partials = deltas.plan, deltas.tables, deltas.partials
    one_row_kernel[grid](
        x,
        weight,
        y if bias is None else bias,
        y,
        tables.data,
        tables.ranks,
        tables.offsets,
        tables.scales,
        deltas.targets,
        plan.weights,
        plan.tile_row,
        plan.tile_start,
        plan.wave_tiles,
        partials,
        n,
        weight.stride(0),
        tables.ranks.stride(0),
        partials.stride(0),
        ADAPTERS=True,
        WAVES=plan.shape.waves,
        NT=len(deltas.widths),
        OFFSETS=deltas.offsets,
        WIDTHS=deltas.widths,
        BUCKET=plan.bucket,
        BR=min(plan.bucket, _RANKS),
        SPLITS=partials.shape[0],
        SPLITS_PADDED=triton.next_power_of_2(partials.shape[0]),
        **shared,
    )
    return y
