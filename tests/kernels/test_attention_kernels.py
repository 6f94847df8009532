"""The Triton attention kernels against attention without pages, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapters.arena import Arena
from adapters.manifest import Manifest
from service.engine import attention_triton, build
from service.engine.attention import LayerShape, PagedAttention, StepLayout
from service.engine.attention_triton import (
    MOST_IN_PARTS,
    NewEntries,
    TritonPagedAttention,
    decode,
    decode_splits,
    kv_write,
    paged_attention,
)
from service.engine.config import EngineConfig
from service.engine.errors import UnsupportedModel
from service.engine.model import LoadedModel
from service.engine.step_arrays import StepArrays, tiles
from tests.kernels.attention_cases import CASES, DECODING, Batch, Case, attend, make_batch
from tests.kernels.lora_cases import error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.float16: 2e-3}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_pages(case: Case, dtype: torch.dtype) -> None:
    batch = make_batch(case, dtype, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    kv_write(batch.k, batch.v, batch.k_cache, batch.v_cache, step.slots)
    out = paged_attention(
        batch.q, batch.k_cache, batch.v_cache, step, scale=batch.scale, window=case.window, softcap=case.softcap
    )
    assert out.is_contiguous()
    assert error(out, batch.wanted) < LIMIT[dtype]


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("window", [None, 40])
def test_decode_in_several_parts_gives_the_same(splits: int, window: int | None) -> None:
    """Parts that are uneven, and more parts than there are keys."""
    case = Case("", [(1, n) for n in (1, 64, 200)], query_heads=6, kv_heads=2, head_dim=48, window=window)
    batch = make_batch(case, torch.float32, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    kv_write(batch.k, batch.v, batch.k_cache, batch.v_cache, step.slots)
    out = decoded(batch, case, step, splits, writes=False)
    assert error(out, batch.wanted) < 1e-6


def decoded(
    batch: Batch,
    case: Case,
    step: StepArrays,
    splits: int,
    count: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    *,
    writes: bool = True,
) -> torch.Tensor:
    """What `decode` gives, by default where it writes the step's own keys; 7 where it leaves `out` alone."""
    out = torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype, device=DEVICE)
    decode(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        step.page_table,
        step.context_lens,
        out,
        new=NewEntries(batch.k, batch.v, step.slots) if writes else None,
        scale=batch.scale,
        max_context=step.max_context,
        window=case.window,
        softcap=case.softcap,
        splits=splits,
        count=count,
        counters=counters,
    )
    return out


