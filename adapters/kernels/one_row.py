"""Products of a single row: what a step of one decoding sequence does.

    shrink     s = w · scale · (x Aᵀ)             float32, of every adapter of the row
    product    y = x W0ᵀ + bias + Σ s B (+ residual)      x [1, k] -> y [1, d]

Such a step takes the time of reading the weights. Product reads an 8B model's at 3.8 to 4.4 TB/s, where torch's way to
cuBLAS for one row reads them at 2.7 to 4.0 (H200, 4.8 by its data sheet; benchmarks/RESULTS.md). Its programs are small
and many, and they start early (early.py): their first tiles are on their way while the kernel before is at work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from adapters.kernels import early
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.one_row_kernels import one_row_kernel, shrink_row_kernel
from adapters.kernels.triton_lora import Tables
from adapters.site import Site

COLUMNS = 4
"""Of a program."""
REGISTERS = 128
"""Of a thread, with adapters. With tiles of 1,024 elements the compiler, left alone, took more, and 8 of an 8B model's
layers 2 to 4% longer (H100); with those of 512 either takes as long. 112 and less take longer (H200)."""
_TILE_BYTES = 1024
"""Of one column's part of a tile at most. Of 2 to 8 columns and 256 to 1,024 elements, 4 x 512 were the fastest, or
within 5% of it, in each of an 8B model's four products, alone and with an adapter (H200)."""
_RANKS_AT_ONCE = 32
"""Of an adapter that product adds at once, at most."""
_SHRINK_TILE = 8192
"""Elements of a row of A that shrink reads at once, at most."""
_SHRINK_PROGRAMS = 32
"""For one adapter in one target, at most."""


@dataclass(frozen=True, slots=True)
class Deltas:
    """The adapters of the row."""

    s: Tensor
    """float32 [entries, targets * rank bucket], what `shrink` gave."""
    targets: Tensor
    """int32 [n], target indices on the device."""
    offsets: tuple[int, ...]
    """First column of each target."""
    widths: tuple[int, ...]
    plan: DevicePlan
    tables: Tables


def fits(site: Site) -> bool:
    """Whether no program's columns are of two targets."""
    return all(n % COLUMNS == 0 for n in (*site.offsets, *site.widths))


def shrink(x: Tensor, targets: Tensor, plan: DevicePlan, tables: Tables) -> Tensor:
    """x [1, k] -> s. `product` must be the next that is launched on the stream."""
    _check(x, x.shape[1])
    count, k = targets.numel(), x.shape[1]
    s = torch.empty(plan.shape.entries, count * plan.bucket, dtype=torch.float32, device=x.device)
    starts_early = early.can_start_early(x.device)
    ranks = max(1, plan.bucket // _SHRINK_PROGRAMS)
    tile = min(_SHRINK_TILE, _half(k))
    shrink_row_kernel[(plan.shape.tiles * count * (plan.bucket // ranks),)](
        x,
        tables.data,
        tables.ranks,
        tables.offsets,
        tables.scales,
        targets,
        plan.weights,
        plan.tile_row,
        plan.tile_start,
        plan.wave_tiles,
        s,
        tables.ranks.stride(0),
        K=k,
        BK=tile,
        WAVES=plan.shape.waves,
        NT=count,
        BUCKET=plan.bucket,
        RANKS=ranks,
        VEC=16 // x.element_size(),
        EARLY=starts_early,
        num_warps=max(1, min(8, tile // 512)),
        **early.options(starts_early),
    )
    return s


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Deltas | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [1, k], weight [d, k] with adjacent elements of a row, bias [d] or None, residual [1, d] or None -> [1, d] in
    x's dtype, rounded once."""
    n, k = weight.shape
    _check(x, k)
    if residual is not None:
        _check(residual, n, "residual")
    if weight.stride(1) != 1:
        raise ValueError(f"weight: elements of a row must be adjacent, found strides {weight.stride()}")
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    starts_early = early.can_start_early(x.device)
    tile = min(_TILE_BYTES // x.element_size(), _half(k))
    adapters = (y,) * 10
    if deltas is not None:
        tables, plan = deltas.tables, deltas.plan
        adapters = (
            tables.data,
            tables.ranks,
            tables.offsets,
            tables.scales,
            deltas.targets,
            plan.weights,
            plan.tile_row,
            plan.tile_start,
            plan.wave_tiles,
            deltas.s,
        )
    one_row_kernel[(-(-n // COLUMNS),)](
        x,
        weight,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        *adapters,
        n,
        weight.stride(0),
        deltas.tables.ranks.stride(0) if deltas else 0,
        K=k,
        BN=COLUMNS,
        BK=tile,
        WHOLE=n % COLUMNS == 0 and k % (2 * tile) == 0,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ADAPTERS=deltas is not None,
        MORE=deltas is not None and (deltas.plan.shape.waves > 1 or deltas.plan.bucket > _RANKS_AT_ONCE),
        WAVES=deltas.plan.shape.waves if deltas else 0,
        NT=len(deltas.widths) if deltas else 1,
        OFFSETS=deltas.offsets if deltas else (0,),
        WIDTHS=deltas.widths if deltas else (n,),
        BUCKET=deltas.plan.bucket if deltas else 1,
        BR=min(deltas.plan.bucket, _RANKS_AT_ONCE) if deltas else 1,
        EARLY=starts_early,
        num_warps=max(1, min(4, tile // 256)),
        maxnreg=None if deltas is None else REGISTERS,
        **early.options(starts_early),
    )
    return y


def _half(k: int) -> int:
    """Elements of a tile of which two hold a row: a power of two."""
    return max(64, triton.next_power_of_2(-(-k // 2)))


def _check(x: Tensor, k: int, name: str = "x") -> None:
    if x.shape != (1, k):
        raise ValueError(f"{name}: expected [1, {k}], found {list(x.shape)}")
    if x.stride(1) != 1:
        raise ValueError(f"{name}: elements of a row must be adjacent, found strides {x.stride()}")
