"""The Triton kernels of adapters in the tails; triton_tail.py says what they compute, and launches them.

Whatever they can they ask for at once, and leave out afterwards what is not a row's. Only what depends on a tile's tell
(slots, where there are several, and deltas from beside) has to wait for that. Rows with slots and rows with deltas from
beside are computed apart: tiles with both are few, and code for both at once takes registers that others lack.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from adapters.kernels.lora_kernels import chunk_of


@triton.jit(do_not_specialize=["num_pieces", "stride_table"])
def stage_kernel(
    data,
    ranks,
    offsets,
    scales,
    where,
    scales_at,
    pieces,
    num_pieces,
    staged,
    stride_table,
    GRANULE: tl.constexpr,
    STAGED: tl.constexpr,
    BN: tl.constexpr,
    VEC: tl.constexpr,
):
    count = tl.load(staged)
    if count > 0:
        rows = tl.arange(0, GRANULE)
        for item in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
            target = tl.load(pieces + 3 * item).to(tl.int64)
            side = tl.load(pieces + 3 * item + 1)
            begin = tl.load(pieces + 3 * item + 2)
            n = begin + tl.arange(0, BN)
            here = where + 4 * (2 * target + side)
            # The divisions tell the compiler of alignments that it cannot see: 16-byte loads and stores.
            address = tl.load(here)
            if VEC > 1:
                address = address // 16 * 16
            to = address.to(data.dtype)
            stride = tl.load(here + 1) // VEC * VEC
            step = tl.load(here + 2) // VEC * VEC
            width = tl.load(here + 3) // VEC * VEC
            inside = (n < width)[None, :]
            for i in range(count):
                row = tl.load(staged + 1 + STAGED * i).to(tl.int64)
                first = tl.load(staged + 2 + STAGED * i)
                slots = tl.load(staged + 3 + STAGED * i)
                cell = row * stride_table + target
                rank = tl.load(ranks + cell)
                source = data + tl.load(offsets + 2 * cell + side, mask=rank > 0, other=0) // VEC * VEC
                for slot in range(slots):
                    r = slot * GRANULE + rows
                    block = tl.load(
                        source + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & inside, other=0.0
                    )
                    tl.store(to + (first + slot) * step + rows[:, None] * stride + n[None, :], block, mask=inside)
                    at = tl.load(scales_at + target).to(scales.dtype) + first + slot
                    tl.store(at, tl.load(scales + cell, mask=rank > 0, other=0.0), mask=begin == 0)


@triton.jit
def _tell(tells, tile, SLOTS: tl.constexpr, ENDS: tl.constexpr):
    """Of a tile: the first slot that rows of it have, the one behind their last, and whether there are `others`: rows
    with deltas from beside, or no row with a slot."""
    tell = tl.load(tells + tile)
    if SLOTS == 1:
        return 0, 1, tell >= ENDS * ENDS
    return tell % ENDS, tell // ENDS % ENDS, tell >= ENDS * ENDS


@triton.jit
def _delta(s, b, place, weight, scale, slot, ENDS: tl.constexpr):
    """weight · scale · s B of one slot; zeros for rows whose it is not. What is loaded must go into the product as it
    is: else the compiler waits for s before it asks for b."""
    own = (place > 0) & (slot >= place % ENDS) & (slot < place // ENDS)
    factor = tl.where(own, weight, 0.0) * scale  # weights of others are anything
    return tl.where(own[:, None], tl.dot(s, b, input_precision="ieee") * factor[:, None], 0.0)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y,
    out,
    residual,
    delta,
    b,
    scales,
    tells,
    places,
    weights,
    tokens,
    stride_y,
    stride_out,
    NT: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    CHUNKS: tl.constexpr,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    GRANULE: tl.constexpr,
    ENDS: tl.constexpr,
    BESIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BM: tl.constexpr,
    TILE: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
):
    """BN columns of BM rows: out = y + w · scale · s B; with BESIDE, for other rows, + delta; with RESIDUAL, + that.
    out may be y. WHOLE: no tile has columns to leave out."""
    slot, last, others = _tell(tells, tl.program_id(0) // CHUNKS * BM // TILE, SLOTS, ENDS)
    j, column, width, offset = chunk_of(tl.program_id(0) % CHUNKS, NT, OFFSETS, WIDTHS, BN)
    n = column + tl.arange(0, BN)
    inside = (n < width // VEC * VEC)[None, :] | WHOLE
    n += offset // VEC * VEC
    m = tl.program_id(0) // CHUNKS * BM + tl.arange(0, BM)
    there = m < tokens
    r = tl.arange(0, GRANULE)
    row = y + (m.to(tl.int64) * stride_y)[:, None]
    mask = there[:, None] & inside
    # All loads before any product: the compiler waits for what that needs, and then asks for the rest.
    place = tl.load(places + m, mask=there, other=0)
    weight = tl.load(weights + m, mask=there, other=0.0)
    before = tl.load(row + n[None, :], mask=mask, other=0.0)
    if RESIDUAL:
        beneath = tl.load(residual + (m.to(tl.int64) * D)[:, None] + n[None, :], mask=mask, other=0.0)
    to = out + (m.to(tl.int64) * stride_out)[:, None] + n[None, :]
    some = slot < last if BESIDE else True
    if some:
        s_at = row + (D + j * GRANULE + r)[None, :]
        b_at = b + (r * D)[:, None] + n[None, :]
        scale = tl.load(scales + j * SCALES + slot)
        s = tl.load(s_at + slot * (NT * GRANULE), mask=there[:, None], other=0.0)
        b_slot = tl.load(b_at + slot * (GRANULE * D), mask=inside, other=0.0)
        total = before.to(tl.float32) + _delta(s, b_slot, place, weight, scale, slot, ENDS)
        if SLOTS > 1:
            for more in tl.range(slot + 1, last, num_stages=1):
                scale = tl.load(scales + j * SCALES + more)
                s = tl.load(s_at + more * (NT * GRANULE), mask=there[:, None], other=0.0)
                b_slot = tl.load(b_at + more * (GRANULE * D), mask=inside, other=0.0)
                total += _delta(s, b_slot, place, weight, scale, more, ENDS)
        if RESIDUAL:
            total += beneath.to(tl.float32)
        tl.store(to, total.to(y.dtype.element_ty), mask=mask & (place >= 0)[:, None] if BESIDE else mask)
    if BESIDE:  # noqa: SIM102 - known when it is compiled
        if others:
            own = mask & (place < 0)[:, None]
            beside = tl.load(delta + (m.to(tl.int64) * D)[:, None] + n[None, :], mask=own, other=0.0)
            total = before.to(tl.float32) + beside.to(tl.float32)
            if RESIDUAL:
                total += beneath.to(tl.float32)
            left = place < tl.where(slot < last, 0, ENDS * ENDS)
            tl.store(to, total.to(y.dtype.element_ty), mask=mask & left[:, None])


@triton.jit
def _activated(x, GATE: tl.constexpr, FAST: tl.constexpr):
    z = x
    if GATE == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    if FAST:
        return libdevice.fast_dividef(x, 1.0 + libdevice.fast_expf(-z))
    return x * tl.sigmoid(tl.maximum(z, -80.0))  # below it exp overflows, and the result is 0 in half precision


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(
    y,
    delta,
    h,
    b,
    scales,
    tells,
    places,
    weights,
    tokens,
    stride_y,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    GRANULE: tl.constexpr,
    ENDS: tl.constexpr,
    BESIDE: tl.constexpr,
    GATE: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    TILE: tl.constexpr,
    BN: tl.constexpr,
):
    """BN columns of BM rows: h = activation(gate + its delta) · (up + its delta), where y is [gate | up | s]."""
    CHUNKS: tl.constexpr = (WIDTH + BN - 1) // BN
    D: tl.constexpr = 2 * WIDTH
    slot, last, others = _tell(tells, tl.program_id(0) // CHUNKS * BM // TILE, SLOTS, ENDS)
    n = tl.program_id(0) % CHUNKS * BN + tl.arange(0, BN)
    inside = (n < WIDTH)[None, :] | (WIDTH % BN == 0)
    m = tl.program_id(0) // CHUNKS * BM + tl.arange(0, BM)
    there = m < tokens
    r = tl.arange(0, GRANULE)
    row = y + (m.to(tl.int64) * stride_y)[:, None]
    mask = there[:, None] & inside
    place = tl.load(places + m, mask=there, other=0)
    weight = tl.load(weights + m, mask=there, other=0.0)
    gate = tl.load(row + n[None, :], mask=mask, other=0.0)
    up = tl.load(row + WIDTH + n[None, :], mask=mask, other=0.0)
    to = h + (m.to(tl.int64) * WIDTH)[:, None] + n[None, :]
    some = slot < last if BESIDE else True
    if some:
        s_at = row + (D + r)[None, :]
        b_at = b + (r * D)[:, None] + n[None, :]
        of_gate, of_up = tl.load(scales + slot), tl.load(scales + SCALES + slot)
        s_gate = tl.load(s_at + slot * (2 * GRANULE), mask=there[:, None], other=0.0)
        s_up = tl.load(s_at + slot * (2 * GRANULE) + GRANULE, mask=there[:, None], other=0.0)
        b_gate = tl.load(b_at + slot * (GRANULE * D), mask=inside, other=0.0)
        b_up = tl.load(b_at + slot * (GRANULE * D) + WIDTH, mask=inside, other=0.0)
        all_gate = gate.to(tl.float32) + _delta(s_gate, b_gate, place, weight, of_gate, slot, ENDS)
        all_up = up.to(tl.float32) + _delta(s_up, b_up, place, weight, of_up, slot, ENDS)
        if SLOTS > 1:
            for more in tl.range(slot + 1, last, num_stages=1):
                of_gate, of_up = tl.load(scales + more), tl.load(scales + SCALES + more)
                s_gate = tl.load(s_at + more * (2 * GRANULE), mask=there[:, None], other=0.0)
                s_up = tl.load(s_at + more * (2 * GRANULE) + GRANULE, mask=there[:, None], other=0.0)
                b_gate = tl.load(b_at + more * (GRANULE * D), mask=inside, other=0.0)
                b_up = tl.load(b_at + more * (GRANULE * D) + WIDTH, mask=inside, other=0.0)
                all_gate += _delta(s_gate, b_gate, place, weight, of_gate, more, ENDS)
                all_up += _delta(s_up, b_up, place, weight, of_up, more, ENDS)
        out = _activated(all_gate, GATE, FAST) * all_up
        tl.store(to, out.to(h.dtype.element_ty), mask=mask & (place >= 0)[:, None] if BESIDE else mask)
    if BESIDE:  # noqa: SIM102 - known when it is compiled
        if others:
            own = mask & (place < 0)[:, None]
            beside = delta + (m.to(tl.int64) * D)[:, None] + n[None, :]
            gate_beside = tl.load(beside, mask=own, other=0.0)
            up_beside = tl.load(beside + WIDTH, mask=own, other=0.0)
            all_gate = gate.to(tl.float32) + gate_beside.to(tl.float32)
            all_up = up.to(tl.float32) + up_beside.to(tl.float32)
            out = _activated(all_gate, GATE, FAST) * all_up
            left = place < tl.where(slot < last, 0, ENDS * ENDS)
            tl.store(to, out.to(h.dtype.element_ty), mask=mask & left[:, None])