def written(batch: Batch, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches as they are to be with the step's own keys in `slots`."""
    caches = batch.k_cache.clone(), batch.v_cache.clone()
    for cache, new in zip(caches, (batch.k, batch.v), strict=True):
        cache.flatten(0, 1)[slots[slots >= 0].long()] = new[slots >= 0].to(cache.dtype)
    return caches


def assert_same_bits(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))  # NaN as well


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 1), (torch.float32, 2), (torch.float16, 16)], ids=str)
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_decode_writes_the_newest_keys_and_sees_them(case: Case, dtype: torch.dtype, splits: int) -> None:
    """Their slots, and all that is behind them, hold NaN: whoever reads one of these gives NaN."""
    batch = make_batch(case, dtype, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    wanted = written(batch, step.slots)
    out = decoded(batch, case, step, splits)
    assert error(out, batch.wanted) < LIMIT[dtype]
    assert_same_bits(batch.k_cache, wanted[0])
    assert_same_bits(batch.v_cache, wanted[1])


@pytest.mark.parametrize("splits", [1, 4])
def test_what_decode_writes_may_lie_anywhere(splits: int) -> None:
    """Keys and values in parts of one tensor, whose heads' elements are not adjacent, and caches in another dtype."""
    case = Case("", [(1, n) for n in (40, 17, 1)])
    batch = make_batch(case, torch.float32, DEVICE)
    both = torch.stack((batch.k, batch.v), -1)
    batch.k, batch.v = both[..., 0], both[..., 1]
    batch.k_cache, batch.v_cache = batch.k_cache.half(), batch.v_cache.half()
    batch.q = batch.q.half()
    step = StepArrays.from_layout(batch.layout, DEVICE)
    wanted = written(batch, step.slots)
    out = decoded(batch, case, step, splits)
    assert error(out, batch.wanted) < LIMIT[torch.float16]
    assert_same_bits(batch.k_cache, wanted[0])
    assert_same_bits(batch.v_cache, wanted[1])


@pytest.mark.usefixtures("poisoned_memory")
def test_more_parts_than_are_read_at_once() -> None:
    """16 heads of 256 elements: one part after the other."""
    case = Case("", [(1, 130), (1, 65)], query_heads=16, kv_heads=1, head_dim=256)
    batch = make_batch(case, torch.float32, DEVICE)
    assert error(decoded(batch, case, StepArrays.from_layout(batch.layout, DEVICE), 8), batch.wanted) < 1e-6


@pytest.mark.usefixtures("poisoned_memory")
def test_counters_are_zero_again_and_serve_the_next_layer() -> None:
    counters = torch.zeros(10, dtype=torch.int32, device=DEVICE)
    for contexts in ((200, 1, 64, 129), (65, 300, 2, 1), (130, 200)):
        case = Case("", [(1, n) for n in contexts])
        batch = make_batch(case, torch.float32, DEVICE)
        step = StepArrays.from_layout(batch.layout, DEVICE)
        assert error(decoded(batch, case, step, 4, counters=counters), batch.wanted) < 1e-6
        assert (counters == 0).all()


def test_too_few_counters_are_left_alone() -> None:
    counters = torch.full((7,), 5, dtype=torch.int32, device=DEVICE)
    case = Case("", [(1, n) for n in (200, 1, 64, 129)])
    batch = make_batch(case, torch.float32, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    assert error(decoded(batch, case, step, 4, counters=counters), batch.wanted) < 1e-6
    assert (counters == 5).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there programs run in what order they please")
def test_whichever_part_is_last_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    case = Case("", [(1, n) for n in (300, 129, 1)], query_heads=6, head_dim=48)
    place = interpreter_builder.set_grid_idx
    grid = list(np.ndindex(3, 2, 4))
    outs = []
    for order in (grid, grid[::-1], sorted(grid, key=lambda at: at[2]), sorted(grid, key=lambda at: at[2] ^ 2)):
        turn = dict(zip(grid, order, strict=True))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, turn=turn: place(*turn[x, y, z]))
        batch = make_batch(case, torch.float32, DEVICE)
        outs.append(decoded(batch, case, StepArrays.from_layout(batch.layout, DEVICE), splits=4))
    assert error(outs[0], batch.wanted) < 1e-6
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


def test_prompts_on_the_side_are_waited_for_after_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the step frees could be given to others while the prompts' kernel still reads and writes it."""
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for parts")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(attention_triton, "prefill", lambda *_, **__: None)
    monkeypatch.setattr(attention_triton, "decode", fails)
    batch = make_batch(Case("", [(1, 9), (20, 25)]), torch.float32, torch.device("cpu"))
    step = StepArrays.from_layout(batch.layout, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        paged_attention(batch.q, batch.k_cache, batch.v_cache, step, scale=1.0, side=Stream("side"))  # type: ignore[arg-type]
    assert waits == [("side", "main"), ("main", "side")]


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_writes_nothing_for_padding(splits: int) -> None:
    """A warm-up step's token has a context but no slot, a graph's padding neither; those beyond the count are not
    decode's. What lies in the rows of padding may be NaN."""
    case = Case("", [(1, n) for n in (70, 9, 33, 1, 20)])
    batch = make_batch(case, torch.float32, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    step.slots[[1, 2]] = -1
    step.context_lens[2] = 0
    for rows in (batch.q, batch.k, batch.v):
        rows[2] = torch.nan
    kept = step.slots.clone()
    kept[4] = -1
    wanted = written(batch, kept)
    out = decoded(batch, case, step, splits, torch.tensor([4], dtype=torch.int32, device=DEVICE))
    assert error(out[[0, 1, 3]], batch.wanted[[0, 1, 3]]) < 1e-6
    assert (out[2] == 0).all()
    assert (out[4] == 7).all()
    assert_same_bits(batch.k_cache, wanted[0])
    assert_same_bits(batch.v_cache, wanted[1])


@pytest.mark.parametrize("splits", [1, 4])
def test_a_padding_row_without_context_gives_zeros(splits: int) -> None:
    """Graphs run at fixed batch sizes; the rows that fill them up have no keys."""
    q = torch.randn(2, 4, 32, device=DEVICE)
    cache = torch.full((2, 16, 2, 32), torch.nan, device=DEVICE)
    out = torch.full_like(q, torch.nan)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    lens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    decode(q, cache, cache, table, lens, out, scale=1.0, max_context=64, splits=splits)
    assert (out == 0).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_beyond_the_count_are_left_alone(splits: int) -> None:
    """A CUDA graph has room for more sequences than decode; the rows behind belong to prompts."""
    case = Case("", [(1, n) for n in (70, 9, 33)])
    batch = make_batch(case, torch.float32, DEVICE)
    step = StepArrays.from_layout(batch.layout, DEVICE)
    kv_write(batch.k, batch.v, batch.k_cache, batch.v_cache, step.slots)
    out = torch.full(batch.q.shape, 7.0, device=DEVICE)
    count = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    decode(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        step.page_table,
        step.context_lens,
        out,
        scale=batch.scale,
        max_context=70,
        splits=splits,
        count=count,
    )
    assert error(out[:2], batch.wanted[:2]) < 1e-6
    assert (out[2] == 7.0).all()


def test_tiles_hold_every_query_of_prompts_once_and_those_that_see_most_first() -> None:
    case = Case("", [(1, 90), (40, 65), (2, 130), (129, 129)])
    layout = make_batch(case, torch.float32, DEVICE).layout
    seqs, rows = tiles(layout, 16)
    covered = [
        (int(s), int(query))
        for s, row in zip(seqs, rows, strict=True)
        for query in range(row, min(row + 16, layout.query_lens[s]))
    ]
    assert sorted(covered) == [(s, query) for s in (1, 2, 3) for query in range(layout.query_lens[s])]
    sees = [int(layout.context_lens[s] - layout.query_lens[s] + row) for s, row in zip(seqs, rows, strict=True)]
    assert sees == sorted(sees, reverse=True)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 80), (8, 128)])
