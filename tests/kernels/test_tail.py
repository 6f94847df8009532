"""Adapters in the tails of base weights: which stand where, and the product against the mathematics in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from adapters.arena import Arena
from adapters.kernels import backend, one_row, ops, tail, triton_lora, triton_tail
from adapters.kernels.backend import TritonKernels
from adapters.kernels.device_plan import RANK_BUCKETS, DevicePlan, PlanShape, pack
from adapters.kernels.tail import GRANULE, RANKS, SLOTS, Slots
from adapters.layers import OutputProduct, install
from adapters.manifest import Manifest, Module
from adapters.plan import LoraPlan, covering
from adapters.site import Site
from adapters.tiers import RowEntries
from service.engine.runner import _Hook
from service.engine.warmup import dummy_adapter
from tests.kernels.lora_cases import Table, error, expected, make_site, make_table, plan_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = list(LIMIT) if DEVICE.type == "cuda" else [torch.float32]  # numpy, of the interpreter, has no bfloat16


class World:
    """One site of random weights, its tail, and a table of adapters."""

    def __init__(self, ranks: list[list[int]], k: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        # Target 0 is another site's.
        self.site: Site = make_site(k, widths, first_target=1)
        self.table: Table = make_table([[2, *r] for r in ranks], [(8, 8), *((k, d) for d in widths)], dtype, DEVICE)
        generator = torch.Generator().manual_seed(7)
        self.parts = [torch.randn(d, k, generator=generator).mul(k**-0.5).to(DEVICE, dtype) for d in widths]
        self.weight = tail.with_tail(self.parts)
        self.tails = triton_tail.Tails([(self.site, tail.whole(self.weight, len(widths)))], 1 + len(widths), DEVICE)
        self.targets = triton_lora.target_tensor(self.site.targets, DEVICE)
        self.generation = np.zeros(len(ranks), np.int64)

    def plan(self, sequences: list[tuple[int, tuple[tuple[int, float], ...]]]) -> LoraPlan:
        plan = plan_of(sequences)
        assert plan is not None
        return covering(plan, sum(n for n, _ in sequences))

    def product(self, plan: LoraPlan, device_plan: DevicePlan, x: Tensor) -> Tensor:
        self.tails.stage(device_plan, self.table)
        rows = triton_tail.shrink(x, self.targets, device_plan, self.table, self.tails.counters)
        named = torch.from_numpy(plan.tokens).long()
        assert torch.equal(rows[named, : x.shape[1]], x[named])
        wide = torch.full_like(rows, torch.nan)
        wide[:, : x.shape[1]] = x
        triton_tail.shrink_behind(wide, self.targets, device_plan, self.table, self.tails.counters)
        assert torch.equal(wide[named], rows[named]), "x lies there already: the same, but for the copy"
        assert (self.tails.counters == 0).all()
        return functional.linear(rows, tail.whole(self.weight, len(self.parts)))

    def wanted(self, plan: LoraPlan, x: Tensor) -> Tensor:
        base = torch.cat([x.cpu().double() @ part.cpu().double().T for part in self.parts], dim=1)
        return expected(base, x, self.site, plan, self.table)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "k", "widths", "sequences"),
    [
        ([[16, 16, 16]], 128, (64, 32, 32), [(70, ((0, 1.0),))]),
        ([[16], [8], [3], [12]], 64, (80,), [(5, ((2, 0.5),)), (66, ((0, 1.0),)), (9, ((1, -2.0),)), (1, ((3, 1.0),))]),
        ([[64, 64], [16, 16]], 200, (48, 40), [(100, ((0, 1.0),)), (4, ())]),
        ([[20, 32], [30, 0]], 2104, (24, 40), [(3, ()), (33, ((1, 1.0),)), (65, ((0, 1.5),)), (2, ())]),
        ([[0, 7]], 64, (32, 32), [(18, ((0, 1.0),))]),
        ([[1]], 14336, (16,), [(17, ((0, 1.0),))]),
    ],
    ids=["one", "four", "the-largest-rank", "ranks-that-differ-by-target", "a-target-without", "long-rows"],
)
def test_one_product_is_base_and_deltas(
    ranks: list[list[int]],
    k: int,
    widths: tuple[int, ...],
    sequences: list[tuple[int, tuple[tuple[int, float], ...]]],
    dtype: torch.dtype,
) -> None:
    world = World(ranks, k, widths, dtype)
    plan = world.plan(sequences)
    of = world.table.ranks_of(plan)
    placed = world.tails.slots.place(plan, of, world.generation)
    assert placed is not None
    device_plan = DevicePlan.from_plan(plan, world.table.max_rank, DEVICE, 64, covers=True, ranks=of, placed=placed)
    x = torch.randn(sum(n for n, _ in sequences), k, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    before = [part.clone() for part in world.parts]
    y = world.product(plan, device_plan, x)
    assert error(y, world.wanted(plan, x)) < LIMIT[dtype]
    assert torch.equal(world.weight, torch.cat(before)), "the base weight was written"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize(("k", "splits"), [(64, 1), (520, 2), (2104, 7)])
def test_however_shrink_is_launched(rows: int, k: int, splits: int) -> None:
    """Parts of tiles without rows, shares of k of different lengths, and counters that are zero again."""
    world = World([[16, 5], [7, 16]], k, (24, 40), DTYPES[-1])
    plan = world.plan([(70, ((1, 1.5),)), (3, ()), (17, ((0, 1.0),))])
    of = world.table.ranks_of(plan)
    placed = world.tails.slots.place(plan, of, world.generation)
    device_plan = DevicePlan.from_plan(plan, 16, DEVICE, 64, covers=True, ranks=of, placed=placed)
    x = torch.randn(90, k, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPES[-1])
    wanted = triton_tail.shrink(x, world.targets, device_plan, world.table, world.tails.counters)
    out = torch.empty_like(wanted)
    config = triton_tail.ShrinkConfig(rows, splits, block_k=64)
    for _ in range(2):
        triton_tail._shrink(x, out, world.targets, device_plan, world.table, world.tails.counters, config)
        assert error(out, wanted.cpu().double()) < LIMIT[DTYPES[-1]]
        assert (world.tails.counters == 0).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there programs run in what order they please")
def test_whichever_split_is_last_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    world = World([[16, 5], [7, 16]], 520, (24, 40), torch.float32)
    plan = world.plan([(70, ((1, 1.5),)), (3, ()), (17, ((0, 1.0),))])
    of = world.table.ranks_of(plan)
    placed = world.tails.slots.place(plan, of, world.generation)
    device_plan = DevicePlan.from_plan(plan, 16, DEVICE, 64, covers=True, ranks=of, placed=placed)
    x = torch.randn(90, 520, generator=torch.Generator().manual_seed(1))
    place = interpreter_builder.set_grid_idx
    config = triton_tail.ShrinkConfig(32, 3, block_k=64)
    programs = device_plan.shape.tiles * 2 * 2 * 3
    outs = []
    for order in (range(programs), range(programs)[::-1], sorted(range(programs), key=lambda at: (at % 3) ^ 1)):
        turn = list(order)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, turn=turn: place(turn[x], y, z))
        outs.append(torch.zeros(90, 520 + tail.spare(2)))
        triton_tail._shrink(x, outs[-1], world.targets, device_plan, world.table, world.tails.counters, config)
        assert (world.tails.counters == 0).all()
    assert outs[0][:, 520:].any()
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])


def test_the_rule_for_launches_of_shrink() -> None:
    """One program a multiprocessor, as long as shares of k are neither short nor long."""
    one, few = triton_tail.config_of(4096, 32, 1, DEVICE), triton_tail.config_of(512, 32, 1, DEVICE)
    assert few.splits == 1
    assert 4096 // 2048 <= one.splits <= 4096 // 512
    assert triton_tail.config_of(14336, 2048, 1, DEVICE).splits == 7


def test_one_buffer_serves_plan_after_plan() -> None:
    """What a CUDA graph does: adapters come and go in the tail, some stay, and one row's block is replaced."""
    world = World([[16, 16], [16, 8], [40, 33], [5, 16], [16, 0], [64, 64]], 96, (64, 32), DTYPES[-1])
    shape = PlanShape.bounded(300, 200, 1, 64, RANKS, tail=True)
    host = np.full(shape.size, -(2**31), dtype=np.int32)
    buffer = torch.empty(shape.size, dtype=torch.int32, device=DEVICE)
    device_plan = DevicePlan(shape, buffer, RANKS, covers=True)
    steps: list[tuple[list[tuple[int, tuple[tuple[int, float], ...]]], int]] = [
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
        of = world.table.ranks_of(plan)
        placed = world.tails.slots.place(plan, of, world.generation)
        assert placed is not None
        assert len(placed.staged) == staged, number
        pack(plan, shape, host, of, placed)
        buffer.copy_(torch.from_numpy(host))
        x = torch.randn(300, 96, generator=torch.Generator().manual_seed(number)).to(DEVICE, DTYPES[-1])
        tokens = sum(n for n, _ in sequences)
        y = world.product(plan, device_plan, x)[:tokens]
        world.tails.slots.launched(placed)
        assert error(y, world.wanted(plan, x[:tokens])) < LIMIT[DTYPES[-1]], number


def test_an_empty_plan_stages_and_computes_nothing() -> None:
    world = World([[16]], 64, (32,), DTYPES[-1])
    shape = PlanShape.bounded(32, 8, 1, 64, 16, tail=True)
    host = np.full(shape.size, -(2**31), dtype=np.int32)
    pack(None, shape, host)
    device_plan = DevicePlan(shape, torch.from_numpy(host).to(DEVICE), 16, covers=True)
    world.tails.stage(device_plan, world.table)
    x = torch.ones(32, 64, dtype=DTYPES[-1], device=DEVICE)
    triton_tail.shrink(x, world.targets, device_plan, world.table, world.tails.counters)
    assert (tail.whole(world.weight, 1)[:, 64:] == 0).all()


def test_what_has_no_place_is_refused() -> None:
    world = World([[16]], 64, (32,), torch.float32)
    plan = world.plan([(8, ((0, 1.0),))])
    with pytest.raises(ValueError, match="placed: None"):
        pack(plan, PlanShape.of(plan, 64, 16, tail=True), np.zeros(1024, np.int32))
    with pytest.raises(ValueError, match="no places in the tail"):
        triton_tail.shrink(
            torch.ones(8, 64, device=DEVICE),
            world.targets,
            DevicePlan.from_plan(plan, 16, DEVICE, 64, covers=True),
            world.table,
            world.tails.counters,
        )
    with pytest.raises(ValueError, match="not those of one with a tail"):
        tail.whole(torch.ones(32, 64), 1)


class Rows:
    """Slots asked by (row, rank) of one segment each."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.generation = np.zeros(100, np.int64)

    def place(self, *rows: tuple[int, int], launched: bool = True) -> tail.Placed | None:
        plan = plan_of([(50, ((row, 1.0),)) for row, _ in sorted(rows)])
        assert plan is not None
        ranks = np.array([rank for _, rank in sorted(rows)], np.int32)
        placed = self.slots.place(plan, ranks, self.generation)
        if launched:
            self.slots.launched(placed)
        return placed


def staged(placed: tail.Placed | None) -> list[int]:
    assert placed is not None
    return sorted(row for row, _ in placed.staged)


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
    taken = [
        c
        for (row, column), rank in zip(sorted(placed.staged), (16, 16, 32), strict=True)
        for c in range(column, column + rank)
    ]
    assert sorted(taken) == list(range(RANKS))


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


def test_warming_up_over_a_fresh_arena_leaves_numbers_in_the_tails(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is staged stays behind the weights: no numbers there would be none for every token of every later step."""
    monkeypatch.setattr(backend, "TAIL_TOKENS", 100)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    arena.data.fill_(torch.nan)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    with torch.inference_mode():
        installed = install(model, manifest, _Hook(kernels), tails=True)
        kernels.bind(installed, len(manifest.linears))
        with dummy_adapter(arena, manifest, RANK_BUCKETS[0]) as row:
            assert row is not None
            kernels.begin_step(plan_of([(100, ((row, 1.0),))]), 100)
            assert kernels.tailed
    assert all(bool(layer.whole.isfinite().all()) for layer in installed if layer.whole is not None)


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
        placed = rows.place(*wanted)
        if placed is None:
            assert sum(-(-rank // GRANULE) for _, rank in wanted) > SLOTS
            continue
        for row, column in placed.staged:
            count = next(-(-rank // GRANULE) * GRANULE for name, rank in wanted if name == row)
            known = {name: (c, n) for name, (c, n) in known.items() if c + n <= column or column + count <= c}
            known[row] = (column, count)
        for (row, _), column in zip(sorted(wanted), placed.columns.tolist(), strict=True):
            assert known[row][0] == column, "the device has it elsewhere, or another one there"


@pytest.fixture
def step() -> Iterator[ops.Step]:
    yield ops.STEP
    ops.STEP.plan = ops.STEP.tables = ops.STEP.side = ops.STEP.tails = None


class Block(nn.Module):
    """A gated MLP: two projections that share their input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
        self.down_proj = nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def manifest_of(model: nn.Module) -> Manifest:
    modules = tuple(
        Module(name, "linear", module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return Manifest("0" * 64, "Block", "block", "float32", 10, 10, modules)


def bind_adapter(arena: Arena, row: int, rank: int, manifest: Manifest) -> None:
    ends = np.cumsum([rank * (m.in_features + m.out_features) for m in manifest.linears])
    region = arena.allocate(int(ends[-1]) * 4)
    assert region is not None
    values = torch.randn(int(ends[-1]), generator=torch.Generator().manual_seed(row)) / 8
    arena.data[region.offset // 4 : region.offset // 4 + len(values)] = values.to(DEVICE)
    starts = np.concatenate(([0], ends[:-1]))
    offsets = np.array([(s, s + rank * m.in_features) for s, m in zip(starts, manifest.linears, strict=True)], np.int64)
    count = len(manifest.linears)
    arena.bind(row, region, RowEntries(np.full(count, rank, np.int32), offsets, np.full(count, 2.0, np.float32)))


def test_a_step_takes_the_tails_or_not_and_a_layer_is_compiled_once_for_each(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TAIL_TOKENS", 240)
    torch.manual_seed(0)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    for row in range(6):
        bind_adapter(arena, row, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
    traces = CompileCounter()
    forward = torch.compile(model, backend=traces, fullgraph=True)
    x = torch.randn(240, 64, device=DEVICE)

    def ask(sequences: list[tuple[int, tuple[tuple[int, float], ...]]], *, tails: bool) -> Tensor:
        kernels.tails = tails
        kernels.begin_step(plan_of(sequences), len(x))
        hook.active = True
        with torch.inference_mode():
            return forward(x)

    cases = [
        ([(140, ((1, 1.0),)), (100, ((2, 0.5),))], True),
        ([(48, ((row, 1.0),)) for row in range(5)], False),  # more adapters than there are places
        ([(1, ((0, 1.0),)), (99, ((1, 1.0),)), (140, ())], True),
        ([(240, ((0, 0.5), (1, 0.5)))], False),
        ([(10, ((0, 1.0),))], False),  # tokens of the base model, nearly all
    ]
    for sequences, tailed in cases:
        y = ask(sequences, tails=True)
        assert kernels.tailed == tailed, sequences
        assert error(y, ask(sequences, tails=False).cpu().double()) < 1e-6
        assert not kernels.tailed
    assert traces.frame_count <= 2
    assert arena.generation.sum() == 0


@pytest.mark.parametrize("active", [True, False])
def test_a_step_of_one_token_has_kernels_of_its_own_and_they_are_warmed_up(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch, active: bool
) -> None:
    torch.manual_seed(0)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    met: set[tuple[int, int, bool, bool]] = set()
    product = one_row.product

    def noting(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: one_row.Deltas | None = None) -> Tensor:
        met.add((*weight.shape, bias is not None, deltas is not None))
        return product(x, weight, bias, deltas)

    monkeypatch.setattr(one_row, "product", noting)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
        shape = PlanShape.bounded(1, 2, 1, 16, 16)
        host = np.zeros(shape.size, dtype=np.int32)
        pack(None, shape, host)
        empty = DevicePlan(shape, torch.from_numpy(host).to(DEVICE), 16, covers=True)
        kernels.use(empty, 1)
        kernels.warm_up(empty, 1)
        warm = set(met)
        met.clear()
        x = torch.randn(2, 64, device=DEVICE)
        plan = plan_of([(1, ((0, 1.0),)), (1, ((0, 1.0),))]) if active else None
        hook.active = active
        kernels.begin_step(plan, 2)
        assert not kernels.one_row
        wanted = model(x)
        assert not met
        kernels.begin_step(plan_of([(1, ((0, 1.0),))]) if active else None, 1)
        assert kernels.one_row
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x[:1])
        assert error(y, wanted[:1].cpu().double()) < 1e-6
        assert met == {(96, 64, False, active), (64, 48, True, active)}
        assert not active or met == warm
        kernels.begin_step(None, 1)
        assert kernels.product(x[:0], x, None).shape == (0, 2), "no logits are wanted of the step's token"
        others = TritonKernels(arena, overlap=False, own_one_row=False)
        others.begin_step(None, 1)
        assert not others.one_row


def test_the_output_layer_on_a_gpu_is_the_hook_s_product(step: ops.Step) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 40).to(DEVICE).requires_grad_(False)
    manifest = manifest_of(Block())
    kernels = TritonKernels(Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8), overlap=False)
    layer = OutputProduct(linear, _Hook(kernels))
    assert layer.weight is linear.weight
    for rows in (0, 1, 3):
        x = torch.randn(1, rows, 64, device=DEVICE)
        for tokens in (1, 8):
            kernels.begin_step(None, tokens)
            with torch.inference_mode():
                torch.testing.assert_close(layer(x), linear(x))


def test_what_is_warmed_up_is_what_compiled_layers_launch(step: ops.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    met: set[tuple[int, int, bool]] = set()
    shrink = triton_tail._shrink

    def noting(x: Tensor, out: Tensor, targets: Tensor, *rest: object) -> None:
        met.add((x.shape[1], targets.numel(), x.data_ptr() != out.data_ptr()))
        shrink(x, out, targets, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_tail, "_shrink", noting)
    monkeypatch.setattr(backend, "TAIL_TOKENS", 64)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True, after_attention={"down_proj"}), len(manifest.linears))
        shape = PlanShape.bounded(64, 8, 1, 64, 16, tail=True)
        host = np.zeros(shape.size, dtype=np.int32)
        pack(None, shape, host)
        empty = DevicePlan(shape, torch.from_numpy(host).to(DEVICE), 16, covers=True)
        kernels.use(empty, 64)
        kernels.warm_up(empty, 64)
        warm = set(met)
        met.clear()
        kernels.begin_step(plan_of([(64, ((0, 1.0),))]), 64)
        assert kernels.tailed
        hook.active = True
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(64, 64, device=DEVICE))
    assert met == warm == {(64, 2, False), (48, 1, True)}
    kernels.compiled = False
    met.clear()
    with torch.inference_mode():
        kernels.warm_up(empty, 64)
    assert met == {(64, 2, True), (48, 1, True)}


def test_the_operator_is_registered_truthfully(step: ops.Step) -> None:
    """torch's own check: schema, mutation and fake results agree with what the operator does."""
    world = World([[8, 4]], 64, (32, 48), torch.float32)
    plan = world.plan([(5, ((0, 1.0),))])
    of = world.table.ranks_of(plan)
    placed = world.tails.slots.place(plan, of, world.generation)
    step.tables, step.tails = world.table, world.tails
    step.plan = DevicePlan.from_plan(plan, 8, DEVICE, 64, covers=True, ranks=of, placed=placed)
    x = torch.randn(5, 64, device=DEVICE)
    for bias in (None, torch.randn(80, device=DEVICE)):
        arguments = (x, tail.whole(world.weight, 2), bias, world.targets)
        torch.library.opcheck(ops.tail_linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
        wide = torch.cat([x, torch.zeros(5, tail.spare(2), device=DEVICE)], 1)
        rest = arguments[1:]
        torch.library.opcheck(ops.wide_linear.default, (wide, *rest), test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(ops.wide_linear(wide, *rest), ops.tail_linear(*arguments))
        step.plan = None
        assert torch.equal(ops.wide_linear(wide, *rest), functional.linear(x, world.weight, bias))
        step.plan = DevicePlan.from_plan(plan, 8, DEVICE, 64, covers=True, ranks=of, placed=placed)
