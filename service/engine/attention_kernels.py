"""The Triton kernels of attention over a paged KV cache; attention_triton.py launches them.

Flash decoding (Dao et al. 2023) for sequences with one query, FlashAttention 2 (Dao 2023) over pages for prompt chunks.
The softmax is float32 in base 2.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


# Arrays of the step lie anywhere in its buffer: an aligned one must not mean another compilation.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def kv_write_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_page,
    stride_slot,
    stride_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        h = tl.arange(0, BH)[:, None]
        d = tl.arange(0, BD)[None, :]
        mask = (h < HEADS) & (d < D)
        at = slot // PAGE * stride_page + slot % PAGE * stride_slot + h * stride_head + d
        tl.store(k_cache + at, tl.load(k + token * stride_kt + h * stride_kh + d, mask=mask), mask=mask)
        tl.store(v_cache + at, tl.load(v + token * stride_vt + h * stride_vh + d, mask=mask), mask=mask)


@triton.jit
def _capped(score, cap):
    """cap · tanh(score): exp2 overflows to infinity and tanh to 1, as it should."""
    return cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * 1.4426950408889634)) + 1.0))


@triton.jit
def _attend_block(
    begin,
    q,
    peak,
    total,
    acc,
    k_cache,
    v_cache,
    table,
    cached,
    position,
    scale,
    cap,
    stride_page,
    stride_slot,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax: keys begin .. begin + BN - 1 for query rows at `position`. Keys from `cached` on
    are neither seen nor read: what lies there may be NaN, and 0 * NaN is NaN.

    MASKED: some of these keys are out of some row's sight; otherwise all rows see all of them. `scale` has log2(e) in
    it, unless CAPPED, where it turns scores into multiples of the cap."""
    key = begin + tl.arange(0, BN)
    d = tl.arange(0, BD)
    if MASKED:
        page = tl.load(table + key // PAGE, mask=key < cached, other=0).to(tl.int64)
    else:
        page = tl.load(table + key // PAGE).to(tl.int64)
    at = (page * stride_page + (key % PAGE) * stride_slot)[:, None] + d[None, :]
    whole: tl.constexpr = (not MASKED) and D == BD
    mask = (key < cached)[:, None] & (d < D)[None, :]
    if whole:
        k = tl.load(k_cache + at)
    else:
        k = tl.load(k_cache + at, mask=mask, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        score = _capped(score, cap)
    if MASKED:
        seen = (key < cached)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        # A row that has seen no key yet has a peak of -inf; it must not make -inf - -inf.
        new_peak = tl.maximum(peak, tl.max(score, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        new_peak = tl.maximum(peak, tl.max(score, 1))
        pivot = new_peak
    p = tl.exp2(score - pivot[:, None])
    shrink = tl.exp2(peak - pivot)
    total = total * shrink + tl.sum(p, 1)
    if whole:
        v = tl.load(v_cache + at)
    else:
        v = tl.load(v_cache + at, mask=mask, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def _merged(
    partials,
    logsums,
    first,
    live,
    parts,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """[ROWS, BD] attention over all keys, of parts first .. first + parts - 1 of each row, in their order whoever was
    last: the same bits every time. live: [ROWS] whether there is such a row. Read past the multiprocessor's own cache:
    others have written them."""
    d = tl.arange(0, BD)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BD], tl.float32)
    for begin in range(0, parts, AT_ONCE):
        part = begin + tl.arange(0, AT_ONCE)
        there = live[:, None] & (part < parts)[None, :]
        at = first[:, None] + part[None, :]
        logsum = tl.load(logsums + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        mask = there[:, :, None] & (d < D)[None, None, :]
        values = tl.load(partials + at[:, :, None] * D + d[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(logsum, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(logsum - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + tl.sum(values * weight[:, :, None], 1)
        peak = new_peak
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["page_table", "context_lens", "count", "slots"],
)
def decode_kernel(
    q,
    k,
    v,
    slots,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    count,
    out,
    partials,
    logsums,
    counters,
    scale,
    cap,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_page,
    stride_slot,
    stride_head,
    stride_table,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DIRECT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    COUNTED: tl.constexpr,
    WRITES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of one query per sequence over a share of its keys, for the query heads of one KV head.

    Programs whose shares have no keys do nothing. The last of the others to be done puts their parts together; DIRECT:
    there is one share. WRITES: the newest key, the query's own, is in k and v and not yet in the cache. The program of
    the last share that has keys attends to it and writes it to its slot, which no program reads."""
    if EARLY:  # adapters/kernels/early.py
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s = tl.program_id(0).to(tl.int64)
    if COUNTED:  # noqa: SIM102
        if s >= tl.load(count):
            return
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(context_lens + s)
    cached = context
    if WRITES:
        cached = tl.maximum(context - 1, 0)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // BN
    blocks = tl.cdiv(cached, BN) - first
    share = tl.maximum(tl.cdiv(blocks, splits), 1)
    parts = tl.maximum(tl.cdiv(blocks, share), 1)
    if not DIRECT:  # noqa: SIM102 - known when it is compiled
        if split >= parts:
            return
    begin = first + split * share
    end = tl.minimum(begin + share, first + blocks)

    rows = tl.arange(0, 16)
    d = tl.arange(0, BD)
    query_heads = head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (d < D)[None, :]
    qv = tl.load(q + s * stride_qt + (query_heads * stride_qh)[:, None] + d[None, :], mask=mask, other=0.0)
    peak = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, BD], tl.float32)
    if WRITES:
        newest = (context > 0) & (split == parts - 1)
        slot = tl.load(slots + s).to(tl.int64)
        new_k = tl.load(k + s * stride_kt + head * stride_kh + d, mask=d < D, other=0.0).to(k_cache.dtype.element_ty)
        new_v = tl.load(v + s * stride_vt + head * stride_vh + d, mask=d < D, other=0.0).to(v_cache.dtype.element_ty)
        if newest & (slot >= 0):
            at = slot // PAGE * stride_page + slot % PAGE * stride_slot + head * stride_head + d
            tl.store(k_cache + at, new_k, mask=d < D)
            tl.store(v_cache + at, new_v, mask=d < D)
        score = tl.sum(qv.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
        if CAPPED:
            score = _capped(score, cap)
        # The online softmax begins with this key, whose weight is then 1.
        peak = tl.where(newest, score, peak)
        total = tl.where(newest, 1.0, total)
        acc = tl.where(newest, new_v.to(tl.float32)[None, :], acc)
    position = tl.zeros([16], tl.int32) + (context - 1)
    for block in range(begin, end):
        peak, total, acc = _attend_block(
            block * BN,
            qv,
            peak,
            total,
            acc,
            k_cache + head * stride_head,
            v_cache + head * stride_head,
            page_table + s * stride_table,
            cached,
            position,
            scale,
            cap,
            stride_page,
            stride_slot,
            D,
            PAGE,
            BN,
            BD,
            WINDOW,
            CAPPED,
            True,
        )
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    out_at = out + s * stride_ot + d[None, :]
    if DIRECT or parts == 1:
        tl.store(out_at + (query_heads * stride_oh)[:, None], acc.to(out.dtype.element_ty), mask=mask)
    else:
        sequence_heads = s * (tl.num_programs(1) * GROUP)
        part = (sequence_heads + query_heads) * splits + split
        tl.store(partials + part[:, None] * D + d[None, :], acc, mask=mask)
        logsum = tl.where(total > 0, peak + tl.log2(divisor), float("-inf"))
        tl.store(logsums + part, logsum, mask=rows < GROUP)
        tl.debug_barrier()
        counter = counters + s * tl.num_programs(1) + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
            group = tl.arange(0, ROWS)
            heads = head * GROUP + group
            live = group < GROUP
            merged = _merged(partials, logsums, (sequence_heads + heads) * splits, live, parts, D, BD, ROWS, AT_ONCE)
            merged_mask = live[:, None] & (d < D)[None, :]
            tl.store(out_at + (heads * stride_oh)[:, None], merged.to(out.dtype.element_ty), mask=merged_mask)
            tl.store(counter, 0)


@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["page_table", "context_lens", "query_starts", "tile_seq", "tile_row"],
)
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    query_starts,
    tile_seq,
    tile_row,
    out,
    scale,
    cap,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_page,
    stride_slot,
    stride_head,
    stride_table,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    s = tl.load(tile_seq + tl.program_id(0)).to(tl.int64)
    if s < 0:
        return
    m0 = tl.load(tile_row + tl.program_id(0))
    head = tl.program_id(1)
    q0 = tl.load(query_starts + s)
    queries = tl.load(query_starts + s + 1) - q0
    context = tl.load(context_lens + s)
    before = context - queries
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    mask = (rows < queries)[:, None] & (d < D)[None, :]
    token = (q0 + rows).to(tl.int64)
    qv = tl.load(q + (token * stride_qt)[:, None] + head * stride_qh + d[None, :], mask=mask, other=0.0)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    position = before + rows
    k_head = k_cache + (head // GROUP) * stride_head
    v_head = v_cache + (head // GROUP) * stride_head
    table = page_table + s * stride_table

    end = tl.minimum(context, before + m0 + BM)
    begin = 0
    # Every row sees every key before the block that holds the first row's own key, unless a window ends its sight.
    whole = (before + m0) // BN * BN
    if WINDOW > 0:
        begin = tl.maximum(before + m0 - WINDOW + 1, 0) // BN * BN
        whole = begin
    if UNIFORM:  # the same code for every block, whatever the row's place in its tile
        whole = begin
    for n0 in range(begin, whole, BN):
        peak, total, acc = _attend_block(
            n0,
            qv,
            peak,
            total,
            acc,
            k_head,
            v_head,
            table,
            context,
            position,
            scale,
            cap,
            stride_page,
            stride_slot,
            D,
            PAGE,
            BN,
            BD,
            WINDOW,
            CAPPED,
            False,
        )
    for n0 in range(whole, end, BN):
        peak, total, acc = _attend_block(
            n0,
            qv,
            peak,
            total,
            acc,
            k_head,
            v_head,
            table,
            context,
            position,
            scale,
            cap,
            stride_page,
            stride_slot,
            D,
            PAGE,
            BN,
            BD,
            WINDOW,
            CAPPED,
            True,
        )
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = (token * stride_ot)[:, None] + head * stride_oh + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
