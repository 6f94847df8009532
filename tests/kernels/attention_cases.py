"""Paged batches for the attention kernels, and what they must give, computed in float64 without pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.attention import StepLayout


@dataclass
class Case:
    """Sequences as (queries in this step, keys in all); decoding ones first, as a StepLayout has them."""

    name: str
    sequences: list[tuple[int, int]]
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one key", [(1, 1)]),
    Case("decode, lengths around page and block ends", [(1, n) for n in (1, 15, 16, 17, 63, 64, 65, 130)]),
    Case("decode, head_dim 80, groups of 3", [(1, 100), (1, 7)], query_heads=6, head_dim=80),
    Case("decode, one KV head for 16", [(1, 40)], query_heads=16, kv_heads=1, head_dim=16),
    Case("decode, head_dim 256, no groups", [(1, 33)], query_heads=2, kv_heads=2, head_dim=256, page_size=8),
    Case("decode, window", [(1, 300), (1, 5), (1, 48), (1, 49)], window=48),
    Case("decode, soft cap", [(1, 70), (1, 3)], softcap=5.0),
    Case("prompts from the start", [(70, 70), (2, 2), (33, 33)]),
    Case("chunks over earlier context", [(5, 100), (64, 129), (17, 17)], page_size=32),
    Case("chunks, window, head_dim 96", [(70, 200), (30, 30)], head_dim=96, window=20, page_size=8),
    Case("chunks, soft cap, head_dim 192", [(20, 50)], head_dim=192, softcap=3.0),
    Case("mixed batch", [(1, 90), (1, 1), (40, 65), (2, 130)], query_heads=8, kv_heads=2, head_dim=64),
    Case("mixed batch, window of one key", [(1, 9), (20, 25)], window=1),
]

_ENDS = [(1, n) for n in (1, 2, 16, 17, 18, 63, 64, 65, 66, 129)]
"""Contexts whose newest key is the first or the last of a page or of a kernel's block, or the second."""
DECODING = [
    Case("ends of pages and blocks", _ENDS, query_heads=2),
    Case("head_dim 64, groups of 3, pages of 32", [(1, 300), (1, 33)], 3, 1, head_dim=64, page_size=32),
    Case("head_dim 80, no groups", [(1, 100), (1, 7)], head_dim=80, query_heads=2),
    Case("head_dim 128, groups of 4", [(1, 70), (1, 200)], query_heads=8, head_dim=128),
    Case("one KV head for 16, head_dim 16", [(1, 40), (1, 1)], query_heads=16, kv_heads=1, head_dim=16),
    Case("window", [(1, 300), (1, 5), (1, 48), (1, 49), (1, 65)], window=48),
    Case("window of one key", _ENDS, query_heads=1, kv_heads=1, window=1),
    Case("window of two keys", _ENDS, query_heads=1, kv_heads=1, window=2),
    Case("soft cap", [(1, 70), (1, 3), (1, 1)], softcap=5.0),
    Case("soft cap, window", [(1, 130), (1, 3)], softcap=1.5, window=70),
]
"""Only sequences that decode."""


@dataclass
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    layout: StepLayout
    wanted: Tensor
    """float64 [T, query_heads, head_dim]"""
    scale: float


def make_batch(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Batch:
    """Caches hold each sequence's earlier keys in shuffled pages and NaN everywhere else; q, k, v are those of the
    step's tokens, as transposed views like transformers' own."""
    generator = torch.Generator().manual_seed(seed)
    size, tokens = case.page_size, sum(n for n, _ in case.sequences)
    counts = [-(-keys // size) for _, keys in case.sequences]
    order = torch.randperm(sum(counts) + 3, generator=generator).numpy()
    table = np.zeros((len(counts), max(counts)), dtype=np.int32)

    def random(n: int, heads: int) -> Tensor:
        return torch.randn(heads, n, case.head_dim, generator=generator).to(dtype).transpose(0, 1)

    q, k, v = (random(tokens, h) for h in (case.query_heads, case.kv_heads, case.kv_heads))
    caches = [torch.full((len(order) * size, case.kv_heads, case.head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    slots, wanted, at, page = [], [], 0, 0
    scale = case.head_dim**-0.5
    for s, (n, keys) in enumerate(case.sequences):
        table[s, : counts[s]] = order[page : page + counts[s]]
        page += counts[s]
        position = np.arange(keys)
        where = table[s, position // size].astype(np.int64) * size + position % size
        slots.append(where[keys - n :])
        old = where[: keys - n]
        full = []
        for cache, new in zip(caches, (k[at : at + n], v[at : at + n]), strict=True):
            cache[old] = random(keys - n, case.kv_heads)
            full.append(torch.cat([cache[old], new]))
        wanted.append(attend(case, q[at : at + n], full[0], full[1], scale))
        at += n
    layout = StepLayout(
        slots=np.concatenate(slots),
        query_lens=np.array([n for n, _ in case.sequences], dtype=np.int32),
        context_lens=np.array([keys for _, keys in case.sequences], dtype=np.int32),
        page_table=table,
        num_decode=sum(n == 1 for n, _ in case.sequences),
    )
    shape = (len(order), size, case.kv_heads, case.head_dim)
    k_cache, v_cache = (cache.view(shape).to(device) for cache in caches)
    q, k, v = (t.to(device) for t in (q, k, v))
    return Batch(q, k, v, k_cache, v_cache, layout, torch.cat(wanted), scale)


def attend(case: Case, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(cap(q k^T · scale)) v for the last len(q) positions of a sequence, in float64."""
    n, keys = len(q), len(k)
    group = case.query_heads // case.kv_heads
    q, k, v = q.double(), (k.double().repeat_interleave(group, 1)), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    position = torch.arange(keys - n, keys)[:, None]
    key = torch.arange(keys)[None]
    seen = key <= position
    if case.window is not None:
        seen &= key > position - case.window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
