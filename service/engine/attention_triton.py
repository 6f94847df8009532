"""Attention over a paged KV cache on CUDA: the Triton backend, same interface as attention.PagedAttention.

Caches are [pages, page_size, kv_heads, head_dim]. Decoding sequences read their keys and values once for all query
heads of a group, in several programs per sequence where there are few of them; prompt chunks attend causally to their
pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from adapters.kernels import early
from service.engine.attention import LayerShape, StepLayout, allocate_cache
from service.engine.attention_kernels import decode_kernel, kv_write_kernel, prefill_kernel
from service.engine.step_arrays import SMALL_TILE, StepArrays

LOG2E = 1.4426950408889634
MIN_PAGE_SIZE = 8
MAX_HEAD_DIM = 256
MAX_GROUP = 16
MAX_SPLITS = 64
MERGED_AT_ONCE = 4096
"""Elements of parts that are read at once when they are put together: 32 registers of a thread."""
REGISTERS = 128
"""Of a thread of `decode` where there are several parts: four programs to a multiprocessor, as `decode_splits` counts
on. Left alone the compiler takes up to 150 for what puts them together, and then there is room for three. Heads above
128 and float32 have always needed more."""
MOST_IN_PARTS = 2
"""Sequences times KV heads, for each multiprocessor, that `decode_splits` gives several parts."""


@dataclass(frozen=True, slots=True)
class NewEntries:
    """KV entries of a step's tokens that are to be written to the caches."""

    k: Tensor
    """[T, kv_heads, head_dim]"""
    v: Tensor
    """The same."""
    slots: Tensor
    """[T] int32, page * page_size + offset; -1: not written."""


class TritonPagedAttention:
    """The Triton backend. `tensors` holds (k, v) by layer, each [pages, page_size, kv_heads, head_dim]."""

    def __init__(
        self,
        shapes: list[LayerShape],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        uniform: bool = False,
    ) -> None:
        """uniform: what a token attends to gives the same bits whatever the step: alone or with others, in a prompt's
        chunk of any size or decoding. All sequences then go the way of prompts."""
        if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
            raise ValueError(f"page_size: {page_size} is not a power of two of at least {MIN_PAGE_SIZE}")
        if pages * page_size > 2**31 - 1:
            raise ValueError(f"pages: {pages} pages of {page_size} tokens are more than 2**31 - 1 slots")
        for shape in shapes:
            check_heads(shape.query_heads, shape.kv_heads, shape.head_dim)
        self.device = device
        self.uniform = uniform
        self.block_m = SMALL_TILE if uniform or dtype.itemsize > 2 else None
        """Queries of a tile, where the step has no say in it: without tensor cores (float32) larger ones spill."""
        self.tensors = allocate_cache(shapes, pages, page_size, dtype, device)
        # Graphs keep its address: what more sequences would need must not take its place.
        self._counters = torch.zeros(MOST_IN_PARTS * _multiprocessors(device), dtype=torch.int32, device=device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin_step(self, layout: StepLayout) -> None:
        if self.uniform:
            layout = replace(layout, num_decode=0)
        self.step = StepArrays.from_layout(layout, self.device, self.block_m)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [T, query_heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, query_heads, head_dim]; k and v are
        written to their slots."""
        return paged_attention(
            q,
            k_cache,
            v_cache,
            self.step,
            new=NewEntries(k, v, self.step.slots),
            scale=scaling,
            window=window,
            softcap=softcap,
            counters=self._counters,
            side=self._side,
            uniform=self.uniform,
        )


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes k and v [T, kv_heads, head_dim] to slots [T] (page * page_size + offset; -1 skips) of the caches."""
    tokens, heads, head_dim = k.shape
    k, v = _adjacent(k), _adjacent(v)
    if tokens == 0:
        return
    kv_write_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        HEADS=heads,
        D=head_dim,
        PAGE=k_cache.shape[1],
        BH=triton.next_power_of_2(heads),
        BD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    step: StepArrays,
    *,
    new: NewEntries | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    counters: Tensor | None = None,
    side: torch.cuda.Stream | None = None,
    uniform: bool = False,
) -> Tensor:
    """A mixed batch: q [T, query_heads, head_dim] -> the same shape, contiguous. Query i of n of a sequence with c keys
    stands at position c - n + i and sees keys 0 .. position, with `window` only those > position - window; `softcap`
    replaces scores by softcap · tanh(score / softcap). new: the tokens' own keys, which are written; None: they lie in
    the caches. counters: see `decode`. side: prompts are computed there, beside decoding sequences. uniform: see
    `prefill`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n = step.num_decode
    if new is not None and (n < len(q) or step.tile_seq.numel()):
        kv_write(new.k, new.v, k_cache, v_cache, new.slots)
        new = None
    main = None
    if step.tile_seq.numel() and n and side is not None:
        main = torch.cuda.current_stream(q.device)
        side.wait_stream(main)
    try:
        if step.tile_seq.numel():
            with torch.cuda.stream(side if main is not None else None):
                prefill(q, k_cache, v_cache, step, out, scale=scale, window=window, softcap=softcap, uniform=uniform)
        if n:
            decode(
                q[:n],
                k_cache,
                v_cache,
                step.page_table[:n],
                step.context_lens[:n],
                out[:n],
                new=new,
                scale=scale,
                max_context=step.max_context,
                window=window,
                softcap=softcap,
                count=step.count,
                counters=counters,
                starts_early=step.starts_early,
            )
    finally:  # else what is freed after a failure might be given away while prompts are still computed
        if main is not None and side is not None:
            main.wait_stream(side)
    return out


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    new: NewEntries | None = None,
    scale: float,
    max_context: int,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
    count: Tensor | None = None,
    counters: Tensor | None = None,
    starts_early: bool = False,
) -> None:
    """One query per sequence: q and out [S, query_heads, head_dim]. A sequence with context 0 gets zeros.

    new: each sequence's newest key, which is written; where context is 0 it is not. None: it lies in the caches.
    max_context: an upper bound of context_lens. splits: programs per sequence and KV head; None chooses. count: int32
    [1], only so many sequences are computed, and of `out` only their rows written. counters: int32 zeros, which they
    are again afterwards; where they are fewer than sequences * kv_heads, several splits get others. starts_early: where
    the device can, before the kernel before has ended; only with `new` and without `count`."""
    sequences, query_heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    group = check_heads(query_heads, kv_heads, head_dim)
    padded = max(16, triton.next_power_of_2(head_dim))
    rows = triton.next_power_of_2(group)
    block = _block_n(padded, q.element_size())
    if splits is None:
        reach = max_context if window is None else min(max_context, window)
        splits = decode_splits(sequences * kv_heads, reach, _multiprocessors(q.device))
    partials = logsums = out
    if splits == 1:
        counters = out
    else:
        partials = torch.empty(sequences, query_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        logsums = torch.empty(sequences, query_heads, splits, dtype=torch.float32, device=q.device)
        if counters is None or counters.numel() < sequences * kv_heads:
            counters = torch.zeros(sequences * kv_heads, dtype=torch.int32, device=q.device)
    factor, cap = _scores(scale, softcap)
    starts_early = starts_early and new is not None and count is None and early.can_start_early(q.device)
    k, v, slots = (q, q, context_lens) if new is None else (_adjacent(new.k), _adjacent(new.v), new.slots)
    decode_kernel[(sequences, kv_heads, splits)](
        _rows(q),
        k,
        v,
        slots,
        k_cache,
        v_cache,
        page_table,
        context_lens,
        context_lens if count is None else count,
        out,
        partials,
        logsums,
        counters,
        factor,
        cap,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        page_table.stride(0),
        D=head_dim,
        GROUP=group,
        PAGE=k_cache.shape[1],
        BN=block,
        BD=padded,
        ROWS=rows,
        AT_ONCE=max(1, MERGED_AT_ONCE // (rows * padded)),
        DIRECT=splits == 1,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        COUNTED=count is not None,
        WRITES=new is not None,
        EARLY=starts_early,
        num_warps=4,
        num_stages=3,
        maxnreg=REGISTERS if splits > 1 and padded <= 128 and q.element_size() == 2 else None,
        **early.options(starts_early),
    )


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    step: StepArrays,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    uniform: bool = False,
) -> None:
    """Chunks of prompts, by the step's tiles: tokens query_starts[s] : query_starts[s + 1] of q and out [T,
    query_heads, head_dim] are the last of sequence s, whose context_lens[s] keys (its own included) lie in its
    pages. uniform: a query's result does not depend on its place in a tile, bit for bit."""
    _, query_heads, head_dim = q.shape
    group = check_heads(query_heads, k_cache.shape[2], head_dim)
    padded = max(16, triton.next_power_of_2(head_dim))
    factor, cap = _scores(scale, softcap)
    prefill_kernel[(step.tile_seq.numel(), query_heads)](
        _rows(q),
        k_cache,
        v_cache,
        step.page_table,
        step.context_lens,
        step.query_starts,
        step.tile_seq,
        step.tile_row,
        out,
        factor,
        cap,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        step.page_table.stride(0),
        D=head_dim,
        GROUP=group,
        PAGE=k_cache.shape[1],
        BM=step.block_m,
        BN=_block_n(padded, q.element_size()),
        BD=padded,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        UNIFORM=uniform,
        num_warps=4,
        num_stages=2,  # 3 to 5 take 3 to 10% longer (H100, prompts of 512 to 8192)
    )


