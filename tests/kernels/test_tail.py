"""Adapters in the tails of base weights: which stand where, and the products against the mathematics in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.kernels import tail, triton_tail
from adapters.kernels.device_plan import PlanSizeError
from adapters.kernels.tail import GRANULE, SLOTS, Placed, Slots
from adapters.kernels.tail_plan import ENDS, TailPlan, TailShape, pack_tail
from adapters.kernels.triton_tail import Config
from adapters.layers import LoraHook, install, sites
from adapters.manifest import Manifest, Module
from adapters.plan import LoraPlan, Rows, covering, parted
from adapters.site import Site
from tests.kernels.lora_cases import Table, error, expected, make_site, make_table, plan_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(LIMIT) if DEVICE.type == "cuda" else [torch.float32, torch.float16]  # numpy has no bfloat16
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

Sequences = list[tuple[int, Rows]]


class World:
    """One site of random weights with its tail, and a table of adapters."""

    def __init__(self, ranks: list[list[int]], k: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        # Target 0 is another site's.
        self.site: Site = make_site(k, widths, first_target=1)
        self.table: Table = make_table([[2, *r] for r in ranks], [(8, 8), *((k, d) for d in widths)], dtype, DEVICE)
        generator = torch.Generator().manual_seed(7)
        self.parts = [torch.randn(d, k, generator=generator).mul(k**-0.5).to(DEVICE, dtype) for d in widths]
        self.tail = tail.with_tail(self.parts, None)
        self.tails = triton_tail.Tails([(self.site, self.tail)], 1 + len(widths), DEVICE)
        self.generation = np.zeros(len(ranks), np.int64)
        self.dtype = dtype

    def plan(self, sequences: Sequences) -> LoraPlan:
        plan = plan_of(sequences)
        assert plan is not None
        return covering(plan, sum(n for n, _ in sequences))

    def place(self, plan: LoraPlan, slots: int = SLOTS) -> Placed:
        placed = self.tails.slots.place(plan, self.table.ranks_of(plan), self.generation, slots)
        assert placed is not None
        return placed

    def x(self, tokens: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(tokens, self.site.in_features, generator=generator).to(DEVICE, self.dtype)

    def whole(self, x: Tensor, plan: TailPlan) -> Tensor:
        self.tails.stage(plan, self.table)
        return functional.linear(x, self.tail.whole)

    def product(self, x: Tensor, plan: TailPlan, delta: Tensor | None = None, config: Config | None = None) -> Tensor:
        return self.read(self.whole(x, plan), plan, delta, config)

    def read(
        self,
        y: Tensor,
        plan: TailPlan,
        delta: Tensor | None = None,
        config: Config | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """What expand makes of a product."""
        site, tail, rest = self.site, self.tail, (plan, delta, config)
        return triton_tail.expand(y, tail.b, tail.scales, site.offsets, site.widths, *rest, residual=residual)

    def wanted(self, plan: LoraPlan, x: Tensor) -> Tensor:
        base = torch.cat([x.cpu().double() @ part.cpu().double().T for part in self.parts], dim=1)
        return expected(base, x, self.site, plan, self.table)


CASES: dict[str, tuple[list[list[int]], int, tuple[int, ...], Sequences]] = {
    "one": ([[16, 16, 16]], 128, (64, 32, 32), [(70, ((0, 1.0),))]),
    "four": (
        [[16], [8], [3], [12]],
        64,
        (80,),
        [(5, ((2, 0.5),)), (66, ((0, 1.0),)), (9, ((1, -2.0),)), (1, ((3, 1.0),))],
    ),
    "the-largest-rank": ([[64, 64], [16, 16]], 200, (48, 40), [(100, ((0, 1.0),)), (4, ())]),
    "ranks-that-differ-by-target": (
        [[20, 32], [30, 0]],
        2104,
        (24, 40),
        [(3, ()), (33, ((1, 1.0),)), (65, ((0, 1.5),)), (2, ())],
    ),
    "a-target-without": ([[0, 7]], 64, (32, 32), [(18, ((0, 1.0),))]),
    "odd-sizes": ([[5, 9, 1]], 99, (50, 7, 131), [(17, ((0, 1.0),)), (2, ())]),
    "long-rows": ([[1]], 14336, (16,), [(17, ((0, 1.0),))]),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_product_and_what_reads_it_are_base_and_deltas(case: str, dtype: torch.dtype) -> None:
    ranks, k, widths, sequences = CASES[case]
    world = World(ranks, k, widths, dtype)
    plan = world.plan(sequences)
    tokens = sum(n for n, _ in sequences)
    device_plan = TailPlan.from_plan(plan, world.place(plan), tokens, DEVICE)
    x = world.x(tokens)
    y = world.product(x, device_plan)
    assert error(y, world.wanted(plan, x)) < LIMIT[dtype]
    weight = world.tail.whole[: world.site.out_features]
    assert torch.equal(weight, torch.cat(world.parts)), "the base weight was written"
    residual = world.x(tokens, 2)[:, :1] + torch.zeros_like(y)
    whole = world.whole(x, device_plan)
    kept, given = whole.clone(), residual.clone()
    z = world.read(whole, device_plan, residual=residual)
    assert error(z, world.wanted(plan, x) + residual.cpu().double()) < LIMIT[dtype]
    assert torch.equal(whole, kept), "y stays as it is"
    assert torch.equal(residual, given)
    bare = np.setdiff1d(np.arange(tokens), plan.tokens[np.repeat(plan.seg_row >= 0, np.diff(plan.seg_start))])
    assert torch.equal(y[bare], functional.linear(x, world.tail.whole)[bare, : world.site.out_features])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("slots", [1, SLOTS])
def test_deltas_that_were_computed_beside_the_product_are_added_where_they_are_to(slots: int) -> None:
    """All rows of delta but those are anything."""
    world = World([[16, 5], [7, 16], [3, 3]], 64, (24, 40), DTYPE)
    plan = world.plan([(70, ((1, 1.5),)), (1, ((0, 1.0),)), (5, ()), (20, ((2, 0.5),)), (1, ((0, 1.0),))])
    row_of = np.repeat(plan.seg_row, np.diff(plan.seg_start))
    part, rest = parted(plan, row_of == 1)
    assert rest is not None
    _, rest = parted(rest, np.repeat(rest.seg_row, np.diff(rest.seg_start)) < 0)
    assert part is not None
    assert rest is not None
    x = world.x(97)
    base = torch.cat([x.cpu().double() @ each.cpu().double().T for each in world.parts], dim=1)
    beside = torch.full((97, 64), torch.nan, device=DEVICE, dtype=DTYPE)
    deltas = expected(torch.zeros_like(base), x, world.site, rest, world.table)
    beside[rest.tokens] = deltas[rest.tokens].to(DEVICE, DTYPE)
    tail_plan = TailPlan.from_plan(part, world.place(part, slots), 97, DEVICE, slots, rest)
    tail_plan.weights[tail_plan.places <= 0] = 3e38  # whatever an earlier plan left there
    y = world.product(x, tail_plan, beside)
    assert error(y, world.wanted(plan, x)) < LIMIT[DTYPE]
    z = world.read(world.whole(x, tail_plan), tail_plan, beside, residual=torch.ones_like(y))
    assert error(z, world.wanted(plan, x) + 1) < LIMIT[DTYPE]
    alone = TailPlan.from_plan(None, None, 97, DEVICE, slots, rest)
    y = world.product(x, alone, beside)
    assert error(y, expected(base, x, world.site, rest, world.table)) < LIMIT[DTYPE]
    h = triton_tail.gated(world.whole(x, tail_plan), world.tail.b, world.tail.scales, "silu", alone, beside)
    first, second = expected(base, x, world.site, rest, world.table).chunk(2, -1)
    assert error(h, functional.silu(first) * second) < LIMIT[DTYPE]
    with pytest.raises(PlanSizeError, match="beside"):
        TailPlan.from_plan(None, None, 96, DEVICE, slots, rest)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("slots", [1, SLOTS])
def test_what_overflows_for_other_adapters_tokens_is_not_theirs(slots: int) -> None:
    """s of an adapter is computed for every token, and may be infinite for those of others."""
    ranks = [[16, 16], [5, 16]][: 2 if slots > 1 else 1]
    world = World(ranks, 64, (32, 32), DTYPE)
    sequences: Sequences = [(3, ()), (20, ((0, 1.0),)), (14, ())]
    if slots > 1:
        sequences += [(30, ((1, 1.0),)), (1, ())]
    plan = world.plan(sequences)
    tokens = sum(n for n, _ in sequences)
    placed = world.place(plan, slots)
    device_plan = TailPlan.from_plan(plan, placed, tokens, DEVICE, slots)
    x = world.x(tokens)
    whole = world.whole(x, device_plan)
    begin, per_slot = world.site.out_features, 2 * GRANULE
    own = torch.zeros(tokens, slots, dtype=torch.bool)
    for segment, (first, last) in enumerate(placed.slots.tolist()):
        own[plan.tokens[plan.seg_start[segment] : plan.seg_start[segment + 1]], first:last] = True
    s = whole[:, begin : begin + slots * per_slot].view(tokens, slots, per_slot)
    s[~own.to(DEVICE)] = torch.inf
    with np.errstate(invalid="ignore"):  # Triton's interpreter is numpy
        h = triton_tail.gated(whole, world.tail.b, world.tail.scales, "silu", device_plan)
        y = world.read(whole, device_plan)
    first, second = world.wanted(plan, x).chunk(2, -1)
    assert error(h, functional.silu(first) * second) < LIMIT[DTYPE]
    assert error(y, world.wanted(plan, x)) < LIMIT[DTYPE]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize(
    ("ranks", "width", "sequences", "slots"),
    [
        ([[16, 16]], 64, [(70, ((0, 1.0),))], 1),
        ([[16, 5]], 50, [(3, ()), (17, ((0, -1.5),))], 1),
        ([[3, 16], [0, 30], [12, 0]], 160, [(20, ((0, 1.0),)), (9, ()), (40, ((1, 0.5),)), (33, ((2, 2.0),))], SLOTS),
    ],
    ids=["one", "an-odd-width", "three-and-none"],
)
def test_a_gate_adds_the_deltas_of_both_halves(
    ranks: list[list[int]], width: int, sequences: Sequences, slots: int, gate: str, dtype: torch.dtype
) -> None:
    world = World(ranks, 128, (width, width), dtype)
    plan = world.plan(sequences)
    tokens = sum(n for n, _ in sequences)
    device_plan = TailPlan.from_plan(plan, world.place(plan, slots), tokens, DEVICE, slots)
    x = world.x(tokens)
    h = triton_tail.gated(world.whole(x, device_plan), world.tail.b, world.tail.scales, gate, device_plan)
    first, second = world.wanted(plan, x).chunk(2, -1)
    assert error(h, ACTIVATIONS[gate](first) * second) < LIMIT[dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("slots", [1, SLOTS])
@pytest.mark.parametrize("config", [Config(16, 16), Config(16, 128), Config(32, 64)], ids=str)
def test_however_it_is_launched(config: Config, slots: int) -> None:
    """Blocks of rows whose adapters differ, and columns that are no whole blocks."""
    world = World([[16, 5], [7, 16]], 64, (24, 136), DTYPE)
    sequences: Sequences = [(3, ()), (70, ((1, 1.5),)), (17, ())]
    if slots > 1:
        sequences.append((25, ((0, 1.0),)))
    plan = world.plan(sequences)
    tokens = sum(n for n, _ in sequences)
    x = world.x(tokens)
    device_plan = TailPlan.from_plan(plan, world.place(plan, slots), tokens, DEVICE, slots)
    assert error(world.product(x, device_plan, config=config), world.wanted(plan, x)) < LIMIT[DTYPE]


def test_one_buffer_serves_plan_after_plan() -> None:
    """What a CUDA graph does: adapters come and go in the tail, some stay, and one row's block is replaced."""
    world = World([[16, 16], [16, 8], [40, 33], [5, 16], [16, 0], [64, 64]], 96, (64, 32), DTYPE)
    shape = TailShape(300, SLOTS)
    host = np.full(shape.size, -(2**31), dtype=np.int32)
    buffer = torch.empty(shape.size, dtype=torch.int32, device=DEVICE)
    device_plan = TailPlan(shape, buffer)
    steps: list[tuple[Sequences, int]] = [
        ([(70, ((0, 1.0),)), (20, ((1, 1.0),))], 2),
        ([(70, ((0, 1.0),)), (20, ((1, 1.0),))], 0),
        ([(9, ((1, 0.5),)), (64, ((3, 1.0),)), (64, ((4, 1.0),)), (3, ())], 2),
        ([(200, ((2, 1.0),)), (20, ((1, 1.0),))], 2),  # adapter 1 stood in the middle
        ([(65, ((5, 1.0),))], 1),
        ([(1, ((0, 1.0),)), (1, ((3, 1.0),))], 2),
        ([(1, ((0, 1.0),)), (1, ((3, 1.0),))], 1),
    ]
    for number, (sequences, staged) in enumerate(steps):
        if number == 6:
            world.generation[0] += 1
        plan = world.plan(sequences)
        placed = world.place(plan)
        assert len(placed.staged) == staged, number
        pack_tail(plan, placed, shape, host)
        buffer.copy_(torch.from_numpy(host))
        x = world.x(300, number)
        tokens = sum(n for n, _ in sequences)
        y = world.product(x, device_plan)
        world.tails.slots.launched(placed)
        assert error(y[:tokens], world.wanted(plan, x[:tokens])) < LIMIT[DTYPE], number
        rest = functional.linear(x, world.tail.whole)[tokens:, : world.site.out_features]
        assert torch.equal(y[tokens:], rest), "tokens that no plan names, of a larger graph"


