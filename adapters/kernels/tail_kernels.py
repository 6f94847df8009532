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
    GROUP: tl.constexpr,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    VEC: tl.constexpr,
    COPY: tl.constexpr,
):
    """A program computes GROUP targets of a tile over a share of k: BC columns, BR for each target. BS: columns of
    their tails. COPY: x is copied to `out` by the way; otherwise it lies there already."""
    GROUPS: tl.constexpr = NT // GROUP
    K_SPLIT: tl.constexpr = ((K + BK - 1) // BK + SPLITS - 1) // SPLITS * BK
    split = tl.program_id(0) % SPLITS
    group = tl.program_id(0) // SPLITS % GROUPS
    tile = tl.program_id(0) // (SPLITS * GROUPS)
    if tile < tl.load(num_tiles):
        row = tl.load(tile_row + tile).to(tl.int64)
        c = tl.arange(0, BC)
        r = c % BR
        there = c // BR < tl.where(row >= 0, GROUP, 0)
        cell = row * stride_table + tl.load(targets + group * GROUP + c // BR, mask=c // BR < GROUP, other=0)
        used = r < tl.load(ranks + cell, mask=there, other=0)
        works = tl.max(used.to(tl.int32), 0) > 0
        start = tl.load(tile_start + tile)
        rows = tl.arange(0, BM)
        live = rows < tl.load(tile_len + tile)
        token = tl.load(tokens + start + rows, mask=live, other=0).to(tl.int64)
        x_at = x + (token * stride_x)[:, None]
        out_at = out + (token * stride_out)[:, None]
        last = split == 0
        total = tl.zeros([BM, BC], tl.float32)
        if works | (COPY and group == 0):
            # The divisions tell the compiler of alignments that it cannot see.
            a = data + (tl.load(offsets + 2 * cell, mask=used, other=0) // VEC * VEC + r * K)[:, None]
            k_begin = split * K_SPLIT
            for k0 in range(k_begin, tl.minimum(k_begin + K_SPLIT, K), BK):
                kk = k0 + tl.arange(0, BK)
                x_mask = live[:, None]
                a_mask = used[:, None]
                if K % BK != 0:
                    x_mask = x_mask & (kk < K)[None, :]
                    a_mask = a_mask & (kk < K)[None, :]
                xv = tl.load(x_at + kk[None, :], mask=x_mask, other=0.0)
                av = tl.load(a + kk[None, :], mask=a_mask, other=0.0)
                total = tl.dot(xv, tl.trans(av), total, input_precision="ieee")
                if COPY:  # noqa: SIM102 - known when it is compiled
                    if group == 0:
                        tl.store(out_at + kk[None, :], xv, mask=x_mask)
        if SPLITS > 1:  # noqa: SIM102
            if works:
                # Whoever is last of the splits adds them up, always in their order: the same bits every time.
                at = partials + (tile * GROUPS + group) * (SPLITS * BM * BC) + (rows * BC)[:, None] + c[None, :]
                tl.store(at + split * (BM * BC), total, mask=used[None, :])
                tl.debug_barrier()
                last = tl.atomic_add(counters + tile * GROUPS + group, 1, sem="acq_rel") == SPLITS - 1
                if last:
                    total = tl.zeros([BM, BC], tl.float32)
                    for part in range(SPLITS):
                        # Past the multiprocessor's own cache: others have written them.
                        total += tl.load(at + part * (BM * BC), mask=used[None, :], other=0.0, cache_modifier=".cg")
                    tl.store(counters + tile * GROUPS + group, 0)
        if last:
            column = tl.load(tile_column + tile) // VEC * VEC
            s_at = out_at + (K + group * (GROUP * RANKS))
            t = tl.arange(0, BS)
            in_tail = t // RANKS < GROUP
            owner = row * stride_table + tl.load(targets + group * GROUP + t // RANKS, mask=in_tail, other=0)
            rank = tl.load(ranks + owner, mask=t // RANKS < tl.where(row >= 0, GROUP, 0), other=0)
            others = in_tail & ((t % RANKS < column) | (t % RANKS >= column + rank))
            tl.store(s_at + t[None, :], tl.zeros([BM, BS], out.dtype.element_ty), mask=live[:, None] & others[None, :])
            if works:
                scale = tl.load(scales + cell, mask=used, other=0.0)
                weight = tl.load(weights + start + rows, mask=live, other=0.0)
                s = (total * (weight[:, None] * scale[None, :])).to(out.dtype.element_ty)
                tl.store(s_at + (c // BR * RANKS + column + r)[None, :], s, mask=live[:, None] & used[None, :])