def decode_splits(programs: int, reach: int, multiprocessors: int) -> int:
    """Programs per sequence and KV head: enough to fill the chip, as long as each has keys worth a launch.

    On an H200 with 8 KV heads and 600 keys: 1 sequence takes 18.6 us in 1 part and 6.7 us in 16; 32 sequences are
    fastest in 1."""
    splits = 1
    while splits < MAX_SPLITS and programs * splits * 2 <= multiprocessors and reach > splits * 32:
        splits *= 2
    while splits < MAX_SPLITS and programs * splits * 2 <= 4 * multiprocessors and reach >= splits * 2048:
        splits *= 2
    return splits


def check_heads(query_heads: int, kv_heads: int, head_dim: int) -> int:
    """Query heads per KV head. Raises ValueError for what the kernels do not serve."""
    group, rest = divmod(query_heads, kv_heads)
    if rest or not 1 <= group <= MAX_GROUP:
        raise ValueError(f"{query_heads} query heads over {kv_heads} KV heads: served are groups of 1 to {MAX_GROUP}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim: {head_dim} is above {MAX_HEAD_DIM}")
    return group


def _adjacent(entries: Tensor) -> Tensor:
    """The same with the elements of a head adjacent."""
    return entries if entries.stride(2) == 1 else entries.contiguous()


def _rows(q: Tensor) -> Tensor:
    if q.stride(2) != 1:
        raise ValueError(f"q: elements of a head must be adjacent, found strides {q.stride()}")
    return q


def _scores(scale: float, softcap: float | None) -> tuple[float, float]:
    """(factor of q·k, factor after tanh); the softmax is in base 2, so one of them carries log2(e)."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return scale / softcap, softcap * LOG2E


def _block_n(padded_dim: int, element_size: int) -> int:
    """Keys per step: at most 32 KiB of K and V together, so that three steps fit in shared memory."""
    return max(16, min(64, 16384 // (padded_dim * element_size)))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
