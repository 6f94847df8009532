"""The Triton kernel of a step of one row; one_row.py says what it computes, and launches it.

Tiles are loaded two at a time, and the first two before the wait (early.py): weights and adapters are nobody's output.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _adapter(tile, there, side, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target):
    """(entry, rank, factor, where its A or B begins) of a tile's adapter in a target; rank 0: it has none there. side:
    0 for A, 1 for B."""
    row = tl.load(tile_row + tile, mask=there, other=-1).to(tl.int64)
    cell = row * stride_table + target
    rank = tl.load(ranks + cell, mask=row >= 0, other=0)
    entry = tl.load(tile_start + tile, mask=row >= 0, other=0)
    factor = tl.load(weights + entry, mask=row >= 0, other=0.0) * tl.load(scales + cell, mask=row >= 0, other=0.0)
    return entry, rank, factor, tl.load(offsets + 2 * cell + side, mask=row >= 0, other=0)


@triton.jit
def _shrink(
    number,
    x,
    data,
    ranks,
    offsets,
    scales,
    targets,
    weights,
    tile_row,
    tile_start,
    wave_tiles,
    s,
    counter,
    stride_table,
    stride_split,
    K: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    WAVES: tl.constexpr,
    NT: tl.constexpr,
    BUCKET: tl.constexpr,
    RANKS: tl.constexpr,
    VEC: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The work of one program: s = w · scale · (x A^T) of RANKS ranks of one tile's adapter in one target, over a share
    of k. Counted when it is there, and when there is none to do."""
    BLOCKS: tl.constexpr = BUCKET // RANKS
    split = number % SPLITS
    first = number // SPLITS % BLOCKS * RANKS
    j = number // (SPLITS * BLOCKS) % NT
    tile = number // (SPLITS * BLOCKS * NT)
    there = tile < tl.load(wave_tiles + WAVES)
    target = tl.load(targets + j)
    entry, rank, factor, begin = _adapter(
        tile, there, 0, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
    )
    one_k = split * (2 * BK) + tl.arange(0, BK)
    two_k = one_k + BK
    a = data + begin // VEC * VEC + first * K
    end = tl.where(first < rank, K, 0)
    one = tl.load(a + one_k, mask=one_k < end, other=0.0)
    two = tl.load(a + two_k, mask=two_k < end, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first < rank:
        x_one = tl.load(x + one_k, mask=one_k < K, other=0.0).to(tl.float32)
        x_two = tl.load(x + two_k, mask=two_k < K, other=0.0).to(tl.float32)
        s_at = s + split * stride_split + entry * (NT * BUCKET) + j * BUCKET
        for r in range(first, tl.minimum(first + RANKS, rank)):
            total = tl.sum(one.to(tl.float32) * x_one + two.to(tl.float32) * x_two, 0)
            tl.store(s_at + r, total * factor)
            a += K
            end = tl.where(rank > r + 1, K, 0)
            one = tl.load(a + one_k, mask=one_k < end, other=0.0)
            two = tl.load(a + two_k, mask=two_k < end, other=0.0)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _s_of(at, r, rank, stride_split, SPLITS: tl.constexpr):
    """s of ranks r, 0 beyond `rank`. Read past the multiprocessor's own cache: others have written it."""
    total = tl.load(at + r, mask=r < rank, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(at + split * stride_split + r, mask=r < rank, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _columns(n0, NT: tl.constexpr, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr):
    """(target of the site, its first column, its columns) of column n0."""
    j = 0
    offset = tl.zeros([], tl.int32) + OFFSETS[0]
    width = tl.zeros([], tl.int32) + WIDTHS[0]
    for i in tl.static_range(1, NT):
        here = n0 >= OFFSETS[i]
        j = tl.where(here, i, j)
        offset = tl.where(here, OFFSETS[i], offset)
        width = tl.where(here, WIDTHS[i], width)
    return j, offset, width


@triton.jit
def _tile(at, columns, n, k, K: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(columns < n)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize_on_alignment=["targets", "weights", "tile_row", "tile_start", "wave_tiles"])
def one_row_kernel(
    x,
    weight,
    bias,
    y,
    data,
    ranks,
    offsets,
    scales,
    targets,
    weights,
    tile_row,
    tile_start,
    wave_tiles,
    s,
    counters,
    stride_table,
    stride_split,
    n,
    stride_weight,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SHRINKS: tl.constexpr,
    ADDER: tl.constexpr,
    SHRINK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    WAVES: tl.constexpr,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BUCKET: tl.constexpr,
    BR: tl.constexpr,
    VEC: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BN columns of y = x W0^T + bias, and with ADAPTERS of s B of the row's, which the first SHRINKS programs compute
    meanwhile. WHOLE: no tile has anything to leave out."""
    number = tl.program_id(0)
    if ADAPTERS:
        counter = counters + tl.load(targets)
        if number < SHRINKS:
            _shrink(
                number,
                x,
                data,
                ranks,
                offsets,
                scales,
                targets,
                weights,
                tile_row,
                tile_start,
                wave_tiles,
                s,
                counter,
                stride_table,
                stride_split,
                K,
                SHRINK_K,
                SPLITS,
                WAVES,
                NT,
                BUCKET,
                RANKS,
                VEC,
                EARLY,
            )
            return
        number -= SHRINKS
    PAIR: tl.constexpr = 2 * BK
    LAST: tl.constexpr = (K - 1) // PAIR * PAIR
    columns = number * BN + tl.arange(0, BN)
    live = columns < n
    k = tl.arange(0, BK)
    at = weight + (columns.to(tl.int64) * stride_weight)[:, None] + k[None, :]
    one = _tile(at, columns, n, k, K, WHOLE)
    two = _tile(at + BK, columns, n, BK + k, K, WHOLE)
    if ADAPTERS:
        r = tl.arange(0, BR)
        j, offset, width = _columns(number * BN, NT, OFFSETS, WIDTHS)
        target = tl.load(targets + j)
        tiles = tl.load(wave_tiles + WAVES)
        entry, rank, _, begin = _adapter(
            0, tiles > 0, 1, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
        )
        b_at = data + begin + (r * width)[:, None] + (columns - offset)[None, :]
        b = tl.load(b_at, mask=(r < rank)[:, None] & live[None, :], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BN, BK], tl.float32)
    for k0 in range(0, LAST, PAIR):
        three = _tile(at + k0 + PAIR, columns, n, k0 + PAIR + k, K, WHOLE)
        four = _tile(at + k0 + PAIR + BK, columns, n, k0 + PAIR + BK + k, K, WHOLE)
        acc += one.to(tl.float32) * tl.load(x + k0 + k)[None, :].to(tl.float32)
        acc += two.to(tl.float32) * tl.load(x + k0 + BK + k)[None, :].to(tl.float32)
        one = three
        two = four
    if ADAPTERS:
        # While the last tiles are on their way. Those that are waited for come first in
        # the grid, so they run or have run.
        while tl.atomic_add(counter, 0, sem="acquire") % ADDER < SHRINKS:
            pass
        s_row = _s_of(s + (entry * NT + j) * BUCKET, r, rank, stride_split, SPLITS)
    acc += one.to(tl.float32) * tl.load(x + LAST + k, mask=LAST + k < K, other=0.0)[None, :].to(tl.float32)
    acc += two.to(tl.float32) * tl.load(x + LAST + BK + k, mask=LAST + BK + k < K, other=0.0)[None, :].to(tl.float32)
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    if ADAPTERS:
        total += tl.sum(s_row[:, None] * b.to(tl.float32), 0)
        # Higher ranks, and the other adapters of a mix.
        done = BR
        for tile in range(tiles):
            for r0 in range(done, rank, BR):
                used = r0 + r < rank
                s_row = _s_of(s + (entry * NT + j) * BUCKET, r0 + r, rank, stride_split, SPLITS)
                b_at = data + begin + ((r0 + r) * width)[:, None] + (columns - offset)[None, :]
                b = tl.load(b_at, mask=used[:, None] & live[None, :], other=0.0)
                total += tl.sum(s_row[:, None] * b.to(tl.float32), 0)
            done = 0
            more = tile + 1
            entry, rank, _, begin = _adapter(
                more, tiles > more, 1, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
            )
    tl.store(y + columns, total.to(y.dtype.element_ty), mask=live)
    if ADAPTERS:  # noqa: SIM102 - known when it is compiled
        # The last that adds leaves the counter as it was.
        if tl.atomic_add(counter, ADDER, sem="relaxed") // ADDER == tl.num_programs(0) - SHRINKS - 1:
            tl.store(counter, 0)
