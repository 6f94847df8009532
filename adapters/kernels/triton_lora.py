"""The LoRA products on the GPU: two Triton kernels per site, for all its targets and all adapters of the step.

    shrink   s[p, j, :] = x[tokens[p]] A_j^T                                  float32, by split of k
    expand   y[tokens[p], o_j : o_j + d_j] += weights[p] · scale_j · s[p, j, :] B_j      (or =, see `expand`)

Each factor's address, rank and scale are read from the arena's table on the device, and loads are masked at the true
rank, so memory traffic is that of the ranks themselves. Grids have a fixed size: how many items there are is read from
the plan, which is what lets a captured CUDA graph serve any batch (grouping of tokens by adapter as in Chen et al.
2023, "Punica"; adapters/kernels/reference.py states the mathematics).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from adapters.kernels import early
from adapters.kernels.device_plan import MOST_BLOCKS, WALKED, DevicePlan, rank_block
from adapters.kernels.lora_kernels import expand_kernel, expand_small_kernel, shrink_kernel
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig, expand_config, shrink_config
from adapters.site import Site

RANKS_AT_ONCE = 16
"""Of an adapter with one token that are on their way to a program's registers together."""
EXPAND_EARLY = 48
"""Up to so many tokens expand starts while shrink runs. In larger steps its programs, which wait, are in others' way
(benchmarks/RESULTS.md)."""


class Tables(Protocol):
    """What kernels read of the arena (adapters/arena.py). Blocks and tensors inside them start at multiples of 16
    bytes."""

    data: Tensor
    """[elements] in the compute dtype."""
    ranks: Tensor
    """int32 [rows, targets]"""
    offsets: Tensor
    """int64 [rows, targets, 2]: of A [r, k] and of B [r, d], in elements of `data`."""
    scales: Tensor
    """float32 [rows, targets]"""


def allocate_partials(plan: DevicePlan, targets: int, splits: int) -> Tensor:
    """Shrink's output, float32 [splits, entries, targets * rank bucket]; ranks beyond a row's own stay unwritten."""
    size = (splits, plan.shape.entries, targets * plan.bucket)
    return torch.empty(size, dtype=torch.float32, device=plan.buffer.device)