def test_kv_write_touches_its_slots_only(heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(heads, 4, head_dim, generator=generator).to(DEVICE).transpose(0, 1) for _ in range(2))
    k_cache, v_cache = (torch.full((5, 8, heads, head_dim), 7.0, device=DEVICE) for _ in range(2))
    slots = torch.tensor([39, -1, 0, 17], dtype=torch.int32, device=DEVICE)
    kv_write(k, v, k_cache, v_cache, slots)
    for cache, new in ((k_cache, k), (v_cache, v)):
        wanted = torch.full((40, heads, head_dim), 7.0, device=DEVICE)
        wanted[[39, 0, 17]] = new[[0, 2, 3]]
        assert torch.equal(cache.view(40, heads, head_dim), wanted)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_backend_over_two_steps(softcap: float | None) -> None:
    """A prompt in two chunks, then a token of it beside a new prompt, through begin_step and attend."""
    shape = LayerShape(0, 4, 2, 32, 0.2, None, softcap)
    backend = TritonPagedAttention([shape], pages=6, page_size=8, dtype=torch.float32, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(30, h, 32, generator=generator).to(DEVICE) for h in (4, 2, 2))
    case = Case("", [], head_dim=32, softcap=softcap)
    table = np.array([[4, 0, 3]], dtype=np.int32)

    def layout(begin: int, end: int) -> StepLayout:
        position = np.arange(begin, end)
        return StepLayout(
            slots=table[0, position // 8].astype(np.int64) * 8 + position % 8,
            query_lens=np.array([end - begin], dtype=np.int32),
            context_lens=np.array([end], dtype=np.int32),
            page_table=table[:, : -(-end // 8)],
            num_decode=int(end - begin == 1),
        )

    wanted = attend(case, q[:21].cpu(), k[:21].cpu(), v[:21].cpu(), 0.2)
    for begin, end in ((0, 12), (12, 20), (20, 21)):
        backend.begin_step(layout(begin, end))
        out = backend.attend(q[begin:end], k[begin:end], v[begin:end], *backend.tensors[0], 0.2, None, softcap)
        assert error(out, wanted[begin:end]) < 1e-6


@pytest.mark.parametrize("uniform", [False, True])
def test_the_backend_gives_what_the_torch_backend_gives_in_any_kind_of_step(
    uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, decoding sequences beside one, and decoding ones alone, whose keys no other kernel writes."""
    writes: list[int] = []

    def counting(k: torch.Tensor, *rest: torch.Tensor) -> None:
        writes.append(len(k))
        kv_write(k, *rest)

    monkeypatch.setattr(attention_triton, "kv_write", counting)
    shape = LayerShape(0, 4, 2, 32, 0.2, window=60)
    backends = [
        TritonPagedAttention([shape], 12, 32, torch.float32, DEVICE, uniform=uniform),
        PagedAttention([shape], 12, 32, torch.float32, DEVICE),
    ]
    table = np.array([[4, 0, 3, 7], [9, 2, 5, 6], [1, 8, 10, 11]], dtype=np.int32)
    generator = torch.Generator().manual_seed(3)
    contexts = np.zeros(3, dtype=np.int32)
    for counts in ([7, 70, 1], [1, 1, 9], [1, 1, 1], [1, 1, 1]):
        order = np.argsort(np.array(counts) > 1, kind="stable")
        lens = np.array(counts, dtype=np.int32)
        positions = [np.arange(contexts[s], contexts[s] + counts[s]) for s in order]
        contexts = contexts + lens
        layout = StepLayout(
            slots=np.concatenate(
                [table[s, p // 32].astype(np.int64) * 32 + p % 32 for s, p in zip(order, positions, strict=True)]
            ),
            query_lens=lens[order],
            context_lens=contexts[order],
            page_table=table[order],
            num_decode=int((lens == 1).sum()),
        )
        tokens = int(lens.sum())
        q, k, v = (torch.randn(tokens, h, 32, generator=generator).to(DEVICE) for h in (4, 2, 2))
        outs = []
        for backend in backends:
            backend.begin_step(layout)
            outs.append(backend.attend(q, k, v, *backend.tensors[0], 0.2, 60))
        assert error(outs[0], outs[1].cpu().double()) < 1e-6
        for cache, wanted in zip(backends[0].tensors[0], backends[1].tensors[0], strict=True):
            assert_same_bits(cache, wanted)
    assert writes == ([78, 11, 3, 3] if uniform else [78, 11])


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (40, 1.5)])
def test_a_uniform_backend_gives_every_token_the_same_bits_in_any_step(
    window: int | None, softcap: float | None
) -> None:
    """A sequence of 150 tokens whole, in chunks with a stranger beside it, and token by token at its end."""
    shape = LayerShape(0, 4, 2, 32, 0.2, window, softcap)
    backend = TritonPagedAttention([shape], 32, 16, torch.float16, DEVICE, uniform=True)
    length = 150
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randn(length, n, 32, generator=generator).to(DEVICE, torch.float16) for n in (4, 2, 2)]

    def attended(*parts: tuple[int, int, int]) -> torch.Tensor:
        """parts: (first token, last token + 1, tokens of the stranger) of each step."""
        backend.tensors[0][0].fill_(torch.nan)
        backend.tensors[0][1].fill_(torch.nan)
        outs = []
        for begin, end, strange in parts:
            own = np.arange(begin, end)
            other = np.arange(strange)
            counts = np.array([strange, end - begin] if strange else [end - begin], dtype=np.int32)
            pages = np.arange(10, dtype=np.int32)
            layout = StepLayout(
                slots=np.concatenate((16 * 20 + other, own)),
                query_lens=counts,
                context_lens=np.array([strange, end] if strange else [end], dtype=np.int32),
                page_table=np.stack((pages + 20, pages)) if strange else pages[None],
                num_decode=int((counts == 1).sum()) if counts[0] == 1 else 0,
            )
            backend.begin_step(layout)
            more = [torch.randn(strange, *t.shape[1:], device=DEVICE).to(t.dtype) for t in heads]
            q, k, v = (torch.cat((m, t[begin:end])) for m, t in zip(more, heads, strict=True))
            outs.append(backend.attend(q, k, v, *backend.tensors[0], 0.2, window, softcap)[strange:])
        return torch.cat(outs)

    whole = attended((0, length, 0))
    assert not whole.isnan().any()
    chunks = attended((0, 37, 20), (37, 38, 1), (38, 101, 0), (101, 140, 90), *((i, i + 1, 1) for i in range(140, 150)))
    # The interpreter's products are numpy's, whose rows do depend on their place.
    assert torch.equal(whole, chunks) if DEVICE.type == "cuda" else error(chunks, whole) < 1e-3


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    def make(page_size: int = 16, heads: int = 4, head_dim: int = 64) -> TritonPagedAttention:
        shape = LayerShape(layer=0, query_heads=heads, kv_heads=2, head_dim=head_dim, scaling=1.0, window=None)
        return TritonPagedAttention([shape], 2, page_size, torch.float32, DEVICE)

    with pytest.raises(ValueError, match="page_size: 12"):
        make(page_size=12)
    with pytest.raises(ValueError, match="5 query heads"):
        make(heads=5)
    with pytest.raises(ValueError, match="34 query heads"):
        make(heads=34)
    with pytest.raises(ValueError, match="head_dim: 320"):
        make(head_dim=320)


def test_a_model_whose_heads_are_not_served_cannot_start() -> None:
    """Falcon-7B has 71 query heads for one of keys and values."""
    shape = LayerShape(layer=0, query_heads=71, kv_heads=1, head_dim=64, scaling=1.0, window=None)
    config = EngineConfig(model_path="", blobs_dir="", cache_dir="", socket="", device="cuda")
    manifest = Manifest("0" * 64, "FalconForCausalLM", "falcon", "float32", 10, 10, ())
    loaded = LoadedModel(nn.Identity(), manifest, [shape], [], DEVICE, torch.float32)  # type: ignore[arg-type]
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 10, rows=1)
    with pytest.raises(UnsupportedModel, match="FalconForCausalLM: 71 query heads over 1 KV heads"):
        build._kernels(config, loaded, 1, arena)


def test_decode_splits() -> None:
    assert decode_splits(8, 600, 132) == 16
    assert decode_splits(32 * 8, 600, 132) == 1
    assert decode_splits(8, 20, 132) == 1
    assert decode_splits(8, 131072, 132) == 64


def test_a_backend_allocates_no_counters_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph that would be a launch for each layer, as many as are saved."""
    given: list[torch.Tensor | None] = []
    original = attention_triton.decode

    def noting(*tensors: torch.Tensor, counters: torch.Tensor | None, **rest: Any) -> None:
        given.append(counters)
        original(*tensors, counters=counters, **rest)

    monkeypatch.setattr(attention_triton, "decode", noting)
    shape = LayerShape(0, 4, 2, 32, 0.2, None)
    backend = TritonPagedAttention([shape], 4, 64, torch.float32, DEVICE)
    one = np.array([1], dtype=np.int32)
    backend.begin_step(StepLayout(np.array([150]), one, one * 151, np.arange(3, dtype=np.int32)[None], 1))
    q, k, v = (torch.randn(1, n, 32, device=DEVICE) for n in (4, 2, 2))
    assert not backend.attend(q, k, v, *backend.tensors[0], 0.2, None).isnan().any()
    assert [counters is backend._counters for counters in given] == [True]
    assert backend._counters.numel() >= 2
    assert (backend._counters == 0).all()


@pytest.mark.parametrize("multiprocessors", [1, 7, 16, 132])
def test_a_backend_has_counters_for_whatever_is_split(multiprocessors: int) -> None:
    most = MOST_IN_PARTS * multiprocessors
    assert decode_splits(most, 1 << 20, multiprocessors) > 1
    assert all(decode_splits(most + more, 1 << 20, multiprocessors) == 1 for more in range(1, 300))
