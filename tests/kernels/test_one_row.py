"""The product of one row, with its adapters in it, against the mathematics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters.kernels import one_row, triton_lora
from adapters.kernels.device_plan import DevicePlan, PlanShape, pack
from adapters.plan import NOTHING, covering
from adapters.site import Site
from tests.kernels.lora_cases import Table, error, expected, make_site, make_table, plan_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensors(k: int, d: int, dtype: torch.dtype, spare: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, k], weight [d, k] with `spare` columns of NaN behind it, bias [d]."""
    generator = torch.Generator().manual_seed(k + d)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((1, k), (d, k), (d,)))
    whole = torch.full((d, k + spare), torch.nan)
    whole[:, :k] = weight
    return x.to(DEVICE, dtype), whole.to(DEVICE, dtype)[:, :k], bias.to(DEVICE, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("k", "d"), [(64, 8), (96, 7), (576, 20), (2048, 12), (2049, 9), (4096, 16), (5000, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_a_base_product(k: int, d: int, dtype: torch.dtype, with_bias: bool, onto: bool) -> None:
    x, weight, bias = tensors(k, d, dtype, spare=16)
    residual = torch.randn(1, d, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) if onto else None
    kept = None if residual is None else residual.clone()
    y = one_row.product(x, weight, bias if with_bias else None, residual=residual)
    wanted = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    if residual is not None and kept is not None:
        wanted += kept.double()
        assert torch.equal(residual, kept)
    assert y.shape == (1, d)
    assert y.dtype == dtype
    assert error(y, wanted.cpu()) < LIMIT[dtype]


def linear(
    x: Tensor, weight: Tensor, site: Site, plan: DevicePlan, table: Table, residual: Tensor | None = None
) -> Tensor:
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    s = one_row.shrink(x, targets, plan, table)
    deltas = one_row.Deltas(s, targets, site.offsets, site.widths, plan, table)
    return one_row.product(x, weight, None, deltas, residual)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [((0, 1.0),), ((1, 2.0),), ((2, 1.0),), ((3, 0.5),), ((0, 1.0), (1, -0.5), (2, 0.25)), ((4, 1.0),), ()],
    ids=["rank 16", "ranks 3, 40 and 1", "one target left out", "rank 300", "a mix", "rank 64", "none"],
)
def test_adapters_of_the_row(rows: tuple[tuple[int, float], ...], dtype: torch.dtype) -> None:
    k, widths = 320, (32, 16, 8)
    ranks = [[2, 16, 16, 16], [2, 3, 40, 1], [2, 8, 0, 8], [2, 300, 300, 300], [2, 64, 64, 64]]
    site = make_site(k, widths, first_target=1)
    table = make_table(ranks, [(8, 8), *((k, d) for d in widths)], dtype, DEVICE)
    plan = covering(plan_of([(1, rows)]) or NOTHING, 1)
    x, weight, _ = tensors(k, site.out_features, dtype)
    device_plan = DevicePlan.from_plan(plan, table.max_rank, DEVICE, covers=True, ranks=table.ranks_of(plan))
    base = x.double() @ weight.double().T
    y = linear(x, weight, site, device_plan, table)
    assert error(y, expected(base, x, site, plan, table)) < LIMIT[dtype]
    residual = torch.full((1, site.out_features), 3.0, dtype=dtype, device=DEVICE)
    y = linear(x, weight, site, device_plan, table, residual)
    assert error(y, expected(base + 3, x, site, plan, table)) < LIMIT[dtype]


def test_rows_longer_than_two_tiles() -> None:
    k, site = 17000, make_site(17000, (8,))
    table = make_table([[3]], [(k, 8)], torch.float32, DEVICE)
    plan = plan_of([(1, ((0, 1.0),))])
    assert plan is not None
    x, weight, _ = tensors(k, 8, torch.float32)
    y = linear(x, weight, site, DevicePlan.from_plan(plan, 3, DEVICE), table)
    assert error(y, expected(x.double() @ weight.double().T, x, site, plan, table)) < 1e-6


def test_a_graphs_plan_has_room_for_more() -> None:
    """Buffers are those of a captured graph: capacities of waves and ranks that most plans do not use."""
    k, widths = 128, (16, 16)
    site = make_site(k, widths)
    table = make_table([[8, 4], [100, 0], [16, 16]], [(k, d) for d in widths], torch.float32, DEVICE)
    shape = PlanShape.bounded(entries=4, segments=5, waves=4, block_m=16, max_rank=512)
    host = torch.full((shape.size,), -(2**31), dtype=torch.int32)
    x, weight, _ = tensors(k, site.out_features, torch.float32)
    base = x.double() @ weight.double().T
    for rows in (((0, 1.0),), ((1, 1.0), (2, 0.5), (0, -1.0)), (), ((2, 3.0),)):
        plan = plan_of([(1, rows)])
        pack(plan, shape, host.numpy(), None if plan is None else table.ranks_of(plan))
        y = linear(x, weight, site, DevicePlan(shape, host.to(DEVICE), 512, covers=True), table)
        assert error(y, expected(base, x, site, plan, table)) < 1e-6


def test_what_it_cannot_do_is_refused() -> None:
    x, weight, _ = tensors(64, 8, torch.float32)
    with pytest.raises(ValueError, match=r"x: expected \[1, 64\], found \[2, 64\]"):
        one_row.product(torch.cat([x, x]), weight, None)
    with pytest.raises(ValueError, match="adjacent"):
        one_row.product(x, weight.T.contiguous().T, None)
    with pytest.raises(ValueError, match=r"residual: expected \[1, 8\], found \[8\]"):
        one_row.product(x, weight, None, residual=torch.zeros(8, device=DEVICE))
    assert not one_row.fits(make_site(64, (6, 8)))
    assert one_row.fits(make_site(64, (12, 8)))
