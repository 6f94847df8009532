"""Launches the kernels of adapters with a tail (tail.py says what that is): staging once a step, shrink once a site.

    stage    W's tail[o_j + n, c + r] = B_j[r, n]                             of the adapters that are not there yet
    shrink   out[t] = [x[t] | s],  s[c + r] = w · scale_j · (x[t] A_j^T)[r]   zeros elsewhere

Of two kernels and two passes over the outputs that a site costs otherwise (triton_lora.py), one kernel is left, but it
has to run before the base product, not beside it. That pays where many tokens share few adapters: prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.kernels import early, tail
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.tail import RANKS, SLOTS
from adapters.kernels.tail_kernels import shrink_kernel, stage_kernel
from adapters.kernels.triton_lora import Tables, multiprocessors
from adapters.site import Site

PIECE = 64
"""Rows of W that one step of a staging program fills."""
LEAST_SHARE, MOST_SHARE = 512, 2048
"""Elements of k of a shrink program: with fewer, adding the splits up takes longer than they save; with more, few
programs walk long ones. Between them there is one program a multiprocessor. Of 32 launch configurations on an H100
the rule's was the best or at most 6% slower from 512 tokens on, as far as it was among them (benchmarks/RESULTS.md)."""
COUNTERS = 1 << 14


class Tails:
    """The tails of a model's sites: where they lie, and what stands in them."""

    def __init__(self, sites: Iterable[tuple[Site, Tensor]], targets: int, device: torch.device | str) -> None:
        """sites: each with its weight and tail, [d, k + spare]. targets: number of all target indices."""
        places = torch.zeros(targets, 2, dtype=torch.int64)
        widths = torch.zeros(targets, dtype=torch.int32)
        pieces: list[tuple[int, int]] = []
        for site, whole in sites:
            stride = whole.stride(0)
            for j, (target, offset, width) in enumerate(zip(site.targets, site.offsets, site.widths, strict=True)):
                first = offset * stride + site.in_features + j * RANKS
                places[target, 0] = whole.data_ptr() + first * whole.element_size()
                places[target, 1] = stride
                widths[target] = width
                pieces += [(target, n) for n in range(0, width, PIECE)]
        self.slots = tail.Slots()
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        """Of `shrink`; zero between its launches."""
        self._places, self._widths = places.to(device), widths.to(device)
        self._pieces = torch.tensor(pieces, dtype=torch.int32).to(device)

    def stage(self, plan: DevicePlan, tables: Tables) -> None:
        """Copies what the plan lists; to be launched before the step's first product."""
        vector = 16 // tables.data.element_size()
        stage_kernel[(4 * multiprocessors(tables.data.device),)](
            tables.data,
            tables.ranks,
            tables.offsets,
            self._places,
            self._widths,
            self._pieces,
            len(self._pieces),
            plan.staged,
            tables.ranks.stride(0),
            SLOTS=SLOTS,
            RANKS=RANKS,
            BN=PIECE,
            VEC=vector,
            num_warps=4,
        )


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """How shrink is launched."""

    rows: int
    """Of a program: a power of two, 16 to a tile's."""
    splits: int
    """Programs among which k is divided."""
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3


def config_of(k: int, tokens: int, targets: int, device: torch.device) -> ShrinkConfig:
    """For rows of k elements, so many of them, and targets of a site."""
    rows = 32
    programs = max(1, -(-tokens // rows) * targets)
    filling = 1 << max(0, (multiprocessors(device) // programs).bit_length() - 1)
    return ShrinkConfig(rows, max(1, -(-k // MOST_SHARE), min(filling, k // LEAST_SHARE)))


def shrink(x: Tensor, targets: Tensor, plan: DevicePlan, tables: Tables, counters: Tensor) -> Tensor:
    """x [T, k] -> [T, k + spare]: x, and behind it s. Rows that the plan does not name hold anything."""
    out = x.new_empty(x.shape[0], x.shape[1] + tail.spare(targets.numel()))
    _shrink(x, out, targets, plan, tables, counters)
    return out


def shrink_behind(wide: Tensor, targets: Tensor, plan: DevicePlan, tables: Tables, counters: Tensor) -> None:
    """Writes s behind x in wide [T, k + spare], whose first k columns are x already."""
    _shrink(wide[:, : wide.shape[1] - tail.spare(targets.numel())], wide, targets, plan, tables, counters)


def _shrink(
    x: Tensor,
    out: Tensor,
    targets: Tensor,
    plan: DevicePlan,
    tables: Tables,
    counters: Tensor,
    config: ShrinkConfig | None = None,
) -> None:
    count, k = targets.numel(), x.shape[1]
    shape = plan.shape
    if plan.columns is None:
        raise ValueError("plan: it has no places in the tail")
    config = config or config_of(k, shape.entries, count, x.device)
    rows, splits = min(config.rows, shape.block_m), config.splits
    items = shape.tiles * (shape.block_m // rows) * count
    if items > len(counters):
        raise ValueError(f"plan: {shape.tiles} tiles of {count} targets are more than {len(counters)} counters")
    partials = torch.empty(
        items * splits * rows * plan.bucket if splits > 1 else 0, dtype=torch.float32, device=x.device
    )
    copies = x.data_ptr() != out.data_ptr()
    # Where x is copied it comes from attention, whose kernels may be on two streams.
    starts_early = not copies and early.can_start_early(x.device)
    shrink_kernel[(items * splits,)](
        x,
        out,
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
        plan.columns,
        plan.wave_tiles[-1:],
        partials,
        counters,
        x.stride(0),
        out.stride(0),
        tables.ranks.stride(0),
        NT=count,
        K=k,
        RANKS=RANKS,
        PARTS=shape.block_m // rows,
        BM=rows,
        BR=plan.bucket,
        BK=config.block_k,
        SPLITS=splits,
        VEC=16 // x.element_size(),
        COPY=copies,
        EARLY=starts_early,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **early.options(starts_early),
    )
