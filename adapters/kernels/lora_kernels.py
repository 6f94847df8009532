"""The Triton kernels of the LoRA products; triton_lora.py says what they compute, and launches them.

Shrink and expand walk a list of items with a fixed number of programs; expand_small has a program for each. `cell` is a
(row, target) of the arena's table; tiles of row -1 hold tokens without an adapter. Where expand does not ADD, it writes
every column of every token of its wave. EARLY: expand begins while shrink runs (early.py).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_split"], do_not_specialize_on_alignment=["num_blocks", "targets"])
def shrink_kernel(
    x,
    data,
    ranks,
    offsets,
    targets,
    tokens,
    tile_row,
    tile_start,
    tile_len,
    blocks,
    num_blocks,
    partials,
    stride_x,
    stride_table,
    stride_split,
    NT: tl.constexpr,
    K: tl.constexpr,
    BUCKET: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    VEC: tl.constexpr,
    MOST_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    K_SPLIT: tl.constexpr = ((K + BK - 1) // BK + SPLITS - 1) // SPLITS * BK
    total = tl.load(num_blocks) * (NT * SPLITS)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        split = item % SPLITS
        j = (item // SPLITS) % NT
        tile = item // (SPLITS * NT)
        r0 = 0
        if BUCKET > BR:
            block = tl.load(blocks + tile)
            tile = block // MOST_BLOCKS
            r0 = block % MOST_BLOCKS * BR
        row = tl.load(tile_row + tile).to(tl.int64)
        cell = row * stride_table + tl.load(targets + j)
        rank = tl.load(ranks + cell, mask=row >= 0, other=0)
        if r0 < rank:
            start = tl.load(tile_start + tile)
            r = r0 + tl.arange(0, BR)
            used = r < rank
            # The division tells the compiler of the alignment that the table promises: 16-byte loads.
            a = data + tl.load(offsets + 2 * cell) // VEC * VEC
            k_begin = split * K_SPLIT
            k_end = tl.minimum(k_begin + K_SPLIT, K)
            length = tl.load(tile_len + tile)
            out = partials + split.to(tl.int64) * stride_split + j * BUCKET
            rows = tl.arange(0, BM)
            live = rows < length
            token = tl.load(tokens + start + rows, mask=live, other=0).to(tl.int64)
            acc = tl.zeros([BM, BR], tl.float32)
            for k0 in range(k_begin, k_end, BK):
                kk = k0 + tl.arange(0, BK)
                x_mask = live[:, None]
                a_mask = used[:, None]
                if K % BK != 0:
                    x_mask = x_mask & (kk < K)[None, :]
                    a_mask = a_mask & (kk < K)[None, :]
                xv = tl.load(x + (token * stride_x)[:, None] + kk[None, :], mask=x_mask, other=0.0)
                av = tl.load(a + (r * K)[:, None] + kk[None, :], mask=a_mask, other=0.0)
                acc = tl.dot(xv, tl.trans(av), acc, input_precision="ieee")
            at = (start + rows) * (NT * BUCKET)
            tl.store(out + at[:, None] + r[None, :], acc, mask=live[:, None] & used[None, :])


@triton.jit
def _sum_splits(partials, at, mask, stride_split, SPLITS: tl.constexpr):
    total = tl.load(partials + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials + split * stride_split + at, mask=mask, other=0.0)
    return total


@triton.jit
def chunk_of(left, NT: tl.constexpr, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr, CHUNK: tl.constexpr):
    """Of a site's chunk of columns: its target, first column in it, that target's columns, and where they begin."""
    j = 0
    column = left * CHUNK
    width = tl.zeros([], tl.int32) + WIDTHS[0]
    offset = tl.zeros([], tl.int32) + OFFSETS[0]
    for i in tl.static_range(1, NT):
        left -= (WIDTHS[i - 1] + CHUNK - 1) // CHUNK
        j = tl.where(left >= 0, i, j)
        column = tl.where(left >= 0, left * CHUNK, column)
        width = tl.where(left >= 0, WIDTHS[i], width)
        offset = tl.where(left >= 0, OFFSETS[i], offset)
    return j, column, width, offset


@triton.jit
def _put(delta, at, mask, ADD: tl.constexpr):
    if ADD:
        delta += tl.load(at, mask=mask, other=0.0)
    tl.store(at, delta.to(at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_split", "wave"], do_not_specialize_on_alignment=["targets"])
def expand_kernel(
    y,
    data,
    ranks,
    offsets,
    scales,
    targets,
    tokens,
    weights,
    tile_row,
    tile_start,
    tile_len,
    wave_tiles,
    partials,
    wave,
    stride_y,
    stride_table,
    stride_split,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BUCKET: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD: tl.constexpr,
):
    splits_apart = tl.cast(stride_split, tl.int64)
    first = tl.load(wave_tiles + wave)
    total = (tl.load(wave_tiles + wave + 1) - first) * CHUNKS
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        tile = first + item // CHUNKS
        j, column, width, offset = chunk_of(item % CHUNKS, NT, OFFSETS, WIDTHS, CHUNK)
        if ALIGNED:
            width = width // VEC * VEC
            offset = offset // VEC * VEC
        row = tl.load(tile_row + tile).to(tl.int64)
        cell = row * stride_table + tl.load(targets + j)
        rank = tl.load(ranks + cell, mask=row >= 0, other=0)
        start = tl.load(tile_start + tile)
        length = tl.load(tile_len + tile)
        rows = tl.arange(0, BM)
        live = rows < length
        token = tl.load(tokens + start + rows, mask=live, other=0).to(tl.int64)
        y_at = y + (token * stride_y)[:, None] + offset
        if rank > 0:
            factor = tl.load(weights + start + rows, mask=live, other=0.0) * tl.load(scales + cell)
            b = data + tl.load(offsets + 2 * cell + 1) // VEC * VEC
            r = tl.arange(0, BR)
            s_at = ((start + rows) * (NT * BUCKET))[:, None] + (j * BUCKET + r)[None, :]
            # The splits are summed once for all columns where the ranks fit one block. Where they do not, one block of
            # all the chunk's columns walks the ranks, so that each sum of splits serves CHUNK columns.
            narrow = True
            if BUCKET > BR:
                narrow = rank <= BR
            if narrow:
                s = _sum_splits(partials, s_at, live[:, None] & (r < rank)[None, :], splits_apart, SPLITS)
                s = s.to(data.dtype.element_ty)
                for n0 in range(column, tl.minimum(column + CHUNK, width), BN):
                    n = n0 + tl.arange(0, BN)
                    inside = (n < width)[None, :]
                    bv = tl.load(b + (r * width)[:, None] + n[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
                    delta = tl.dot(s, bv, input_precision="ieee") * factor[:, None]
                    _put(delta, y_at + n[None, :], live[:, None] & inside, ADD)
            else:
                n = column + tl.arange(0, CHUNK)
                inside = (n < width)[None, :]
                delta = tl.zeros([BM, CHUNK], tl.float32)
                for r0 in range(0, rank, BR):
                    used = r0 + r < rank
                    s = _sum_splits(partials, s_at + r0, live[:, None] & used[None, :], splits_apart, SPLITS)
                    at = ((r0 + r) * width)[:, None] + n[None, :]
                    bv = tl.load(b + at, mask=used[:, None] & inside, other=0.0)
                    delta = tl.dot(s.to(bv.dtype), bv, delta, input_precision="ieee")
                _put(delta * factor[:, None], y_at + n[None, :], live[:, None] & inside, ADD)
        elif not ADD:
            for n0 in range(column, tl.minimum(column + CHUNK, width), BN):
                n = n0 + tl.arange(0, BN)
                nothing = tl.zeros([BM, BN], y.dtype.element_ty)
                tl.store(y_at + n[None, :], nothing, mask=live[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["stride_split", "wave"], do_not_specialize_on_alignment=["targets"])
def expand_small_kernel(
    y,
    data,
    ranks,
    offsets,
    scales,
    targets,
    tokens,
    weights,
    tile_row,
    tile_start,
    tile_len,
    wave_tiles,
    partials,
    wave,
    stride_y,
    stride_table,
    stride_split,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BUCKET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    MORE_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Ranks fit one block, and each program has one item: a loop over items would cost registers, and so programs.

    For a tile of one token, tensor cores would compute 15 rows for nobody. Its B goes to registers instead, AT_ONCE
    ranks on their way together, and each thread sums up its own columns. MORE_SPLITS: SPLITS or more, a power of two.
    """
    splits_apart = tl.cast(stride_split, tl.int64)
    first = tl.load(wave_tiles + wave)
    tile = first + tl.program_id(0) // CHUNKS
    if tile < tl.load(wave_tiles + wave + 1):
        j, column, width, offset = chunk_of(tl.program_id(0) % CHUNKS, NT, OFFSETS, WIDTHS, CHUNK)
        if ALIGNED:
            width = width // VEC * VEC
            offset = offset // VEC * VEC
        row = tl.load(tile_row + tile).to(tl.int64)
        cell = row * stride_table + tl.load(targets + j)
        rank = tl.load(ranks + cell, mask=row >= 0, other=0)
        scale = tl.load(scales + cell, mask=row >= 0, other=0.0)
        b = data + tl.load(offsets + 2 * cell + 1, mask=row >= 0, other=0) // VEC * VEC
        start = tl.load(tile_start + tile)
        length = tl.load(tile_len + tile)
        if rank > 0 and length == 1:
            y_row = y + tl.load(tokens + start).to(tl.int64) * stride_y + offset
            factor = tl.load(weights + start) * scale
            at_once, split = tl.arange(0, AT_ONCE), tl.arange(0, MORE_SPLITS)
            columns = column + tl.arange(0, CHUNK)
            delta = tl.zeros([CHUNK], tl.float32)
            end = AT_ONCE
            if BUCKET > AT_ONCE:
                end = rank
            for r0 in range(0, end, AT_ONCE):
                there = r0 + at_once < rank
                b_at = ((r0 + at_once) * width)[:, None] + columns[None, :]
                b_part = tl.load(b + b_at, mask=there[:, None] & (columns < width)[None, :], other=0.0)
                if EARLY:
                    tl.extra.cuda.gdc_wait()
                part_at = (split * splits_apart)[:, None] + (start * (NT * BUCKET) + j * BUCKET + r0 + at_once)[None, :]
                parts = tl.load(partials + part_at, mask=(split < SPLITS)[:, None] & there[None, :], other=0.0)
                s_part = tl.sum(parts, 0).to(data.dtype.element_ty).to(tl.float32)  # rounded as for tensor cores
                delta += tl.sum(b_part.to(tl.float32) * s_part[:, None], 0)
            _put(delta * factor, y_row + columns, columns < width, ADD)
        else:
            r = tl.arange(0, BUCKET)
            used = r < rank
            rows = tl.arange(0, BM)
            live = rows < length
            token = tl.load(tokens + start + rows, mask=live, other=0).to(tl.int64)
            factors = tl.load(weights + start + rows, mask=live, other=0.0) * scale
            if EARLY:
                tl.extra.cuda.gdc_wait()
            s_at = ((start + rows) * (NT * BUCKET))[:, None] + (j * BUCKET + r)[None, :]
            s = _sum_splits(partials, s_at, live[:, None] & used[None, :], splits_apart, SPLITS)
            s = s.to(data.dtype.element_ty)
            y_at = y + (token * stride_y)[:, None] + offset
            end = tl.minimum(column + CHUNK, width)
            if ADD:
                end = tl.where(rank > 0, end, column)
            for n0 in range(column, end, BN):
                n = n0 + tl.arange(0, BN)
                inside = (n < width)[None, :]
                bv = tl.load(b + (r * width)[:, None] + n[None, :], mask=used[:, None] & inside, other=0.0)
                deltas = tl.dot(s, bv, input_precision="ieee") * factors[:, None]
                _put(deltas, y_at + n[None, :], live[:, None] & inside, ADD)
    if EARLY:  # those with nothing to do as well
        tl.extra.cuda.gdc_wait()
