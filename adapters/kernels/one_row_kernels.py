"""The Triton kernel of a product of one row; one_row.py says what it computes, and launches it."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


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
def _adapter(tile, there, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target):
    """(entry, rank, factor, where its B begins) of a tile's adapter in a target; rank 0: it has none there."""
    row = tl.load(tile_row + tile, mask=there, other=-1).to(tl.int64)
    cell = row * stride_table + target
    rank = tl.load(ranks + cell, mask=row >= 0, other=0)
    entry = tl.load(tile_start + tile, mask=row >= 0, other=0)
    factor = tl.load(weights + entry, mask=row >= 0, other=0.0) * tl.load(scales + cell, mask=row >= 0, other=0.0)
    return entry, rank, factor, tl.load(offsets + 2 * cell + 1, mask=row >= 0, other=0)


@triton.jit
def _tile(at, columns, n, k, K: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(columns < n)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit(
    do_not_specialize=["stride_split"],
    do_not_specialize_on_alignment=["targets", "weights", "tile_row", "tile_start", "wave_tiles"],
)
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
    partials,
    n,
    stride_weight,
    stride_table,
    stride_split,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    WAVES: tl.constexpr,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BUCKET: tl.constexpr,
    BR: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = x W0^T + bias, and with ADAPTERS the deltas of the row's; partials: shrink's. Two tiles of W0 are always on
    their way, the first two before the wait. WHOLE: no tile has anything to leave out."""
    PAIR: tl.constexpr = 2 * BK
    LAST: tl.constexpr = (K - 1) // PAIR * PAIR
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    live = columns < n
    k = tl.arange(0, BK)
    at = weight + (columns.to(tl.int64) * stride_weight)[:, None] + k[None, :]
    one = _tile(at, columns, n, k, K, WHOLE)
    two = _tile(at + BK, columns, n, BK + k, K, WHOLE)
    if ADAPTERS:
        j, offset, width = _columns(tl.program_id(0) * BN, NT, OFFSETS, WIDTHS)
        target = tl.load(targets + j)
        tiles = tl.load(wave_tiles + WAVES)
        entry, rank, factor, begin = _adapter(
            0, tiles > 0, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
        )
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
    acc += one.to(tl.float32) * tl.load(x + LAST + k, mask=LAST + k < K, other=0.0)[None, :].to(tl.float32)
    acc += two.to(tl.float32) * tl.load(x + LAST + BK + k, mask=LAST + BK + k < K, other=0.0)[None, :].to(tl.float32)
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + columns, mask=live, other=0.0).to(tl.float32)
    if ADAPTERS:
        r = tl.arange(0, BR)
        split = tl.arange(0, SPLITS_PADDED)
        for tile in range(tiles):
            s_at = partials + (split.to(tl.int64) * stride_split)[:, None] + entry * (NT * BUCKET) + j * BUCKET
            b_at = data + begin + (columns - offset)[None, :]
            for r0 in range(0, rank, BR):
                used = r0 + r < rank
                s_mask = (split < SPLITS)[:, None] & used[None, :]
                s = tl.sum(tl.load(s_at + (r0 + r)[None, :], mask=s_mask, other=0.0), 0)
                b = tl.load(b_at + ((r0 + r) * width)[:, None], mask=used[:, None] & live[None, :], other=0.0)
                total += tl.sum(s[:, None] * b.to(tl.float32), 0) * factor
            entry, rank, factor, begin = _adapter(
                tile + 1, tile + 1 < tiles, ranks, offsets, scales, weights, tile_row, tile_start, stride_table, target
            )
    tl.store(y + columns, total.to(y.dtype.element_ty), mask=live)