def test_an_adapter_that_takes_another_s_place_leaves_nothing_of_it() -> None:
    """One of rank 60 without the second target, then one of rank 1: the same as over a fresh tail."""
    worlds = [World([[60, 60], [1, 0]], 64, (32, 32), DTYPE) for _ in range(2)]
    for row in (0, 1):
        plan = worlds[0].plan([(64, ((row, 1.0),))])
        device_plan = TailPlan.from_plan(plan, worlds[0].place(plan), 64, DEVICE)
        worlds[0].tails.stage(device_plan, worlds[0].table)
        worlds[0].tails.slots.launched(worlds[0].place(plan))
    fresh = TailPlan.from_plan(plan, worlds[1].place(plan), 64, DEVICE)
    x = worlds[0].x(64)
    assert torch.equal(worlds[0].product(x, device_plan), worlds[1].product(x, fresh))


def test_an_empty_plan_stages_and_computes_nothing() -> None:
    world = World([[16]], 64, (32,), DTYPE)
    shape = TailShape(32, SLOTS)
    host = np.full(shape.size, -(2**31), dtype=np.int32)
    pack_tail(None, None, shape, host)
    device_plan = TailPlan(shape, torch.from_numpy(host).to(DEVICE))
    x = torch.ones(32, 64, dtype=DTYPE, device=DEVICE)
    assert torch.equal(world.product(x, device_plan), functional.linear(x, world.tail.whole)[:, :32])
    assert (world.tail.whole[32:] == 0).all()
    assert (world.tail.b == 0).all()


