"""The Triton kernels of a step of one row; one_row.py says what they compute, and launches them.

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


@triton.jit(do_not_specialize_on_alignment=["targets", "weights", "tile_row", "tile_start", "wave_tiles"])
def shrink_row_kernel(
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
    stride_table,
    K: tl.constexpr,
    BK: tl.constexpr,
    WAVES: tl.constexpr,
    NT: tl.constexpr,
    BUCKET: tl.constexpr,
    RANKS: tl.constexpr,
    VEC: tl.constexpr,
    EARLY: tl.constexpr,
):
    """s = w · scale · (x A^T) of RANKS ranks of one tile's adapter in one target. What is launched next reads nothing
    of a step before its own wait, so it may start at once. All programs wait, those with nothing to do as well."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = BUCKET // RANKS
    first = tl.program_id(0) % BLOCKS * RANKS
    j = tl.program_id(0) // BLOCKS % NT
    tile = tl.program_id(0) // (BLOCKS * NT)
    there = tile < tl.load(wave_tiles + WAVES)
    target = tl.load(targets + j)
    entry, rank, factor, begin = _adapter(
        tile, there, 0, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
    )
    k = tl.arange(0, BK)
    a = data + begin // VEC * VEC + first * K
    end = tl.where(first < rank, K, 0)
    one = tl.load(a + k, mask=k < end, other=0.0)
    two = tl.load(a + BK + k, mask=BK + k < end, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if first < rank:
        x_one = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        x_two = tl.load(x + BK + k, mask=BK + k < K, other=0.0).to(tl.float32)
        for r in range(first, tl.minimum(first + RANKS, rank)):
            acc = one.to(tl.float32) * x_one + two.to(tl.float32) * x_two
            for k0 in range(2 * BK, K, BK):
                more = tl.load(a + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
                acc += more * tl.load(x + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
            tl.store(s + entry * (NT * BUCKET) + j * BUCKET + r, tl.sum(acc, 0) * factor)
            a += K
            end = tl.where(rank > r + 1, K, 0)
            one = tl.load(a + k, mask=k < end, other=0.0)
            two = tl.load(a + BK + k, mask=BK + k < end, other=0.0)


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
    residual,
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
    n,
    stride_weight,
    stride_table,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ADAPTERS: tl.constexpr,
    MORE: tl.constexpr,
    WAVES: tl.constexpr,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BUCKET: tl.constexpr,
    BR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BN columns of y = x W0^T + bias + residual, and with ADAPTERS of s B of the row's. WHOLE: no tile has anything
    to leave out."""
    PAIR: tl.constexpr = 2 * BK
    LAST: tl.constexpr = (K - 1) // PAIR * PAIR
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    live = columns < n
    k = tl.arange(0, BK)
    at = weight + (columns.to(tl.int64) * stride_weight)[:, None] + k[None, :]
    one = _tile(at, columns, n, k, K, WHOLE)
    two = _tile(at + BK, columns, n, BK + k, K, WHOLE)
    total = tl.zeros([BN], tl.float32)
    if BIAS:
        total += tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    if ADAPTERS:
        r = tl.arange(0, BR)
        j, offset, width = _columns(tl.program_id(0) * BN, NT, OFFSETS, WIDTHS)
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
    if RESIDUAL:
        total += tl.load(residual + columns, mask=live, other=0.0).to(tl.float32)
    if ADAPTERS:
        s_row = tl.load(s + entry * (NT * BUCKET) + j * BUCKET + r, mask=r < rank, other=0.0)
    acc = tl.zeros([BN, BK], tl.float32)
    for k0 in range(0, LAST, PAIR):
        three = _tile(at + k0 + PAIR, columns, n, k0 + PAIR + k, K, WHOLE)
        four = _tile(at + k0 + PAIR + BK, columns, n, k0 + PAIR + BK + k, K, WHOLE)
        acc += one.to(tl.float32) * tl.load(x + k0 + k)[None, :].to(tl.float32)
        acc += two.to(tl.float32) * tl.load(x + k0 + BK + k)[None, :].to(tl.float32)
        one = three
        two = four
    acc += one.to(tl.float32) * tl.load(x + LAST + k, mask=LAST + k < K, other=0.0)[None, :].to(tl.float32)
    acc += two.to(tl.float32) * tl.load(x + LAST + BK + k, mask=LAST + BK + k < K, other=0.0)[None, :].to(tl.float32)
    total += tl.sum(acc, 1)
    if ADAPTERS:
        total += tl.sum(s_row[:, None] * b.to(tl.float32), 0)
        if MORE:
            done = BR
            for tile in range(tiles):
                for r0 in range(done, rank, BR):
                    used = r0 + r < rank
                    s_row = tl.load(s + entry * (NT * BUCKET) + j * BUCKET + r0 + r, mask=used, other=0.0)
                    b_at = data + begin + ((r0 + r) * width)[:, None] + (columns - offset)[None, :]
                    b = tl.load(b_at, mask=used[:, None] & live[None, :], other=0.0)
                    total += tl.sum(s_row[:, None] * b.to(tl.float32), 0)
                done = 0
                more = tile + 1
                entry, rank, _, begin = _adapter(
                    more, tiles > more, 1, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
                )
    tl.store(y + columns, total.to(y.dtype.element_ty), mask=live)
