"""The Triton kernels of adapters with a tail; triton_tail.py says what they compute, and launches them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_table"])
def stage_kernel(
    data,
    ranks,
    offsets,
    places,
    widths,
    pieces,
    num_pieces,
    staged,
    stride_table,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    BN: tl.constexpr,
    VEC: tl.constexpr,
):
    count = tl.load(staged)
    if count > 0:
        r = tl.arange(0, RANKS)
        for item in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
            target = tl.load(pieces + 2 * item).to(tl.int64)
            n = tl.load(pieces + 2 * item + 1) + tl.arange(0, BN)
            width = tl.load(widths + target)
            # The divisions tell the compiler of alignments that it cannot see: 16-byte stores.
            tail = (tl.load(places + 2 * target) // 16 * 16).to(data.dtype)
            stride = tl.load(places + 2 * target + 1) // VEC * VEC
            for i in range(count):
                cell = tl.load(staged + 1 + i).to(tl.int64) * stride_table + target
                first = tl.load(staged + 1 + SLOTS + i) // VEC * VEC
                used = r < tl.load(ranks + cell)
                b = data + tl.load(offsets + 2 * cell + 1) // VEC * VEC
                inside = n < width
                block = tl.load(b + (r * width)[:, None] + n[None, :], mask=used[:, None] & inside[None, :], other=0.0)
                at = tail + (n.to(tl.int64) * stride + first)[:, None] + r[None, :]
                tl.store(at, tl.trans(block), mask=inside[:, None] & used[None, :])


@triton.jit(do_not_specialize_on_alignment=["num_tiles", "targets"])
def shrink_kernel(
    x,
    out,
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
    tile_column,
    num_tiles,
    partials,
    counters,
    stride_x,
    stride_out,
    stride_table,
    NT: tl.constexpr,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    VEC: tl.constexpr,
    COPY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program computes one target of BM rows, one of the PARTS of a tile, over a share of k. COPY: x is copied to out
    by the way; otherwise it lies there already."""
    K_SPLIT: tl.constexpr = ((K + BK - 1) // BK + SPLITS - 1) // SPLITS * BK
    split = tl.program_id(0) % SPLITS
    item = tl.program_id(0) // SPLITS
    j = item % NT
    part = item // NT % PARTS
    tile = item // (NT * PARTS)
    # All that is known before x is there.
    there = tile < tl.load(num_tiles)
    length = tl.load(tile_len + tile, mask=there, other=0) - part * BM
    row = tl.load(tile_row + tile, mask=there, other=-1).to(tl.int64)
    cell = row * stride_table + tl.load(targets + j)
    rank = tl.load(ranks + cell, mask=row >= 0, other=0)
    a = data + tl.load(offsets + 2 * cell, mask=row >= 0, other=0) // VEC * VEC
    start = tl.load(tile_start + tile, mask=there, other=0) + part * BM
    rows = tl.arange(0, BM)
    live = rows < length
    token = tl.load(tokens + start + rows, mask=live, other=0).to(tl.int64)
    if EARLY:  # early.py
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if length > 0:
        r = tl.arange(0, BR)
        used = r < rank
        x_at = x + (token * stride_x)[:, None]
        out_at = out + (token * stride_out)[:, None]
        last = split == 0
        total = tl.zeros([BM, BR], tl.float32)
        if (rank > 0) | (COPY and j == 0):
            k_begin = split * K_SPLIT
            for k0 in range(k_begin, tl.minimum(k_begin + K_SPLIT, K), BK):
                kk = k0 + tl.arange(0, BK)
                x_mask = live[:, None]
                a_mask = used[:, None]
                if K % BK != 0:
                    x_mask = x_mask & (kk < K)[None, :]
                    a_mask = a_mask & (kk < K)[None, :]
                xv = tl.load(x_at + kk[None, :], mask=x_mask, other=0.0)
                av = tl.load(a + (r * K)[:, None] + kk[None, :], mask=a_mask, other=0.0)
                total = tl.dot(xv, tl.trans(av), total, input_precision="ieee")
                if COPY:  # noqa: SIM102 - known when it is compiled
                    if j == 0:
                        tl.store(out_at + kk[None, :], xv, mask=x_mask)
        if SPLITS > 1:  # noqa: SIM102 - the same
            if rank > 0:
                # Whoever is last of the splits adds them up, always in their order: the same bits every time.
                at = partials + item.to(tl.int64) * (SPLITS * BM * BR) + (rows * BR)[:, None] + r[None, :]
                tl.store(at + split * (BM * BR), total, mask=used[None, :])
                tl.debug_barrier()
                last = tl.atomic_add(counters + item, 1, sem="acq_rel") == SPLITS - 1
                if last:
                    total = tl.zeros([BM, BR], tl.float32)
                    for other in tl.static_range(SPLITS):
                        # Past the multiprocessor's own cache: others have written them.
                        total += tl.load(at + other * (BM * BR), mask=used[None, :], other=0.0, cache_modifier=".cg")
                    tl.store(counters + item, 0)
        if last:
            column = tl.load(tile_column + tile) // VEC * VEC
            s_at = out_at + (K + j * RANKS)
            c = tl.arange(0, RANKS)
            others = (c < column) | (c >= column + rank)
            tl.store(
                s_at + c[None, :], tl.zeros([BM, RANKS], out.dtype.element_ty), mask=live[:, None] & others[None, :]
            )
            if rank > 0:
                factor = tl.load(weights + start + rows, mask=live, other=0.0) * tl.load(scales + cell)
                s = (total * factor[:, None]).to(out.dtype.element_ty)
                tl.store(s_at + column + r[None, :], s, mask=live[:, None] & used[None, :])
