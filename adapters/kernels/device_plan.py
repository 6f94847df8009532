"""The batch plan as the GPU kernels read it: fixed-size int32 arrays in one buffer, their real lengths beside them.

A kernel works on tiles: at most `block_m` consecutive entries of one segment, so that one tile has one block of
factors. How many tiles there are is read on the device, so a CUDA graph captured with one plan replays with any
other that fits the same PlanShape, after one host-to-device copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.plan import LoraPlan, ranges

RANK_BUCKETS = (16, 64, 512)
WALKED = 64
"""Larger buckets are walked in blocks of ranks: see `rank_block`."""
MOST_BLOCKS = 16
"""Blocks of ranks that a tile has at most."""
_ALIGN = 16
"""Arrays begin at multiples of 64 bytes."""


class PlanSizeError(ValueError):
    """A plan does not fit the fixed shape it was to be packed into."""


def rank_bucket(rank: int) -> int:
    """The smallest bucket that holds `rank` (1..512). Sizes intermediate buffers and loops, never memory traffic."""
    for bucket in RANK_BUCKETS:
        if rank <= bucket:
            return bucket
    raise ValueError(f"rank {rank}: the largest served rank is {RANK_BUCKETS[-1]}")


def rank_block(block_m: int) -> int:
    """Ranks of a block, where they are walked: less is wasted on small ranks, and large tiles reuse more."""
    return 32 if block_m <= 16 else 64


def rank_blocks(max_rank: int, block_m: int) -> int:
    """Blocks of ranks that a tile can have; 1 where they are not walked."""
    bucket = rank_bucket(max_rank)
    return 1 if bucket <= WALKED else -(-bucket // rank_block(block_m))


def laid_out(sizes: dict[str, int]) -> dict[str, slice]:
    """Where arrays of so many int32 elements lie in one buffer."""
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = slice(at, at + size)
        at += -(-size // _ALIGN) * _ALIGN
    return found


def length(slices: dict[str, slice]) -> int:
    """Of a buffer for arrays that lie so, such that another one may follow."""
    return -(-max(where.stop for where in slices.values()) // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class PlanShape:
    """Capacities of a packed plan, and where each array lies in the buffer (in int32 elements)."""

    entries: int
    """(token, adapter) pairs."""
    tiles: int
    waves: int
    block_m: int
    """Entries of a tile at most: a power of two, 16 or more."""
    rank_blocks: int = 1
    """Of a tile at most. If more than 1, the plan lists those that there are: in a batch of mixed ranks, programs for
    blocks that most tiles do not have would take longer than those of the small ranks."""

    def __post_init__(self) -> None:
        if self.block_m < 16 or self.block_m & (self.block_m - 1):
            raise ValueError(f"block_m: {self.block_m} is not a power of two of at least 16")
        if min(self.entries, self.tiles, self.waves, self.rank_blocks) < 1:
            raise ValueError(f"{self}: every capacity must be at least 1")

    @classmethod
    def of(cls, plan: LoraPlan, block_m: int, max_rank: int) -> PlanShape:
        """The tightest shape for one plan, whose rows have no rank above `max_rank`."""
        tiles = int((-(-np.diff(plan.seg_start) // block_m)).sum())
        return cls(len(plan.tokens), tiles, len(plan.waves), block_m, rank_blocks(max_rank, block_m))

    @classmethod
    def bounded(cls, entries: int, segments: int, waves: int, block_m: int, max_rank: int) -> PlanShape:
        """A shape that fits every plan of at most so many entries, segments and waves, and ranks up to `max_rank`."""
        tiles = min(entries, segments + entries // block_m)
        return cls(entries, tiles, waves, block_m, rank_blocks(max_rank, block_m))

    @cached_property
    def slices(self) -> dict[str, slice]:
        sizes = {
            "wave_tiles": self.waves + 1,
            "tokens": self.entries,
            "weights": self.entries,
            "tile_row": self.tiles,
            "tile_start": self.tiles,
            "tile_len": self.tiles,
        }
        if self.rank_blocks > 1:
            sizes |= {"num_blocks": 1, "blocks": self.tiles * self.rank_blocks}
        return laid_out(sizes)

    @cached_property
    def size(self) -> int:
        """Length of the buffer in int32 elements."""
        return length(self.slices)


def pack(
    plan: LoraPlan | None,
    shape: PlanShape,
    out: NDArray[np.int32],
    ranks: NDArray[np.integer] | None = None,
) -> None:
    """Writes `plan` into out [shape.size]; places beyond its lengths are left as they are, kernels do not read them.

    None is the empty plan. ranks [segments]: the largest of each segment's row in any target, 0 for none; if not given,
    what the shape has room for. Raises PlanSizeError."""
    if out.shape != (shape.size,) or out.dtype != np.int32:
        raise ValueError(f"out: expected int32 [{shape.size}], found {out.dtype} {list(out.shape)}")
    part = {name: out[where] for name, where in shape.slices.items()}
    if plan is None:
        part["wave_tiles"][:] = 0
        if shape.rank_blocks > 1:
            part["num_blocks"][:] = 0
        return
    starts = plan.seg_start[:-1]
    lengths = np.diff(plan.seg_start)
    tiles_of = -(-lengths // shape.block_m)
    first_tile = np.zeros(len(tiles_of) + 1, dtype=np.int32)
    np.cumsum(tiles_of, out=first_tile[1:])
    tiles, entries = int(first_tile[-1]), len(plan.tokens)
    if entries > shape.entries or tiles > shape.tiles or len(plan.waves) > shape.waves:
        raise PlanSizeError(f"{entries} entries, {tiles} tiles and {len(plan.waves)} waves do not fit {shape}")

    part["tokens"][:entries] = plan.tokens
    part["weights"].view(np.float32)[:entries] = plan.weights
    if (tiles_of == 1).all():  # as in most steps in which all decode
        part["tile_row"][:tiles] = plan.seg_row
        part["tile_start"][:tiles] = starts
        part["tile_len"][:tiles] = lengths
    else:
        segment = np.repeat(np.arange(len(starts)), tiles_of)
        offset = (np.arange(tiles, dtype=np.int32) - first_tile[segment]) * shape.block_m
        part["tile_row"][:tiles] = plan.seg_row[segment]
        part["tile_start"][:tiles] = starts[segment] + offset
        part["tile_len"][:tiles] = np.minimum(lengths[segment] - offset, shape.block_m)
    if shape.rank_blocks > 1:
        blocks_of = np.full(tiles, shape.rank_blocks)
        if ranks is not None:
            blocks_of = np.repeat(-(-ranks // rank_block(shape.block_m)), tiles_of)
        count = int(blocks_of.sum())
        part["num_blocks"][:] = count
        firsts = np.arange(tiles, dtype=np.int32) * MOST_BLOCKS
        part["blocks"][:count] = ranges(firsts, blocks_of)
    # Waves that this plan does not have begin and end at the last tile, so a graph's spare launches find no work.
    part["wave_tiles"][:] = tiles
    for w, (first_segment, _) in enumerate(plan.waves):
        part["wave_tiles"][w] = first_tile[first_segment]


class DevicePlan:
    """Typed views of one packed plan on the device."""

    def __init__(self, shape: PlanShape, buffer: Tensor, max_rank: int, *, covers: bool = False) -> None:
        """buffer: int32 [shape.size], which the caller fills with what `pack` wrote. max_rank: no row of a plan packed
        here has a larger rank in any target; host-known, as it decides how kernels are compiled. covers: plans packed
        here cover their step (adapters/plan.py)."""
        if buffer.dtype != torch.int32 or buffer.numel() != shape.size:
            raise ValueError(f"buffer: expected int32 [{shape.size}], found {buffer.dtype} {list(buffer.shape)}")
        self.shape = shape
        self.buffer = buffer
        self.covers = covers
        self.bucket = rank_bucket(max_rank)
        part = {name: buffer[where] for name, where in shape.slices.items()}
        self.wave_tiles = part["wave_tiles"]
        """[waves + 1] first tile of each wave; the last is the number of tiles."""
        self.tokens = part["tokens"]
        """[entries] index of each entry's token."""
        self.weights = part["weights"].view(torch.float32)
        """[entries]"""
        self.tile_row = part["tile_row"]
        """[tiles] arena row; -1: these tokens have no adapter."""
        self.tile_start = part["tile_start"]
        """[tiles] first entry."""
        self.tile_len = part["tile_len"]
        """[tiles] entries, 1..block_m."""
        self.num_blocks = part.get("num_blocks")
        """[1]; None: each tile is one block of ranks."""
        self.blocks = part.get("blocks")
        """[num_blocks] MOST_BLOCKS times the tile, plus the number of a block of ranks that it has."""
        if (self.blocks is not None) != (self.bucket > WALKED):
            raise ValueError(f"shape: {shape} is not one for ranks up to {max_rank}")

    @classmethod
    def from_plan(
        cls,
        plan: LoraPlan,
        max_rank: int,
        device: torch.device | str,
        block_m: int = 16,
        *,
        covers: bool = False,
        ranks: NDArray[np.integer] | None = None,
    ) -> DevicePlan:
        """A plan in a buffer of its own, of just its size: one allocation, one copy. ranks: as for `pack`."""
        shape = PlanShape.of(plan, block_m, max_rank)
        pinned = torch.device(device).type == "cuda"
        host = torch.empty(shape.size, dtype=torch.int32, pin_memory=pinned)
        pack(plan, shape, host.numpy(), ranks)
        # A fresh pinned buffer per plan: the caching host allocator reuses it only after the copy's event.
        return cls(shape, host.to(device, non_blocking=True), max_rank, covers=covers)
