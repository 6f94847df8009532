"""Paged attention against attention over the whole sequence in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.engine.attention import Current, LayerShape, PagedAttention, StepLayout, attend, chunk_mask

PAGE = 8


def oracle(q, k, v, window, scaling, softcap):
    """Causal attention of whole sequences, float64: q [T, heads, d], k and v [T, kv_heads, d]."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(q))
    hidden = position[None] > position[:, None]
    if window is not None:
        hidden |= position[None] <= position[:, None] - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (1, None), (5, None), (16, None), (1000, None), (None, 1.5), (5, 1.5)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 20), (8, 1, 64)])
def test_chunks_and_decodes_of_many_sequences_equal_whole_sequences(window, softcap, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(heads * 100 + head_dim)
    lengths = [1, 7, 8, 9, 41, 30]
    shape = LayerShape(0, heads, kv_heads, head_dim, 0.37, window, softcap)
    pages_each = -(-max(lengths) // PAGE)
    backend = PagedAttention([shape], len(lengths) * pages_each, PAGE, torch.float32, torch.device("cpu"))
    for cache in backend.tensors[0]:
        cache.fill_(1e4)  # left over by others: must never be read into a result
    rng = np.random.default_rng(0)
    table = rng.permutation(len(lengths) * pages_each).reshape(len(lengths), pages_each).astype(np.int32)
    data = [
        tuple(torch.randn(n, h, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads)) for n in lengths
    ]
    expected = [oracle(*each, window, 0.37, softcap) for each in data]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        counts = [min(int(rng.integers(1, 12)), n - d) for d, n in zip(done, lengths, strict=True)]
        active = sorted((i for i in range(len(lengths)) if counts[i]), key=lambda i: counts[i] > 1)
        positions = [np.arange(done[i], done[i] + counts[i]) for i in active]
        backend.begin_step(
            StepLayout(
                slots=np.concatenate(
                    [
                        table[i, p // PAGE].astype(np.int64) * PAGE + p % PAGE
                        for i, p in zip(active, positions, strict=True)
                    ]
                ),
                query_lens=np.array([counts[i] for i in active], dtype=np.int32),
                context_lens=np.array([done[i] + counts[i] for i in active], dtype=np.int32),
                page_table=table[active],
                num_decode=sum(counts[i] == 1 for i in active),
            )
        )
        packed = (torch.cat([data[i][j][p] for i, p in zip(active, positions, strict=True)]) for j in range(3))
        out = backend.attend(*packed, *backend.tensors[0], 0.37, window, softcap)
        start = 0
        for i, p in zip(active, positions, strict=True):
            torch.testing.assert_close(out[start : start + len(p)].double(), expected[i][p], atol=1e-5, rtol=1e-5)
            start += len(p)
            done[i] += len(p)


def test_a_plain_causal_mask_is_left_to_the_kernel():
    cpu = torch.device("cpu")
    assert chunk_mask(5, 5, None, cpu) is None
    assert chunk_mask(5, 5, 5, cpu) is None
    mask = chunk_mask(2, 5, 2, cpu)
    assert mask is not None
    assert mask.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_sequence_that_overflows_harms_neither_its_neighbour_nor_the_next_owner_of_its_pages(softcap):
    shape = LayerShape(0, 2, 1, 8, 0.3, None, softcap)
    backend = PagedAttention([shape], 3, PAGE, torch.float32, torch.device("cpu"))

    def step(pages, values):
        backend.begin_step(
            StepLayout(
                slots=np.array([page * PAGE for page in pages]),
                query_lens=np.ones(len(pages), dtype=np.int32),
                context_lens=np.ones(len(pages), dtype=np.int32),
                page_table=np.array(pages, dtype=np.int32)[:, None],
                num_decode=len(pages),
            )
        )
        v = torch.tensor(values)[:, None, None].expand(-1, 1, 8)
        return backend.attend(torch.ones(len(pages), 2, 8), v, v, *backend.tensors[0], 0.3, None, softcap)

    assert step([0, 1], [float("nan"), 3.0])[1].unique().tolist() == [3.0]
    for bad in (float("inf"), float("-inf"), float("nan"), 3e38, -3e38):
        backend.begin_step(
            StepLayout(
                slots=np.arange(PAGE),
                query_lens=np.array([PAGE], dtype=np.int32),
                context_lens=np.array([PAGE], dtype=np.int32),
                page_table=np.array([[0]], dtype=np.int32),
                num_decode=0,
            )
        )
        backend.attend(*(torch.full((PAGE, h, 8), bad) for h in (2, 1, 1)), *backend.tensors[0], 0.3, None, softcap)
        assert step([0], [5.0]).unique().tolist() == [5.0]


@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_page_0_pads_nobody_s_table(bad):
    """The shorter of two decoding sequences is padded to the longer one, while page 0 belongs to one that overflows."""
    backend = PagedAttention([LayerShape(0, 2, 1, 8, 0.3, None)], 4, PAGE, torch.float32, torch.device("cpu"))
    for k_or_v in backend.tensors[0]:
        k_or_v[0] = bad
        k_or_v[1:] = 1.0
    backend.begin_step(
        StepLayout(
            slots=np.array([2 * PAGE + 1, 3 * PAGE + 1]),
            query_lens=np.ones(2, dtype=np.int32),
            context_lens=np.array([PAGE + 2, 2], dtype=np.int32),
            page_table=np.array([[1, 2], [3, 0]], dtype=np.int32),
            num_decode=2,
        )
    )
    ones = torch.ones(2, 1, 8)
    out = backend.attend(ones.expand(2, 2, 8), ones, ones, *backend.tensors[0], 0.3, None)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_the_operator_is_registered_truthfully():
    """torch's own check: schema, mutation of the caches, and what it returns without data."""
    attention = PagedAttention([LayerShape(0, 4, 2, 16, 0.25, None)], 4, 16, torch.float32, torch.device("cpu"))
    attention.begin_step(
        StepLayout(
            slots=np.arange(5),
            query_lens=np.array([5], dtype=np.int32),
            context_lens=np.array([5], dtype=np.int32),
            page_table=np.zeros((1, 1), dtype=np.int32),
            num_decode=0,
        )
    )
    before, Current.backend = Current.backend, attention
    try:
        q, k, v = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
        arguments = (q, k, v, *attention.tensors[0], 0.25, None, 1.5)
        torch.library.opcheck(attend.default, arguments, test_utils=("test_schema", "test_faketensor"))
    finally:
        Current.backend = before
