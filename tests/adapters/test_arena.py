"""Regions and the arena on CPU: allocation, table rows, compaction."""

from __future__ import annotations

import random
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from adapters import arena as arena_module
from adapters.arena import Arena
from adapters.manifest import Manifest, Module
from adapters.regions import ALIGNMENT, Region, RegionAllocator
from adapters.tiers import RowEntries

SHAPES = [(8, 16), (16, 8), (24, 24)]


def entries(ranks: list[int], scale: float = 2.0) -> tuple[RowEntries, int]:
    """A block with these ranks per target, tensors at multiples of 4 elements, and its number of elements."""
    row = RowEntries(np.array(ranks, np.int32), np.zeros((len(ranks), 2), np.int64), np.full(len(ranks), scale, "f4"))
    position = 0
    for target, (rank, shape) in enumerate(zip(ranks, SHAPES, strict=True)):
        for side in range(2):
            row.offsets[target, side] = position
            position += -(-rank * shape[side] // 4) * 4
    return row, position


def make(nbytes: int = 1 << 16, rows: int = 8, dtype: torch.dtype = torch.float32) -> Arena:
    return Arena(SHAPES, dtype=dtype, device="cpu", nbytes=nbytes, rows=rows)


def put(arena: Arena, row: int, ranks: list[int], seed: int) -> tuple[Region, torch.Tensor]:
    """Binds a block of random values; gives its region and its values."""
    layout, elements = entries(ranks)
    region = arena.allocate(elements * arena.data.itemsize)
    assert region is not None
    values = torch.rand(elements, generator=torch.Generator().manual_seed(seed)).to(arena.data.dtype)
    begin = region.offset // arena.data.itemsize
    arena.data[begin : begin + elements] = values
    arena.bind(row, region, layout)
    return region, values


def content(arena: Arena, row: int, ranks: list[int]) -> torch.Tensor:
    """What a kernel finds through the device's table, in block order, without the gaps."""
    parts = []
    for target, (rank, shape) in enumerate(zip(ranks, SHAPES, strict=True)):
        for side in range(2):
            begin = int(arena.offsets[row, target, side])
            parts.append(arena.data[begin : begin + rank * shape[side]])
    return torch.cat(parts)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=80))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_allocator_never_overlaps_and_never_leaks(calls: list[tuple[bool, int]]) -> None:
    allocator = RegionAllocator(20_000)
    held: list[Region] = []
    for allocate, number in calls:
        if allocate:
            region = allocator.allocate(number)
            assert (region is not None) == (allocator.largest_free >= 0 and region in allocator)
            if region is None:
                assert allocator.largest_free < max(number, 1)
            else:
                assert region.offset % ALIGNMENT == 0
                assert region.nbytes >= number
                held.append(region)
        elif held:
            allocator.free(held.pop(number % len(held)))
        allocator.check_integrity()
        ordered = allocator.regions()
        assert all(a.end <= b.offset for a, b in pairwise(ordered))
        assert allocator.used_bytes == sum(region.nbytes for region in held)
    for region in held:
        allocator.free(region)
    assert allocator.largest_free == allocator.capacity == 20_000 // ALIGNMENT * ALIGNMENT


def test_allocator_refuses_double_frees_and_occupied_targets() -> None:
    allocator = RegionAllocator(4096)
    first, second = allocator.allocate(256), allocator.allocate(512)
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="not free"):
        allocator.relocate(second, 0)
    allocator.free(first)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(first)
    allocator.relocate(second, 0)
    assert (second.offset, allocator.largest_free) == (0, 3584)
    allocator.check_integrity()


def test_fits_without_sees_the_hole_that_evictions_would_make() -> None:
    allocator = RegionAllocator(1024)
    a, b, c = (allocator.allocate(256) for _ in range(3))
    assert a is not None
    assert b is not None
    assert c is not None
    assert not allocator.fits_without(512, {a})
    assert allocator.fits_without(512, {a, b})
    assert allocator.fits_without(512, {c})
    assert not allocator.fits_without(2048, {a, b, c})


def test_a_fresh_table_adds_nothing() -> None:
    arena = make()
    assert not arena.ranks.any()
    assert arena.data.dtype == torch.float32
    assert arena.ranks.dtype == torch.int32
    assert (arena.offsets.dtype, arena.offsets.shape) == (torch.int64, (8, 3, 2))
    assert (arena.scales.dtype, arena.scales.shape) == (torch.float32, (8, 3))
    arena.check_integrity()