def shrink(
    x: Tensor,
    targets: Tensor,
    plan: DevicePlan,
    tables: Tables,
    config: ShrinkConfig | None = None,
    *,
    starts_next: bool = False,
) -> Tensor:
    """x [T, k] -> partials for `expand`. targets: int32 [n], target indices on the device. starts_next: what is
    launched next is an expand that starts early."""
    _check(x, tables)
    count, k = targets.numel(), x.shape[1]
    shape = plan.shape
    config = config or shrink_config(shape.entries, plan.bucket, shape.block_m, x.element_size())
    splits = config.splits(k)
    partials = allocate_partials(plan, count, splits)
    if config.block_r < plan.bucket and (plan.blocks is None or config.block_r != rank_block(shape.block_m)):
        raise ValueError(
            f"block_r: {config.block_r} is neither the rank bucket {plan.bucket} nor a plan's block of ranks"
        )
    items = shape.tiles * shape.rank_blocks * count * splits
    grid = (min(items, config.programs * multiprocessors(x.device)),)
    shrink_kernel[grid](
        x,
        tables.data,
        tables.ranks,
        tables.offsets,
        targets,
        plan.tokens,
        plan.tile_row,
        plan.tile_start,
        plan.tile_len,
        plan.tile_row if plan.blocks is None else plan.blocks,  # in the first case not read
        plan.wave_tiles[-1:] if plan.num_blocks is None else plan.num_blocks,
        partials,
        x.stride(0),
        tables.ranks.stride(0),
        partials.stride(0),
        NT=count,
        K=k,
        BUCKET=plan.bucket,
        BM=shape.block_m,
        BR=config.block_r,
        BK=config.block_k,
        SPLITS=splits,
        VEC=16 // x.element_size(),
        MOST_BLOCKS=MOST_BLOCKS,
        EARLY=starts_next,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partials


def expand(
    y: Tensor,
    partials: Tensor,
    targets: Tensor,
    offsets: tuple[int, ...],
    widths: tuple[int, ...],
    plan: DevicePlan,
    tables: Tables,
    config: ExpandConfig | None = None,
    *,
    add: bool = True,
    starts_early: bool = False,
) -> None:
    """Adds to y [T, d] in place, wave after wave. offsets, widths: columns of each target. add False: y may hold
    anything, and rows that the plan names are written; it has to name all that are read. starts_early: the kernel
    before is a shrink that lets it."""
    _check(y, tables)
    shape, vector = plan.shape, 16 // y.element_size()
    config = config or expand_config(shape.entries, plan.bucket, shape.block_m, y.element_size())
    small = not config.programs
    if small and plan.bucket > WALKED:
        raise ValueError(f"programs: 0, a program for each item, is not for the rank bucket {plan.bucket}")
    chunks = sum(-(-width // config.chunk) for width in widths)
    items, splits = shape.tiles * chunks, partials.shape[0]
    kernel = expand_small_kernel if small else expand_kernel
    grid = (items if small else min(items, config.programs * multiprocessors(y.device)),)
    for wave in range(shape.waves):
        early_one = small and starts_early and not wave
        own: dict[str, Any] = {"BR": config.block_r}
        if small:
            more_splits = triton.next_power_of_2(splits)
            own = {"MORE_SPLITS": more_splits, "AT_ONCE": RANKS_AT_ONCE, "EARLY": early_one}
        kernel[grid](
            y,
            tables.data,
            tables.ranks,
            tables.offsets,
            tables.scales,
            targets,
            plan.tokens,
            plan.weights,
            plan.tile_row,
            plan.tile_start,
            plan.tile_len,
            plan.wave_tiles,
            partials,
            wave,
            y.stride(0),
            tables.ranks.stride(0),
            partials.stride(0),
            NT=len(widths),
            OFFSETS=offsets,
            WIDTHS=widths,
            CHUNKS=chunks,
            BUCKET=plan.bucket,
            BM=shape.block_m,
            BN=config.block_n,
            CHUNK=config.chunk,
            SPLITS=splits,
            VEC=vector,
            ALIGNED=all(n % vector == 0 for n in (*offsets, *widths)),
            ADD=add or wave > 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **own,
            **({"maxnreg": config.registers} if config.registers and y.is_cuda else {}),
            **early.options(early_one),
        )


def deltas(
    y: Tensor,
    x: Tensor,
    targets: Tensor,
    offsets: tuple[int, ...],
    widths: tuple[int, ...],
    plan: DevicePlan,
    tables: Tables,
    *,
    add: bool = True,
) -> None:
    """Both: every entry's delta is written, or added, to y [T, d]. Arguments as for the two."""
    config = expand_config(plan.shape.entries, plan.bucket, plan.shape.block_m, y.element_size())
    starts_early = not config.programs and len(x) <= EXPAND_EARLY and early.can_start_early(x.device)
    partials = shrink(x, targets, plan, tables, starts_next=starts_early)
    expand(y, partials, targets, offsets, widths, plan, tables, config, add=add, starts_early=starts_early)


def apply(y: Tensor, x: Tensor, site: Site, plan: DevicePlan, tables: Tables) -> None:
    """Adds every entry's delta to y [T, out_features] in place; x [T, in_features], in the arena's dtype; rows of
    either may be apart, elements of a row may not."""
    deltas(y, x, target_tensor(site.targets, y.device), site.offsets, site.widths, plan, tables)


@lru_cache(maxsize=65536)
def target_tensor(targets: tuple[int, ...], device: torch.device) -> Tensor:
    """Target indices on the device, made once per site."""
    return torch.tensor(targets, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of the device; 2 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _check(tensor: Tensor, tables: Tables) -> None:
    if tensor.stride(1) != 1:
        raise ValueError(f"elements of a row must be adjacent, found strides {tensor.stride()}")
    if tensor.dtype != tables.data.dtype:
        raise ValueError(f"expected the arena's {tables.data.dtype}, found {tensor.dtype}")
