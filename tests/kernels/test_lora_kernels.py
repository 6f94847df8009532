"""The Triton LoRA kernels against the mathematics in float64 (tests/gpu/test_kernels_cuda.py goes further)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from adapters.kernels import ops, triton_lora
from adapters.kernels.device_plan import (
    MOST_BLOCKS,
    DevicePlan,
    PlanShape,
    PlanSizeError,
    pack,
    rank_block,
    rank_bucket,
)
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig
from adapters.plan import covering
from tests.kernels.lora_cases import CASES, Case, error, expected, make_site, make_table, plan_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.float16: 2e-3}


def inputs(tokens: int, k: int, d: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, n, generator=generator).to(DEVICE, dtype) for n in (k, d))
    return x, y


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deltas_are_added(case: Case, dtype: torch.dtype) -> None:
    site = make_site(case.k, case.widths, first_target=1)
    # Target 0 belongs to another site; its factors must not be touched.
    table = make_table([[2, *r] for r in case.ranks], [(8, 8), *((case.k, d) for d in case.widths)], dtype, DEVICE)
    plan = plan_of(case.sequences)
    assert plan is not None
    x, y = inputs(sum(n for n, _ in case.sequences), case.k, site.out_features, dtype)
    wanted = expected(y, x, site, plan, table)
    before = y.clone()
    triton_lora.apply(y, x, site, DevicePlan.from_plan(plan, table.max_rank, DEVICE, case.block_m), table)
    assert error(y, wanted) < LIMIT[dtype]
    untouched = torch.ones(len(y), dtype=torch.bool)
    untouched[plan.tokens] = False
    assert torch.equal(y[untouched], before[untouched])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_covering_plan_writes_deltas_and_zeros(case: Case) -> None:
    site = make_site(case.k, case.widths, first_target=1)
    table = make_table(
        [[2, *r] for r in case.ranks], [(8, 8), *((case.k, d) for d in case.widths)], torch.float32, DEVICE
    )
    plan = plan_of(case.sequences)
    assert plan is not None
    tokens = sum(n for n, _ in case.sequences)
    x, y = inputs(tokens, case.k, site.out_features, torch.float32)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    device_plan = DevicePlan.from_plan(covering(plan, tokens), table.max_rank, DEVICE, case.block_m, covers=True)
    bucket = device_plan.bucket
    block_r = bucket if device_plan.blocks is None else rank_block(case.block_m)
    shrink = ShrinkConfig(block_r, 64, 64, 4, 1, 4)
    expand = ExpandConfig(min(bucket, 32), 64, 128, 4, 1, 4)
    partials = triton_lora.shrink(x, targets, device_plan, table, shrink)
    delta = torch.empty_like(y)
    triton_lora.expand(delta, partials, targets, site.offsets, site.widths, device_plan, table, expand, add=False)
    wanted = expected(torch.zeros_like(y), x, site, plan, table)
    assert error(delta, wanted) < LIMIT[torch.float32]
    bare = torch.ones(tokens, dtype=torch.bool)
    bare[plan.tokens] = False
    assert (delta[bare] == 0).all()


def test_columns_of_a_target_that_an_adapter_leaves_out_stay_bit_for_bit() -> None:
    site = make_site(64, (32, 48))
    table = make_table([[8, 0]], [(64, 32), (64, 48)], torch.float32, DEVICE)
    plan = plan_of([(5, ((0, 1.0),))])
    assert plan is not None
    x, y = inputs(5, 64, 80, torch.float32)
    before = y.clone()
    triton_lora.apply(y, x, site, DevicePlan.from_plan(plan, 8, DEVICE), table)
    assert torch.equal(y[:, 32:], before[:, 32:])
    assert not torch.equal(y[:, :32], before[:, :32])


@pytest.mark.parametrize("largest", [33, 100])
def test_one_buffer_serves_plan_after_plan_and_the_empty_one(largest: int) -> None:
    """What a CUDA graph does: launches stay as they are, only the buffer's contents change. Ranks of 100 are walked."""
    site = make_site(96, (64, 32))
    table = make_table([[8, 8], [largest, 1], [0, 16]], [(96, 64), (96, 32)], torch.float32, DEVICE)
    shape = PlanShape.bounded(entries=40, segments=12, waves=3, block_m=16, max_rank=largest)
    host = np.full(shape.size, -(2**31), dtype=np.int32)
    buffer = torch.empty(shape.size, dtype=torch.int32, device=DEVICE)
    device_plan = DevicePlan(shape, buffer, table.max_rank)
    steps = [
        [(1, ((i % 3, 1.0),)) for i in range(7)],
        [(17, ((0, 1.0), (1, 2.0))), (1, ((2, 1.0),))],
        [(3, ())],
        [(1, ((0, 1.0), (1, 0.5), (2, -1.0)))],
    ]
    for number, sequences in enumerate(steps):
        plan = plan_of(sequences)
        pack(plan, shape, host, None if plan is None else table.ranks_of(plan))
        buffer.copy_(torch.from_numpy(host))
        x, y = inputs(sum(n for n, _ in sequences), 96, 96, torch.float32, seed=number)
        wanted = expected(y, x, site, plan, table)
        triton_lora.apply(y, x, site, device_plan, table)
        assert error(y, wanted) < 1e-6