def test_a_bias_goes_with_the_weight() -> None:
    weight, bias = torch.randn(32, 64), torch.randn(32)
    whole, long, _, _ = tail.with_tail([weight[:8], weight[8:]], bias)
    x = torch.randn(3, 64)
    assert long is not None
    torch.testing.assert_close(functional.linear(x, whole, long)[:, :32], functional.linear(x, weight, bias))
    assert (functional.linear(x, whole, long)[:, 32:] == 0).all()


class Block(nn.Module):
    def __init__(self, widths: dict[str, tuple[int, int]], *, bias_of: str = "") -> None:
        super().__init__()
        for name, (k, d) in widths.items():
            setattr(self, name, nn.Linear(k, d, bias=name == bias_of))


@pytest.mark.parametrize("apart", [False, True], ids=["one product", "siblings that cannot share one"])
def test_memory_is_counted(apart: bool) -> None:
    """As much as `with_tail` takes beside the weights."""
    shapes = {"q_proj": (64, 96), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (96, 64), "down_proj": (50, 64)}
    modules = tuple(Module(name, "linear", k, d) for name, (k, d) in shapes.items())
    manifest = Manifest("0" * 64, "Block", "block", "bfloat16", 10, 10, modules)
    model = Block(shapes, bias_of="v_proj" if apart else "").bfloat16()
    before = sum(linear.weight.nbytes for linear in model.children())
    counted = tail.spare_bytes([site for _, site in sites(model, manifest)], 2)
    installed = install(model, manifest, cast(LoraHook, None), tails=True)
    assert len(installed) == (5 if apart else 3)
    after = sum(layer.tail.whole.nbytes + layer.tail.b.nbytes for layer in installed if layer.tail is not None)
    assert counted == after - before


