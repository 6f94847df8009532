"""The Triton kernels on a GPU: every case of tests/kernels in each dtype, against float64, and inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from adapters.kernels import ops, triton_lora
from adapters.kernels.device_plan import DevicePlan, PlanShape, pack
from adapters.kernels.side import Side, left_free
from service.engine.attention_triton import NewEntries, decode, kv_write, paged_attention
from service.engine.step_arrays import StepArrays
from tests.kernels import attention_cases, lora_cases
from tests.kernels.lora_cases import error, expected, make_site, make_table, plan_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(LIMIT)
LLAMA = [
    ((4096, 1024, 1024), 4096),
    ((4096,), 4096),
    ((14336, 14336), 4096),
    ((4096,), 14336),
]
"""(widths, k) of the sites of a Llama-3.1-8B layer."""


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", lora_cases.CASES, ids=str)
def test_lora(case: lora_cases.Case, dtype: torch.dtype) -> None:
    site = make_site(case.k, case.widths)
    table = make_table(case.ranks, [(case.k, d) for d in case.widths], dtype, DEVICE)
    plan = plan_of(case.sequences)
    assert plan is not None
    tokens = sum(n for n, _ in case.sequences)
    x = torch.randn(tokens, case.k, device=DEVICE).to(dtype)
    y = torch.randn(tokens, site.out_features, device=DEVICE).to(dtype)
    wanted = expected(y, x, site, plan, table)
    # float32 tiles of 64 spill, so its plans use 16, as the engine's do.
    block_m = 16 if dtype == torch.float32 else case.block_m
    triton_lora.apply(y, x, site, DevicePlan.from_plan(plan, table.max_rank, DEVICE, block_m), table)
    assert error(y, wanted) < LIMIT[dtype]


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("widths", "k"), LLAMA, ids=["qkv", "o", "gate_up", "down"])
def test_lora_delta_alone_on_full_size_sites(widths: tuple[int, ...], k: int, block_m: int) -> None:
    """Onto a y of zeros, so that the delta's own error shows, with ranks 8, 16 and 64 and a mix in one batch."""
    site = make_site(k, widths)
    table = make_table([[r] * len(widths) for r in (16, 8, 64)], [(k, d) for d in widths], torch.bfloat16, DEVICE)
    plan = plan_of([(20, ((0, 1.0),)), (1, ((1, 1.0),)), (3, ()), (70, ((2, 1.0),)), (2, ((1, 0.5), (2, 0.5)))])
    assert plan is not None
    x = torch.randn(96, k, device=DEVICE, dtype=torch.bfloat16)
    y = torch.zeros(96, site.out_features, device=DEVICE, dtype=torch.bfloat16)
    wanted = expected(y, x, site, plan, table)
    triton_lora.apply(y, x, site, DevicePlan.from_plan(plan, 64, DEVICE, block_m), table)
    assert error(y, wanted) < 1e-2
    again = torch.zeros_like(y)
    triton_lora.apply(again, x, site, DevicePlan.from_plan(plan, 64, DEVICE, block_m), table)
    assert torch.equal(y, again), "the same launch must give the same bits"


@pytest.mark.parametrize("largest", [64, 300])
def test_a_captured_graph_serves_other_plans(largest: int) -> None:
    site = make_site(576, (576, 192, 192))
    table = make_table([[16] * 3, [largest, 1, 8], [3, 0, 33]], [(576, d) for d in site.widths], torch.bfloat16, DEVICE)
    shape = PlanShape.bounded(entries=48, segments=32, waves=2, block_m=16, max_rank=largest)
    buffer = torch.empty(shape.size, dtype=torch.int32, device=DEVICE)
    host = np.zeros(shape.size, dtype=np.int32)
    device_plan = DevicePlan(shape, buffer, table.max_rank)
    x = torch.randn(32, 576, device=DEVICE, dtype=torch.bfloat16)
    y = torch.zeros(32, 960, device=DEVICE, dtype=torch.bfloat16)

    def load(plan: lora_cases.LoraPlan | None) -> None:
        pack(plan, shape, host, None if plan is None else table.ranks_of(plan))
        buffer.copy_(torch.from_numpy(host))

    load(None)
    triton_lora.apply(y, x, site, device_plan, table)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_lora.apply(y, x, site, device_plan, table)
    for sequences in (
        [(1, ((i % 3, 1.0),)) for i in range(32)],
        [(32, ((1, 1.0),))],
        [(10, ()), (8, ((0, 0.5), (2, 2.0))), (14, ((1, 1.0),))],
        [(32, ())],
    ):
        plan = plan_of(sequences)
        load(plan)
        x.normal_()
        y.normal_()
        wanted = expected(y, x, site, plan, table)
        graph.replay()
        assert error(y, wanted) < 1e-2