def test_rows_of_x_and_y_may_be_apart() -> None:
    site = make_site(64, (32,))
    table = make_table([[8]], [(64, 32)], torch.float32, DEVICE)
    plan = plan_of([(4, ((0, 1.0),))])
    assert plan is not None
    x, y = inputs(4, 100, 50, torch.float32)
    wanted = expected(y[:, 10:42], x[:, :64], site, plan, table)
    before = y.clone()
    triton_lora.apply(y[:, 10:42], x[:, :64], site, DevicePlan.from_plan(plan, 8, DEVICE), table)
    assert error(y[:, 10:42], wanted) < 1e-6
    assert torch.equal(y[:, :10], before[:, :10])
    assert torch.equal(y[:, 42:], before[:, 42:])


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(
    ("largest", "shrink_r", "expand_r"), [(64, 64, 16), (64, 64, 64), (100, 32, 16), (100, 32, 128)]
)
def test_every_configuration_gives_the_same_sum(splits: int, largest: int, shrink_r: int, expand_r: int) -> None:
    """Splits of k that are uneven or empty, and ranks in one block or several."""
    site = make_site(200, (64, 40))
    table = make_table([[largest, 64], [33, 5]], [(200, 64), (200, 40)], torch.float32, DEVICE)
    plan = plan_of([(18, ((0, 1.0),)), (1, ((1, 1.0),))])
    assert plan is not None
    x, y = inputs(19, 200, 104, torch.float32)
    wanted = expected(y, x, site, plan, table)
    device_plan = DevicePlan.from_plan(plan, largest, DEVICE, ranks=table.ranks_of(plan))
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    partials = triton_lora.shrink(x, targets, device_plan, table, ShrinkConfig(shrink_r, 32, 200 // splits, 4, 2, 1))
    config = ExpandConfig(expand_r, 16, 32, 4, 2, 1)
    triton_lora.expand(y, partials, targets, site.offsets, site.widths, device_plan, table, config)
    assert error(y, wanted) < 1e-6


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("largest", [16, 64])
def test_a_program_for_each_item_gives_the_same_sum(largest: int, splits: int, chunk: int) -> None:
    """Tiles of one token and of more, ranks of several blocks, columns of no whole chunk, targets that an adapter
    leaves out, a mix."""
    site = make_site(200, (64, 40))
    table = make_table([[largest, 9], [0, 5], [17 % largest, 0]], [(200, 64), (200, 40)], torch.float32, DEVICE)
    singles = [(1, ((row, 0.5 + row),)) for row in range(3)]
    plan = plan_of([(18, ((0, 1.0),)), (2, ((1, 0.5),)), *singles, (1, ((0, 0.5), (1, -1.0), (2, 2.0))), (3, ())])
    assert plan is not None
    x, y = inputs(27, 200, 104, torch.float32)
    wanted = expected(y, x, site, plan, table)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    shrink, expand = ShrinkConfig(largest, 32, 200 // splits, 4, 2, 1), ExpandConfig(largest, 16, chunk, 4, 2, 0, 80)
    device_plan = DevicePlan.from_plan(plan, largest, DEVICE)
    partials = triton_lora.shrink(x, targets, device_plan, table, shrink)
    triton_lora.expand(y, partials, targets, site.offsets, site.widths, device_plan, table, expand)
    assert error(y, wanted) < 1e-6
    device_plan = DevicePlan.from_plan(covering(plan, 27), largest, DEVICE, covers=True)
    delta = torch.full_like(y, torch.nan)
    partials = triton_lora.shrink(x, targets, device_plan, table, shrink)
    triton_lora.expand(delta, partials, targets, site.offsets, site.widths, device_plan, table, expand, add=False)
    assert error(delta, expected(torch.zeros_like(y), x, site, plan, table)) < 1e-6


def test_a_program_for_each_item_is_not_for_ranks_that_are_walked() -> None:
    table = make_table([[100]], [(64, 32)], torch.float32, DEVICE)
    plan = plan_of([(1, ((0, 1.0),))])
    assert plan is not None
    device_plan = DevicePlan.from_plan(plan, 100, DEVICE)
    x, y = inputs(1, 64, 32, torch.float32)
    targets = triton_lora.target_tensor((0,), DEVICE)
    partials = triton_lora.shrink(x, targets, device_plan, table)
    with pytest.raises(ValueError, match="rank bucket 512"):
        triton_lora.expand(y, partials, targets, (0,), (32,), device_plan, table, ExpandConfig(16, 32, 32, 4, 2, 0))


@pytest.mark.parametrize(("largest", "block_r"), [(64, 32), (100, 64)])
def test_a_block_of_ranks_that_is_not_the_plan_s_is_refused(largest: int, block_r: int) -> None:
    table = make_table([[largest]], [(64, 32)], torch.float32, DEVICE)
    plan = plan_of([(4, ((0, 1.0),))])
    assert plan is not None
    x, _ = inputs(4, 64, 32, torch.float32)
    targets = triton_lora.target_tensor((0,), DEVICE)
    with pytest.raises(ValueError, match=f"block_r: {block_r} "):
        triton_lora.shrink(
            x, targets, DevicePlan.from_plan(plan, largest, DEVICE), table, ShrinkConfig(block_r, 32, 64, 4, 2, 1)
        )


def test_wrong_dtype_and_wrong_layout_are_refused() -> None:
    site = make_site(64, (32,))
    table = make_table([[8]], [(64, 32)], torch.float32, DEVICE)
    plan = plan_of([(4, ((0, 1.0),))])
    assert plan is not None
    device_plan = DevicePlan.from_plan(plan, 8, DEVICE)
    x, y = inputs(4, 64, 32, torch.float32)
    with pytest.raises(ValueError, match=r"arena's torch\.float32"):
        triton_lora.apply(y, x.half(), site, device_plan, table)
    with pytest.raises(ValueError, match="adjacent"):
        triton_lora.apply(y, x.t().contiguous().t(), site, device_plan, table)


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    plan = plan_of([(40, ((0, 1.0),)), (1, ((1, 1.0),))])
    shape = PlanShape.bounded(entries=40, segments=4, waves=1, block_m=16, max_rank=16)
    out = np.full(shape.size, 7, dtype=np.int32)
    with pytest.raises(PlanSizeError, match="41 entries"):
        pack(plan, shape, out)
    assert (out == 7).all()
    with pytest.raises(PlanSizeError, match="2 waves"):
        pack(plan_of([(1, ((0, 1.0), (1, 1.0)))]), shape, out)


def test_tiles_cover_every_entry_once_and_never_cross_a_segment() -> None:
    plan = plan_of([(33, ((4, 1.0),)), (16, ((2, 1.0),)), (1, ((9, 1.0), (2, 0.5))), (2, ())])
    assert plan is not None
    shape = PlanShape.of(plan, 16, 64)
    out = np.empty(shape.size, dtype=np.int32)
    pack(plan, shape, out)
    part = {name: out[where] for name, where in shape.slices.items()}
    assert part["wave_tiles"].tolist() == [0, 5, shape.tiles]
    covered = []
    for row, start, length in zip(part["tile_row"], part["tile_start"], part["tile_len"], strict=True):
        segment = int(np.searchsorted(plan.seg_start, start, side="right")) - 1
        assert plan.seg_row[segment] == row
        assert start + length <= plan.seg_start[segment + 1]
        assert 1 <= length <= 16
        covered += range(start, start + length)
    assert covered == list(range(len(plan.tokens)))


@pytest.mark.parametrize("block_m", [16, 64])
def test_the_plan_lists_the_blocks_of_ranks_that_there_are(block_m: int) -> None:
    """Of 3 segments of ranks 300, 0 (no adapter) and 32; without ranks, all that there could be."""
    plan = plan_of([(33, ((4, 1.0),)), (2, ()), (1, ((2, 1.0),))])
    assert plan is not None
    plan = covering(plan, 36)
    ranks = np.array([{4: 300, 2: 32, -1: 0}[row] for row in plan.seg_row.tolist()])
    shape = PlanShape.of(plan, block_m, 300)
    out = np.empty(shape.size, dtype=np.int32)
    part = {name: out[where] for name, where in shape.slices.items()}
    pack(plan, shape, out, ranks)
    listed = [divmod(block, MOST_BLOCKS) for block in part["blocks"][: part["num_blocks"][0]].tolist()]
    size = rank_block(block_m)
    rank_of = dict(zip(plan.seg_row.tolist(), ranks.tolist(), strict=True))
    assert listed == [
        (tile, block) for tile, row in enumerate(part["tile_row"].tolist()) for block in range(-(-rank_of[row] // size))
    ]
    pack(plan, shape, out)
    assert part["num_blocks"][0] == shape.tiles * (512 // size) == len(set(part["blocks"].tolist()))
    pack(None, shape, out)
    assert part["num_blocks"][0] == 0


@pytest.mark.parametrize(("rank", "bucket"), [(1, 16), (16, 16), (17, 64), (100, 512), (512, 512)])
def test_rank_bucket(rank: int, bucket: int) -> None:
    assert rank_bucket(rank) == bucket


def test_ranks_above_the_largest_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="513"):
        rank_bucket(513)


@pytest.fixture
def step() -> Iterator[ops.Step]:
    yield ops.STEP
    ops.STEP.plan = ops.STEP.tables = ops.STEP.side = None


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_reads_the_plan_when_it_runs(step: ops.Step, bias: bool) -> None:
    """One trace serves every plan, with and without adapters."""
    site = make_site(64, (32, 48))
    table = make_table([[8, 4], [16, 0]], [(64, 32), (64, 48)], torch.float32, DEVICE)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    weight, offset = torch.randn(80, 64, device=DEVICE), torch.randn(80, device=DEVICE) if bias else None

    def layer(x: Tensor) -> Tensor:
        y, delta = ops.lora_linear(x, weight, offset, targets, site.offsets, site.widths)
        return y + delta

    step.tables = table
    traces = CompileCounter()
    compiled = torch.compile(layer, backend=traces, fullgraph=True)
    for row in (0, 1, None):
        plan = None if row is None else plan_of([(5, ((row, 1.0),))])
        step.plan = None if plan is None else DevicePlan.from_plan(plan, table.max_rank, DEVICE)
        x, _ = inputs(6, 64, 80, torch.float32, seed=row or 7)
        y = torch.nn.functional.linear(x, weight, offset)
        assert error(compiled(x), expected(y, x, site, plan, table)) < 1e-6
    assert traces.frame_count == 1


def test_the_operator_is_registered_truthfully(step: ops.Step) -> None:
    """torch's own check: schema, mutation and fake results agree with what the operator does."""
    site = make_site(64, (32, 48))
    table = make_table([[8, 4]], [(64, 32), (64, 48)], torch.float32, DEVICE)
    plan = plan_of([(5, ((0, 1.0),))])
    assert plan is not None
    step.tables, step.plan = table, DevicePlan.from_plan(plan, 8, DEVICE)
    x, _ = inputs(5, 64, 80, torch.float32)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    for bias in (None, torch.randn(80, device=DEVICE)):
        arguments = (x, torch.randn(80, 64, device=DEVICE), bias, targets, list(site.offsets), list(site.widths))
        # "test_schema" also finds results that share memory with arguments.
        torch.library.opcheck(ops.lora_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