def test_a_tell_says_what_there_is_to_do_in_a_tile() -> None:
    """Too much would do no harm but take longer."""
    world = World([[16], [32], [7]], 64, (32,), DTYPE)
    sequences: Sequences = [(32, ()), (32, ((0, 1.0),)), (16, ((0, 1.0),)), (16, ((1, 1.0),)), (8, ((1, 1.0),))]
    plan = world.plan([*sequences, (20, ()), (4, ((2, 1.0),)), (32, ((2, 1.0),)), (3, ((1, 1.0),))])
    part, rest = parted(plan, np.repeat(plan.seg_row, np.diff(plan.seg_start)) < 2)
    assert rest is not None
    placed = world.place(part)
    first = dict(zip(part.seg_row.tolist(), placed.slots.tolist(), strict=True))
    tail_plan = TailPlan.from_plan(part, placed, 163, DEVICE, beside=rest)
    (a, a_end), (b, b_end) = first[0], first[1]
    others = ENDS**2
    both = min(a, b) + max(a_end, b_end) * ENDS
    alone = b + b_end * ENDS
    assert tail_plan.tells.tolist() == [others, a + a_end * ENDS, both, alone + others, others, alone]
    assert TailPlan.from_plan(None, None, 163, DEVICE).tells.tolist() == [others] * 6


