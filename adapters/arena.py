"""The arena: one flat device tensor in which blocks of any size lie side by side, and the table that finds them.

The table maps a row to each target's (rank, A offset, B offset, scale). Kernels read it on the device; only the
compute stream (the current stream of the engine thread) writes it, so a step sees it exactly as it was at launch.
A row that holds no block has rank 0 everywhere: a kernel that reads it adds nothing.

Rewriting a region safely: whoever writes into a fresh region from another stream first waits for `fence()`, taken
after the allocation. It lies behind every step launched so far, and so behind the last one that named the region's
former row, and behind every compaction move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.manifest import Manifest
from adapters.regions import Region, RegionAllocator
from adapters.tiers import RowEntries

BOUNCE_BYTES = 8 << 20
STAGED_ROWS = 32
"""Rows whose uploads may be under way at once without new pinned memory."""


class HostTable(NamedTuple):
    """Numpy mirrors of the device table: what the CPU path and checks read."""

    ranks_np: NDArray[np.int32]
    offsets_np: NDArray[np.int64]
    scales_np: NDArray[np.float32]


class StreamFence:
    """A CUDA event on the compute stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())


class Arena:
    """See the module's text. All calls come from the engine thread, between steps."""

    def __init__(
        self,
        features: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        nbytes: int,
        rows: int,
    ) -> None:
        """`features`: (in_features k, out_features d) of each target index. `nbytes`: size of the arena (rounded
        down to 256). `rows`: blocks that may be resident at once."""
        self._allocator = RegionAllocator(nbytes)
        self._in = np.array([k for k, _ in features], dtype=np.int64)
        self._out = np.array([d for _, d in features], dtype=np.int64)
        targets = len(features)
        self.rows = rows
        self.capacity = self._allocator.capacity
        self.data: Tensor = torch.empty(self.capacity // dtype.itemsize, dtype=dtype, device=device)
        """[elements] of the compute dtype."""
        self.ranks_np: NDArray[np.int32] = np.zeros((rows, targets), np.int32)
        self.offsets_np: NDArray[np.int64] = np.zeros((rows, targets, 2), np.int64)
        self.scales_np: NDArray[np.float32] = np.zeros((rows, targets), np.float32)
        self.largest: NDArray[np.int32] = np.zeros(rows, np.int32)
        """[rows] a row's largest rank in any target; 0 for a row without a block."""
        self.generation: NDArray[np.int64] = np.zeros(rows, np.int64)
        """[rows], bumped whenever a row's block leaves: what was prepared for another generation is stale."""
        self._cuda = self.data.device.type == "cuda"
        # On CPU the tensors share the mirrors' memory, so one write serves both.
        mirrors = (self.ranks_np, self.offsets_np, self.scales_np)
        self.ranks, self.offsets, self.scales = (
            torch.from_numpy(mirror).to(self.data.device, copy=self._cuda) for mirror in mirrors
        )
        self._bytes = self.data.view(torch.uint8)
        self._bounce = torch.empty(min(BOUNCE_BYTES, self.capacity), dtype=torch.uint8, device=device)
        self._regions: dict[int, Region] = {}
        self._row_of: dict[Region, int] = {}
        if self._cuda:
            # Fills the cache of PyTorch's pinned allocator: later row uploads need no (slow) pinning call.
            staged = [torch.from_numpy(mirror[0]).pin_memory() for mirror in mirrors * STAGED_ROWS if len(mirror)]
            del staged

    @classmethod
    def for_manifest(cls, manifest: Manifest, *, device: torch.device | str, nbytes: int, rows: int) -> Arena:
        features = [(module.in_features, module.out_features) for module in manifest.linears]
        return cls(features, dtype=getattr(torch, manifest.dtype), device=device, nbytes=nbytes, rows=rows)

    @property
    def bytes(self) -> Tensor:
        """[capacity] uint8 view of `data`; regions are ranges of it."""
        return self._bytes

    @property
    def host_table(self) -> HostTable:
        return HostTable(self.ranks_np, self.offsets_np, self.scales_np)

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_bytes

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that lies outside the largest hole: 0.0 when all is in one piece."""
        free = self._allocator.free_bytes
        return 1.0 - self._allocator.largest_free / free if free else 0.0

    def allocate(self, nbytes: int) -> Region | None:
        """A region aligned to 256 bytes, or None when no hole is long enough (compact() may make one)."""
        return self._allocator.allocate(nbytes)

    def free(self, region: Region) -> None:
        """Gives a region back; its row must have been unbound."""
        if region in self._row_of:
            raise ValueError(f"{region} is still bound to a row")
        self._allocator.free(region)

    def region_of(self, row: int) -> Region | None:
        """The region bound to `row`; None for a row without a block."""
        return self._regions.get(row)

    def bind(self, row: int, region: Region, entries: RowEntries) -> None:
        """Makes `row` name the block whose bytes lie in `region`; to be called once they are there."""
        if row in self._regions or region in self._row_of or region not in self._allocator:
            raise ValueError(f"row {row} or {region} is in use, or the region is not allocated")
        present = entries.ranks > 0
        self.ranks_np[row] = entries.ranks
        self.largest[row] = entries.ranks.max(initial=0)
        self.offsets_np[row] = np.where(present[:, None], entries.offsets + region.offset // self.data.itemsize, 0)
        self.scales_np[row] = entries.scales
        self._regions[row] = region
        self._row_of[region] = row
        self._upload(row)

    def unbind(self, row: int) -> None:
        """Empties a row (rank 0 everywhere) and bumps its generation. The region stays allocated."""
        region = self._regions.pop(row, None)
        if region is None:
            raise ValueError(f"row {row} holds no block")
        del self._row_of[region]
        self.ranks_np[row] = 0
        self.largest[row] = 0
        self.offsets_np[row] = 0
        self.scales_np[row] = 0.0
        self.generation[row] += 1
        self._upload(row)

    def compact(self, max_bytes: int, want: int | None = None) -> int:
        """Slides bound regions towards the front and returns the bytes moved: 0 when there is nothing (more) to do.

        Stops after about `max_bytes` (one region always moves, whatever its size), or as soon as a hole of `want`
        bytes exists. Regions that are being written (allocated, not bound) stay where they are.
        """
        moved = cursor = 0
        for region in self._allocator.regions():
            row = self._row_of.get(region)
            if row is None or region.offset == cursor:
                cursor = region.end
                continue
            if want is not None and self._allocator.largest_free >= want:
                break
            if moved and moved + region.nbytes > max_bytes:
                break
            shift = (region.offset - cursor) // self.data.itemsize
            self._move(region.offset, cursor, region.nbytes)
            self._allocator.relocate(region, cursor)
            self.offsets_np[row] -= np.where(self.ranks_np[row] > 0, shift, 0)[:, None]
            self._upload(row, offsets_only=True)
            moved += region.nbytes
            cursor = region.end
        return moved

    def fence(self) -> StreamFence | None:
        """A mark behind everything launched so far on the compute stream; None on CPU, where steps are over when
        they return."""
        return StreamFence(torch.cuda.current_stream(self.data.device)) if self._cuda else None

    def check_integrity(self) -> None:
        """Raises RuntimeError unless regions tile the arena, bound rows point inside their own regions with A and B
        apart, other rows are empty, and the device's table equals the mirrors."""
        self._allocator.check_integrity()
        if {region: row for row, region in self._regions.items()} != self._row_of:
            raise RuntimeError("arena: rows and regions are out of step")
        used = set(np.flatnonzero(self.ranks_np.any(axis=1)).tolist())
        if not used <= self._regions.keys():
            raise RuntimeError(f"arena: rows {sorted(used - self._regions.keys())} hold no block but have ranks")
        for row, region in self._regions.items():
            if region not in self._allocator:
                raise RuntimeError(f"arena: row {row} names a region that is not allocated")
            self._check_row(row, region)
        pairs = ((self.ranks, self.ranks_np), (self.offsets, self.offsets_np), (self.scales, self.scales_np))
        if not np.array_equal(self.largest, self.ranks_np.max(axis=1, initial=0)):
            raise RuntimeError("arena: a row's largest rank is not that of its ranks")
        if not all(np.array_equal(device.cpu().numpy(), mirror) for device, mirror in pairs):
            raise RuntimeError("arena: the device's table differs from its mirror")

    def _check_row(self, row: int, region: Region) -> None:
        ranks = self.ranks_np[row].astype(np.int64)
        present = ranks > 0
        starts = self.offsets_np[row][present]
        ends = starts + np.stack([ranks * self._in, ranks * self._out], axis=1)[present]
        order = np.argsort(starts, axis=None)
        flat_starts, flat_ends = starts.reshape(-1)[order], ends.reshape(-1)[order]
        size = self.data.itemsize
        inside = not len(order) or (flat_starts[0] * size >= region.offset and flat_ends[-1] * size <= region.end)
        if not inside or (flat_starts[1:] < flat_ends[:-1]).any():
            raise RuntimeError(f"arena: row {row} points outside {region}, or its tensors overlap")

    def _upload(self, row: int, *, offsets_only: bool = False) -> None:
        if not self._cuda:
            return
        pairs = [(self.offsets, self.offsets_np)]
        if not offsets_only:
            pairs += [(self.ranks, self.ranks_np), (self.scales, self.scales_np)]  # type: ignore[list-item]
        for device, mirror in pairs:
            # A private pinned copy: the mirror may change again before the device has read this one. PyTorch's
            # pinned allocator reuses the memory only after the copy's event.
            device[row].copy_(torch.from_numpy(mirror[row]).pin_memory(), non_blocking=True)

    def _move(self, source: int, target: int, nbytes: int) -> None:
        """Moves bytes towards the front; the ranges may overlap."""
        gap = source - target
        direct = gap >= nbytes or gap >= len(self._bounce)
        step = gap if direct else len(self._bounce)
        for begin in range(0, nbytes, step):
            count = min(step, nbytes - begin)
            piece = self._bytes[source + begin : source + begin + count]
            if not direct:
                piece = self._bounce[:count].copy_(piece)
            self._bytes[target + begin : target + begin + count].copy_(piece)