def test_an_arena_takes_its_shape_from_the_manifest() -> None:
    modules = (Module("embed", "embedding", 10, 4), Module("q", "linear", 4, 8), Module("head", "output", 4, 10))
    manifest = Manifest("f", "A", "a", "bfloat16", 10, 16, modules)
    arena = Arena.for_manifest(manifest, device="cpu", nbytes=1000, rows=2)
    assert arena.ranks.shape == (2, 1)
    assert arena.data.dtype == torch.bfloat16
    assert arena.data.numel() == 768 // 2
    assert arena.bytes.numel() == 768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bind_and_unbind_write_the_row(dtype: torch.dtype) -> None:
    arena = make(dtype=dtype)
    put(arena, 0, [1, 1, 1], 0)
    ranks = [3, 0, 5]
    region, values = put(arena, 4, ranks, 1)
    assert arena.ranks[4].tolist() == ranks
    assert arena.scales[4].tolist() == [2.0, 2.0, 2.0]
    assert arena.offsets[4, 1].tolist() == [0, 0]
    torch.testing.assert_close(content(arena, 4, ranks), values)
    assert arena.region_of(4) is region
    assert arena.host_table.ranks_np[4].tolist() == ranks
    arena.check_integrity()
    with pytest.raises(ValueError, match="in use"):
        arena.bind(4, region, entries(ranks)[0])
    with pytest.raises(ValueError, match="still bound"):
        arena.free(region)
    before = int(arena.generation[4])
    arena.unbind(4)
    assert int(arena.generation[4]) == before + 1
    assert not arena.ranks[4].any()
    arena.free(region)
    with pytest.raises(ValueError, match="no block"):
        arena.unbind(4)
    arena.check_integrity()


def test_a_row_that_points_outside_its_region_is_found() -> None:
    arena = make()
    put(arena, 1, [2, 2, 2], 0)
    arena.offsets_np[1, 2, 1] += 4096
    with pytest.raises(RuntimeError, match="points outside"):
        arena.check_integrity()


def test_a_row_whose_tensors_overlap_is_found() -> None:
    arena = make()
    put(arena, 1, [2, 2, 2], 0)
    arena.offsets_np[1, 2, 0] = arena.offsets_np[1, 1, 0] + 4
    with pytest.raises(RuntimeError, match="overlap"):
        arena.check_integrity()


@pytest.mark.parametrize("bounce", [256, 1024, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_compaction_keeps_every_byte_and_every_row(seed: int, bounce: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "BOUNCE_BYTES", bounce)
    rng = random.Random(seed)
    arena = make(nbytes=1 << 16, rows=24)
    blocks: dict[int, tuple[Region, list[int], torch.Tensor]] = {}
    for row in range(24):
        ranks = [rng.choice([0, 1, 3, 8]), rng.choice([0, 2, 16]), rng.randrange(1, 9)]
        region, _ = put(arena, row, ranks, row)
        blocks[row] = region, ranks, content(arena, row, ranks).clone()
    for row in rng.sample(sorted(blocks), 12):
        region, _, _ = blocks.pop(row)
        arena.unbind(row)
        arena.free(region)
    assert arena.fragmentation > 0
    moves = 0
    while moved := arena.compact(2048):
        assert moved <= max(2048, *(region.nbytes for region, _, _ in blocks.values()))
        moves += 1
        arena.check_integrity()
        for row, (_, ranks, values) in blocks.items():
            assert torch.equal(content(arena, row, ranks), values)
    assert moves > 1
    assert arena.fragmentation == 0.0


def test_compaction_stops_at_the_hole_that_is_wanted_and_leaves_what_is_being_written() -> None:
    arena = make(nbytes=2048)
    regions = {}
    for row in range(8):
        regions[row], _ = put(arena, row, [1, 0, 0], row)
    for row in (0, 2, 5):
        arena.unbind(row)
        arena.free(regions[row])
    writing = arena.allocate(256)
    assert writing is not None
    assert writing.offset == 0
    assert arena.compact(1 << 20, want=512) == 512
    assert arena.allocate(512) is not None
    assert writing.offset == 0
    arena.check_integrity()