def test_what_has_no_place_is_refused() -> None:
    world = World([[16]], 64, (32,), torch.float32)
    plan = world.plan([(8, ((0, 1.0),))])
    placed = world.place(plan)
    shape = TailShape(8, 1)
    host = np.zeros(shape.size, np.int32)
    with pytest.raises(ValueError, match="placed: None"):
        pack_tail(plan, None, shape, host)
    with pytest.raises(ValueError, match="out: expected"):
        pack_tail(plan, placed, shape, host[1:])
    with pytest.raises(PlanSizeError, match="do not fit"):
        pack_tail(world.plan([(9, ((0, 1.0),))]), placed, shape, host)
    with pytest.raises(PlanSizeError, match="do not fit"):
        pack_tail(plan, Placed(placed.slots + 1, ()), shape, host)
    with pytest.raises(ValueError, match="buffer"):
        TailPlan(shape, torch.zeros(shape.size))
    device_plan = TailPlan.from_plan(plan, placed, 8, DEVICE)
    for y in (torch.zeros(9, 160, device=DEVICE), torch.zeros(8, 32 + 4 * 16 - 1, device=DEVICE)):
        with pytest.raises(ValueError, match="y:"):
            triton_tail.expand(y, world.tail.b, world.tail.scales, (0,), (32,), device_plan)
    rest = (world.tail.b, world.tail.scales, (0,), (32,), device_plan)
    zeros = torch.zeros(8, 64, device=DEVICE)
    for residual in (torch.zeros(32, 8, device=DEVICE).t(), zeros[:, :32], zeros[:5, :32].contiguous()):
        with pytest.raises(ValueError, match=r"residual: expected \[8, 32\] in order"):
            triton_tail.expand(torch.zeros(8, 160, device=DEVICE), *rest, residual=residual)
    for rows in (8, 64):
        with pytest.raises(ValueError, match=f"rows: expected 16 or 32, found {rows}"):
            Config(rows, 64)
    for tokens, slots in ((0, 1), (8, 0), (8, SLOTS + 1)):
        with pytest.raises(ValueError, match="expected 1 or more tokens"):
            TailShape(tokens, slots)


