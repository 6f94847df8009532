"""Products of a single row: what a step of one decoding sequence does. One kernel for a base weight and the adapters.

    s = w · scale · (x Aᵀ)             float32, of every adapter of the row
    y = x W0ᵀ + bias + Σ s B           x [1, k] -> y [1, d]

Such a step takes the time of reading the weights. A library's product for one row reads them at 2.0 to 2.8 TB/s where
this one reaches 2.7 to 3.1 (H100, 3.35 by its data sheet; benchmarks/RESULTS.md): its programs are small and many, and
they start early (early.py), so that their first tiles are on their way while the kernels before are at work. The first
few compute s, while the others are at x W0ᵀ, and count it in a counter of the site, which the others look at before
they add s B.
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
_RANKS_AT_ONCE = 32
"""Of an adapter that are added at once, at most."""
_SHRINK_TILE = 2048
"""Elements of a row of A that a program reads at once, at most; it reads two."""
_ADDER = 1 << 13
"""What a program that adds s B counts, where one that computes s counts 1."""
_SHRINK_PROGRAMS = 32
"""Among which the ranks of one adapter in one target are divided, at most."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Those of the row."""

    targets: Tensor
    """int32 [n], target indices on the device."""
    offsets: tuple[int, ...]
    """First column of each target."""
    widths: tuple[int, ...]
    plan: DevicePlan
    tables: Tables
    counters: Tensor
    """int32, one for each target index of the model. The site's, that of its first target, is zero, and is again
    afterwards."""


def fits(site: Site) -> bool:
    """Whether no program's columns are of two targets."""
    return all(n % COLUMNS == 0 for n in (*site.offsets, *site.widths))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters | None = None) -> Tensor:
    """x [1, k], weight [d, k] with adjacent elements of a row, bias [d] or None -> [1, d] in x's dtype."""
    n, k = weight.shape
    if x.shape != (1, k):
        raise ValueError(f"x: expected [1, {k}], found {list(x.shape)}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"elements of a row must be adjacent, found strides {x.stride()} and {weight.stride()}")
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    starts_early = early.can_start_early(x.device)
    tile = min(_TILE_BYTES // x.element_size(), _half(k))
    arguments, constants, shrinks = _nothing(y) if adapters is None else _of(adapters, k, x)
    programs = -(-n // COLUMNS)
    if adapters is not None and (shrinks >= _ADDER or programs * _ADDER >= 2**31):
        raise ValueError(f"weight: {n} columns and {shrinks} programs for s are more than are counted")
    one_row_kernel[(shrinks + programs,)](
        x,
        weight,
        y if bias is None else bias,
        y,
        *arguments,
        n,
        weight.stride(0),
        K=k,
        BN=COLUMNS,
        BK=tile,
        WHOLE=n % COLUMNS == 0 and k % (2 * tile) == 0,
        BIAS=bias is not None,
        ADAPTERS=adapters is not None,
        SHRINKS=shrinks,
        ADDER=_ADDER,
        **constants,
        VEC=16 // x.element_size(),
        EARLY=starts_early,
        num_warps=max(1, min(4, tile // 256)),
        **early.options(starts_early),
    )
    return y


def _of(adapters: Adapters, k: int, x: Tensor) -> tuple[tuple[Tensor | int, ...], dict[str, object], int]:
    """(arguments, constants, programs that compute s) of a launch with adapters."""
    plan, tables, count = adapters.plan, adapters.tables, len(adapters.widths)
    ranks = max(1, plan.bucket // _SHRINK_PROGRAMS)
    tile = min(_SHRINK_TILE, _half(k))
    splits = -(-k // (2 * tile))
    s = torch.empty(splits, plan.shape.entries, count * plan.bucket, dtype=torch.float32, device=x.device)
    arguments = (
        tables.data,
        tables.ranks,
        tables.offsets,
        tables.scales,
        adapters.targets,
        plan.weights,
        plan.tile_row,
        plan.tile_start,
        plan.wave_tiles,
        s,
        adapters.counters,
        tables.ranks.stride(0),
        s.stride(0),
    )
    constants = {
        "SHRINK_K": tile,
        "SPLITS": splits,
        "RANKS": ranks,
        "WAVES": plan.shape.waves,
        "NT": count,
        "OFFSETS": adapters.offsets,
        "WIDTHS": adapters.widths,
        "BUCKET": plan.bucket,
        "BR": min(plan.bucket, _RANKS_AT_ONCE),
    }
    return arguments, constants, plan.shape.tiles * count * (plan.bucket // ranks) * splits


def _nothing(y: Tensor) -> tuple[tuple[Tensor | int, ...], dict[str, object], int]:
    """The same of one without; what is in the places is not read."""
    names = ("SHRINK_K", "SPLITS", "RANKS", "WAVES", "NT", "BUCKET", "BR")
    return (*[y] * 11, 0, 0), {**dict.fromkeys(names, 1), "OFFSETS": (0,), "WIDTHS": (y.shape[1],)}, 0


def _half(k: int) -> int:
    """Elements of a tile of which two hold a row: a power of two."""
    return max(64, triton.next_power_of_2(-(-k // 2)))