@pytest.fixture
def step() -> Iterator[ops.Step]:
    yield ops.STEP
    ops.STEP.plan = ops.STEP.tables = ops.STEP.side = None


def free_of(tokens: int) -> int | None:
    """As torch names it: None for a product that leaves no multiprocessor free."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return left_free(tokens, torch.cuda.get_device_properties(DEVICE).multi_processor_count if hopper else 0) or None


@pytest.mark.parametrize(("tokens", "leave_free"), [(4, True), (16, True), (16, False), (576, True), (1100, True)])
def test_deltas_beside_the_base_product_on_a_side_stream(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch, tokens: int, leave_free: bool
) -> None:
    """Behind a product that begins first, and before one that does not."""
    site = make_site(4096, (4096, 1024, 1024))
    table = make_table([[16] * 3] * 8, [(4096, d) for d in site.widths], torch.bfloat16, DEVICE)
    plan = plan_of([(tokens // 4, ((i, 1.0),)) for i in range(4)])
    assert plan is not None
    step.tables, step.plan = table, DevicePlan.from_plan(plan, 16, DEVICE)
    step.side = Side(DEVICE, leave_free=leave_free)
    weight = torch.randn(6144, 4096, device=DEVICE, dtype=torch.bfloat16) * 4096**-0.5
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    static = torch.empty(tokens, 4096, device=DEVICE, dtype=torch.bfloat16)
    linear, seen = torch.nn.functional.linear, []

    def noting(*of: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._get_sm_carveout_experimental())
        return linear(*of)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)

    def run() -> torch.Tensor:
        y, delta = ops.lora_linear(static, weight, None, targets, site.offsets, site.widths)
        return y + delta

    static.normal_()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(20):  # a missing wait between the streams shows as a moving error
        static.normal_()
        wanted = expected(static.double() @ weight.double().t(), static, site, plan, table)
        graph.replay()
        assert error(out, wanted) < 1e-2
    assert seen == [free_of(tokens) if leave_free else None] * 2


def test_products_have_all_multiprocessors_again_behind_one_that_failed() -> None:
    side, x = Side(DEVICE), torch.zeros(64, 16, device=DEVICE)
    seen: list[int | None] = []

    def product() -> torch.Tensor:
        seen.append(torch._C._get_sm_carveout_experimental())
        raise RuntimeError("no product")

    with pytest.raises(RuntimeError, match="no product"):
        side.beside(x, 16, product, lambda: None)
    assert seen == [free_of(64)]
    assert torch._C._get_sm_carveout_experimental() is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", attention_cases.CASES, ids=str)
def test_attention(case: attention_cases.Case, dtype: torch.dtype) -> None:
    batch = attention_cases.make_batch(case, dtype, DEVICE)
    arrays = StepArrays.from_layout(batch.layout, DEVICE)
    kv_write(batch.k, batch.v, batch.k_cache, batch.v_cache, arrays.slots)
    out = paged_attention(
        batch.q, batch.k_cache, batch.v_cache, arrays, scale=batch.scale, window=case.window, softcap=case.softcap
    )
    assert error(out, batch.wanted) < LIMIT[dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", attention_cases.DECODING, ids=str)
def test_decode_that_writes_the_newest_keys(case: attention_cases.Case, dtype: torch.dtype, splits: int) -> None:
    """Their slots, and all that is behind them, hold NaN, also for programs that run beside the one that writes."""
    batch = attention_cases.make_batch(case, dtype, DEVICE)
    arrays = StepArrays.from_layout(batch.layout, DEVICE)
    wanted = batch.k_cache.clone(), batch.v_cache.clone()
    kv_write(batch.k, batch.v, *wanted, arrays.slots)
    counters = torch.zeros(len(case.sequences) * case.kv_heads, dtype=torch.int32, device=DEVICE)
    outs = []
    for _ in range(20):
        k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
        out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)
        decode(
            batch.q,
            k_cache,
            v_cache,
            arrays.page_table,
            arrays.context_lens,
            out,
            new=NewEntries(batch.k, batch.v, arrays.slots),
            scale=batch.scale,
            max_context=arrays.max_context,
            window=case.window,
            softcap=case.softcap,
            splits=splits,
            counters=counters,
        )
        for cache, same in zip((k_cache, v_cache), wanted, strict=True):
            assert torch.equal(cache.view(torch.uint8), same.view(torch.uint8))
        outs.append(out)
    assert error(outs[0], batch.wanted) < LIMIT[dtype]
    assert all(torch.equal(out, outs[0]) for out in outs), "the same launch must give the same bits"
    assert (counters == 0).all()


def test_a_captured_decode_serves_other_contexts() -> None:
    """Several layers with one set of counters, which have to be zero again for the next one."""
    shape, layers = (4 * 128, 16, 8, 128), 8
    caches = torch.randn(layers, 2, *shape, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(4, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, 4, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randperm(4 * 128, device=DEVICE).to(torch.int32).view(4, 128)
    contexts = torch.ones(4, dtype=torch.int32, device=DEVICE)
    new = NewEntries(k, v, torch.full((4,), -1, dtype=torch.int32, device=DEVICE))
    counters = torch.zeros(32, dtype=torch.int32, device=DEVICE)
    outs = torch.empty(layers, *q.shape, device=DEVICE, dtype=torch.bfloat16)

    def run(splits: int) -> None:
        for (k_cache, v_cache), out in zip(caches, outs, strict=True):
            decode(
                q,
                k_cache,
                v_cache,
                table,
                contexts,
                out,
                new=new,
                scale=128**-0.5,
                max_context=2048,
                splits=splits,
                counters=counters,
            )

    run(16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(16)
    for lens in ([2048, 1, 64, 700], [65, 2000, 0, 3], [1025, 1026, 1024, 129]):
        contexts.copy_(torch.tensor(lens))
        run(1)
        wanted = outs.double().cpu()
        for _ in range(50):
            outs.fill_(torch.nan)
            graph.replay()
            assert error(outs, wanted) < 1e-2
            assert (counters == 0).all()


@pytest.mark.parametrize("window", [None, 1000])
def test_attention_on_long_contexts(window: int | None) -> None:
    """Llama's heads: thousands of keys, more blocks than parts, chunks that begin and end inside pages."""
    case = attention_cases.Case(
        "",
        [(1, 5000), (1, 4097), (1, 17), (300, 3000), (129, 129)],
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        window=window,
    )
    batch = attention_cases.make_batch(case, torch.bfloat16, DEVICE)
    arrays = StepArrays.from_layout(batch.layout, DEVICE)
    kv_write(batch.k, batch.v, batch.k_cache, batch.v_cache, arrays.slots)
    out = paged_attention(batch.q, batch.k_cache, batch.v_cache, arrays, scale=batch.scale, window=window)
    assert error(out, batch.wanted) < 1e-2
    for splits in (1, 4, 64):
        part = torch.full((3, 32, 128), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        decode(
            batch.q[:3],
            batch.k_cache,
            batch.v_cache,
            arrays.page_table,
            arrays.context_lens,
            part,
            scale=batch.scale,
            max_context=5000,
            window=window,
            splits=splits,
        )
        assert error(part, batch.wanted[:3]) < 1e-2


def test_caches_above_two_to_the_31_elements() -> None:
    """Offsets inside a cache need 64 bits: 2.2e9 elements of K and as many of V."""
    pages, size, heads, head_dim = 34000, 64, 8, 128
    needed = 2 * 2 * pages * size * heads * head_dim
    if torch.cuda.mem_get_info()[0] < needed * 1.2:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free device memory")
    k_cache = torch.empty(pages, size, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    v_cache = torch.empty_like(k_cache)
    case = attention_cases.Case("", [(1, 150)], query_heads=32, kv_heads=heads, head_dim=head_dim, page_size=size)
    batch = attention_cases.make_batch(case, torch.bfloat16, DEVICE)
    used = batch.layout.page_table[0, :3]
    last = np.arange(pages - 3, pages, dtype=np.int32)
    k_cache[pages - 3 :], v_cache[pages - 3 :] = batch.k_cache[used], batch.v_cache[used]
    table = torch.from_numpy(last[None]).to(DEVICE)
    slot = torch.tensor([(pages - 1) * size + 149 % size], dtype=torch.int32, device=DEVICE)
    kv_write(batch.k, batch.v, k_cache, v_cache, slot)
    out = torch.empty_like(batch.q, memory_format=torch.contiguous_format)
    lens = torch.tensor([150], dtype=torch.int32, device=DEVICE)
    decode(batch.q, k_cache, v_cache, table, lens, out, scale=batch.scale, max_context=150)
    assert error(out, batch.wanted) < 1e-2
    for cache in (k_cache, v_cache):
        cache[pages - 1, 149 % size] = torch.nan
    new = NewEntries(batch.k, batch.v, slot)
    decode(batch.q, k_cache, v_cache, table, lens, out, new=new, scale=batch.scale, max_context=150)
    assert error(out, batch.wanted) < 1e-2
    assert torch.equal(k_cache[pages - 1, 149 % size], batch.k[0])