class Rows:
    """Slots asked by (row, rank) of one segment each."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.generation = np.zeros(100, np.int64)

    def place(self, *rows: tuple[int, int], launched: bool = True, slots: int = SLOTS) -> tail.Placed | None:
        plan = plan_of([(50, ((row, 1.0),)) for row, _ in sorted(rows)])
        assert plan is not None
        ranks = np.array([rank for _, rank in sorted(rows)], np.int32)
        placed = self.slots.place(plan, ranks, self.generation, slots)
        if launched:
            self.slots.launched(placed)
        return placed


def staged(placed: tail.Placed | None) -> list[int]:
    assert placed is not None
    return sorted(row for row, _, _ in placed.staged)


def test_adapters_that_are_used_stay() -> None:
    rows = Rows()
    assert staged(rows.place((1, 16), (2, 8), (3, 16), (4, 1))) == [1, 2, 3, 4]
    assert staged(rows.place((2, 8))) == []
    assert staged(rows.place((5, 16))) == [5], "of the others, 1 was used least recently"
    assert staged(rows.place((2, 8), (3, 16), (4, 1), (5, 16))) == []
    assert staged(rows.place((1, 16))) == [1]
    assert rows.place((1, 64), (6, 1)) is None
    assert rows.place(*((row, 1) for row in range(SLOTS + 1))) is None


def test_a_large_rank_takes_neighbouring_places_even_if_all_must_move() -> None:
    rows = Rows()
    rows.place((1, 16), (2, 16), (3, 16), (4, 16))
    rows.place((2, 16))
    rows.place((4, 16))
    # 2 and 4 stand apart in places 1 and 3, so that no two neighbours are free.
    placed = rows.place((2, 16), (4, 16), (5, 32))
    assert staged(placed) == [2, 4, 5]
    assert placed is not None
    assert sorted((row, slots) for row, _, slots in placed.staged) == [(2, 1), (4, 1), (5, 2)]
    taken = [slot for _, first, slots in placed.staged for slot in range(first, first + slots)]
    assert sorted(taken) == list(range(SLOTS))


def test_a_row_with_another_block_is_staged_again() -> None:
    rows = Rows()
    rows.place((1, 16), (2, 16))
    rows.generation[1] += 1
    assert staged(rows.place((1, 30), (2, 16))) == [1]


def test_after_a_step_that_failed_everything_is_staged_again() -> None:
    rows = Rows()
    rows.place((1, 16), (2, 16))
    assert staged(rows.place((1, 16), launched=False)) == [], "nothing was to be staged"
    assert staged(rows.place((2, 16), (3, 16), launched=False)) == [3]
    assert staged(rows.place((1, 16), (3, 16))) == [1, 3]
    assert staged(rows.place((2, 16), (3, 16))) == [2]


def test_a_step_without_places_says_nothing_of_one_that_failed() -> None:
    """Most steps have none: what decodes after a large step has failed, and before the next, must not vouch for it."""
    rows = Rows()
    failed = rows.place((1, 16), launched=False)
    rows.slots.launched(None)
    again = rows.place((1, 16), launched=False)
    assert staged(failed) == staged(again) == [1]
    rows.slots.launched(failed)
    assert staged(rows.place((1, 16))) == [1]
    assert staged(rows.place((1, 16))) == []


def test_a_graph_for_one_slot_moves_the_adapter_there() -> None:
    rows = Rows()
    assert staged(rows.place((1, 16), (2, 16))) == [1, 2]
    assert staged(rows.place((2, 16), slots=1)) == [2], "it stood in the second"
    assert staged(rows.place((2, 16), slots=1)) == []
    assert staged(rows.place((1, 16), (2, 16))) == [1], "whose place was taken"
    assert rows.place((1, 16), (2, 16), slots=1) is None
    assert rows.place((1, 17), slots=1) is None


def test_mixes_have_no_place() -> None:
    plan = plan_of([(10, ((1, 0.5), (2, 0.5)))])
    assert plan is not None
    assert Slots().place(plan, np.array([8, 8], np.int32), np.zeros(9, np.int64)) is None


def test_any_order_of_requests_leaves_wanted_adapters_apart() -> None:
    random = np.random.default_rng(3)
    rows = Rows()
    known: dict[int, tuple[int, int]] = {}
    for _ in range(3000):
        names = sorted({int(row) for row in random.integers(0, 9, random.integers(1, 5))})
        wanted = [(row, 16 * (row % 4 + 1) - int(random.integers(0, 3))) for row in names]
        if random.random() < 0.05:
            row = int(random.integers(0, 9))
            rows.generation[row] += 1
            known.pop(row, None)
        slots = int(random.integers(1, SLOTS + 1))
        placed = rows.place(*wanted, slots=slots)
        if placed is None:
            assert sum(-(-rank // GRANULE) for _, rank in wanted) > slots
            continue
        for row, first, count in placed.staged:
            assert count == next(-(-rank // GRANULE) for name, rank in wanted if name == row)
            known = {name: (b, e) for name, (b, e) in known.items() if e <= first or first + count <= b}
            known[row] = (first, first + count)
        for (row, _), (begin, end) in zip(sorted(wanted), placed.slots.tolist(), strict=True):
            assert known[row] == (begin, end), "the device has it elsewhere, or another one there"
            assert end <= slots
