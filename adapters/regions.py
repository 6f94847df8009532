"""Variable-size regions inside one flat stretch of memory. Pure arithmetic: used for the arena and the host slab."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes. Vector loads and bulk copies want 16 to 128; 256 is what the CUDA allocator itself promises."""


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The smallest multiple of `alignment` that holds `nbytes`."""
    return -(-nbytes // alignment) * alignment


@dataclass(eq=False, slots=True)
class Region:
    """An allocated range, in bytes. `offset` changes when compaction moves it, so keep the Region, not the number."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class RegionAllocator:
    """First fit over a free list sorted by offset; neighbouring holes are always merged.

    First fit keeps what is long-lived near the front, where compaction leaves it alone.
    """

    def __init__(self, capacity: int, alignment: int = ALIGNMENT) -> None:
        """`capacity` in bytes; what lies beyond its last multiple of `alignment` is not used."""
        self.alignment = alignment
        self.capacity = max(0, capacity) // alignment * alignment
        self._starts: list[int] = [0] if self.capacity else []
        self._holes: dict[int, int] = {0: self.capacity} if self.capacity else {}
        self._used: set[Region] = set()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return self.capacity - self._used_bytes

    @property
    def largest_free(self) -> int:
        return max(self._holes.values(), default=0)

    def __contains__(self, region: Region) -> bool:
        return region in self._used

    def __len__(self) -> int:
        return len(self._used)

    def regions(self) -> list[Region]:
        """Allocated regions by offset."""
        return sorted(self._used, key=lambda region: region.offset)

    def allocate(self, nbytes: int) -> Region | None:
        """A region of at least `nbytes` bytes (at least one alignment unit), or None when no hole is long enough."""
        size = max(align(nbytes, self.alignment), self.alignment)
        for start in self._starts:
            if self._holes[start] >= size:
                region = Region(start, size)
                self._take(start, size)
                self._used.add(region)
                self._used_bytes += size
                return region
        return None

    def free(self, region: Region) -> None:
        """Raises ValueError for a region that is not allocated here (a double free)."""
        if region not in self._used:
            raise ValueError(f"{region} is not allocated here")
        self._used.remove(region)
        self._used_bytes -= region.nbytes
        self._give(region.offset, region.nbytes)

    def relocate(self, region: Region, offset: int) -> None:
        """Moves an allocated region to `offset`. The ranges may overlap; the rest of the new one must be free."""
        if region not in self._used:
            raise ValueError(f"{region} is not allocated here")
        self._give(region.offset, region.nbytes)
        try:
            self._take(offset, region.nbytes)
        except ValueError:
            self._take(region.offset, region.nbytes)
            raise
        region.offset = offset

    def fits_without(self, nbytes: int, removable: Collection[Region]) -> bool:
        """Whether one hole of `nbytes` would exist if the regions in `removable` were freed."""
        size, cursor = max(align(nbytes, self.alignment), self.alignment), 0
        if self.free_bytes + sum(region.nbytes for region in removable) < size:
            return False
        if any(region.nbytes >= size for region in removable):
            return True
        for region in self.regions():
            if region in removable:
                continue
            if region.offset - cursor >= size:
                return True
            cursor = region.end
        return self.capacity - cursor >= size

    def check_integrity(self) -> None:
        """Raises RuntimeError unless regions and holes tile the capacity exactly, with no two holes side by side."""
        spans = [(region.offset, region.nbytes, False) for region in self._used]
        spans += [(start, self._holes[start], True) for start in self._starts]
        cursor, hole_before = 0, False
        for start, size, hole in sorted(spans):
            if (
                start != cursor
                or size <= 0
                or start % self.alignment
                or size % self.alignment
                or (hole and hole_before)
            ):
                raise RuntimeError(f"allocator: [{start}, {start + size}) does not follow {cursor}")
            cursor, hole_before = start + size, hole
        if cursor != self.capacity:
            raise RuntimeError(f"allocator: ranges end at {cursor}, capacity is {self.capacity}")
        if self._starts != sorted(self._holes) or self._used_bytes != sum(r.nbytes for r in self._used):
            raise RuntimeError("allocator: free list or counters are out of step")

    def _take(self, offset: int, nbytes: int) -> None:
        index = bisect_left(self._starts, offset + 1) - 1
        start = self._starts[index] if index >= 0 else -1
        size = self._holes.get(start, 0)
        if index < 0 or start + size < offset + nbytes:
            raise ValueError(f"[{offset}, {offset + nbytes}) is not free")
        del self._starts[index], self._holes[start]
        for begin, end in ((start, offset), (offset + nbytes, start + size)):
            if begin < end:
                insort(self._starts, begin)
                self._holes[begin] = end - begin

    def _give(self, offset: int, nbytes: int) -> None:
        index = bisect_left(self._starts, offset)
        if index < len(self._starts) and self._starts[index] == offset + nbytes:
            nbytes += self._holes.pop(self._starts.pop(index))
        if index and self._starts[index - 1] + self._holes[self._starts[index - 1]] == offset:
            self._holes[self._starts[index - 1]] += nbytes
        else:
            self._starts.insert(index, offset)
            self._holes[offset] = nbytes
