"""Kernels that start before those before them have ended give what they give one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.nn import functional

from adapters.kernels import early, ops, triton_lora
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.side import Side
from service.engine.attention_triton import NewEntries, decode
from service.engine.graphs import StepGraphs
from tests.engine.oracle import ARCHITECTURES, recipes
from tests.engine.test_parity import World
from tests.kernels.lora_cases import make_site, make_table, plan_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not early.can_start_early(torch.device("cuda")), reason="needs a Hopper GPU or a later one"),
]

DEVICE = torch.device("cuda")
HIDDEN, INNER, LAYERS = 1024, 4096, 6


@pytest.fixture(params=[1, 16], ids=["one-token", "16-tokens"])
def tokens(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def layers(tokens: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Of a decoder, without attention: norm, gate and up with adapters, activation, down, and the sum with what came
    in, whose kernel reads what four kernels before wrote. Of one token, or several whose LoRA runs beside."""
    site = make_site(HIDDEN, (INNER, INNER))
    table = make_table([[16, 16], [40, 3]], [(HIDDEN, INNER)] * 2, torch.bfloat16, DEVICE)
    plan = plan_of([(1, ((0, 1.0), (1, 0.5)))] if tokens == 1 else [(5, ((0, 1.0),)), (tokens - 5, ((1, 0.5),))])
    assert plan is not None
    ops.STEP.tables, ops.STEP.plan = table, DevicePlan.from_plan(plan, table.max_rank, DEVICE, covers=tokens > 1)
    ops.STEP.side = None if tokens == 1 else Side(DEVICE)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def weight(d: int, k: int) -> Tensor:
        return torch.randn(d, k, device=DEVICE, generator=generator, dtype=torch.bfloat16) * k**-0.5

    weights = [(weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)) for _ in range(LAYERS)]

    def run(x: Tensor) -> Tensor:
        for into, back in weights:
            y = functional.rms_norm(x, (HIDDEN,))
            if tokens == 1:
                gate, up = ops.one_row_linear(y, into, None, targets, site.offsets, site.widths).chunk(2, -1)
                x = x + ops.one_row_product(functional.silu(gate) * up, back, None)
            else:
                y, delta = ops.lora_linear(y, into, None, targets, site.offsets, site.widths)
                gate, up = (y + delta).chunk(2, -1)
                x = x + functional.linear(functional.silu(gate) * up, back)
        return x

    yield run
    ops.STEP.plan = ops.STEP.tables = ops.STEP.side = None


def compiled(layers: Callable[[Tensor], Tensor], *, starts_early: bool) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(layers, options={"triton.enable_pdl": starts_early})


def captured(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    return graph, y


def test_the_same_bits_in_a_graph(
    layers: Callable[[Tensor], Tensor], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        graph, y = captured(compiled(layers, starts_early=True), x)
        monkeypatch.setattr(early, "can_start_early", lambda device: False)
        later, wanted = captured(compiled(layers, starts_early=False), x)
        for _ in range(300):
            x.normal_()
            later.replay()
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, wanted)
        assert torch.isfinite(y).all()


@triton.jit
def slow_kernel(x, y, size, LOOPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.zeros([BLOCK], x.dtype.element_ty)
    for _ in range(LOOPS):
        last = tl.load(x + at, mask=at < size, other=0.0, volatile=True)
    tl.store(y + at, last, mask=at < size)


def slowly(x: Tensor) -> Tensor:
    """A copy of x by a kernel that lets the next one start at once, and writes late: who does not wait for it reads
    what was there before."""
    y = torch.empty_like(x)
    slow_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), LOOPS=2000, BLOCK=1024)
    return y


def same_in_turns(run: Callable[[], Tensor], inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph and started early as one after the other, for other inputs each time."""
    with torch.inference_mode():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for _ in range(30):
            for tensor in inputs:
                tensor.normal_()
            graph.replay()
            torch.cuda.synchronize()
            with monkeypatch.context() as patch:
                patch.setattr(early, "can_start_early", lambda device: False)
                assert torch.equal(y, run())


@pytest.mark.parametrize("sequences", [1, 32])
def test_attention_waits(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.empty(sequences, heads, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (32, 8, 8))
    k_cache, v_cache = torch.randn(2, 8 * sequences, 16, 8, 128, device=DEVICE).to(torch.bfloat16)
    table = torch.arange(8 * sequences, device=DEVICE, dtype=torch.int32).view(sequences, 8)
    context = torch.full((sequences,), 100, device=DEVICE, dtype=torch.int32)
    slot = table[:, 0] * 16 + 99
    # Else a kernel that zeroes them would stand between.
    counters = torch.zeros(8 * sequences, device=DEVICE, dtype=torch.int32)

    def run() -> Tensor:
        out = torch.empty_like(q)
        given = slowly(torch.cat([q, k, v], 1))
        mine, new_k, new_v = given.split([32, 8, 8], 1)
        new = NewEntries(new_k, new_v, slot)
        options = {"new": new, "scale": 0.1, "max_context": 128, "counters": counters, "starts_early": True}
        decode(mine, k_cache, v_cache, table, context, out, **options)  # type: ignore[arg-type]
        return out

    same_in_turns(run, [q, k, v], monkeypatch)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_kernel_that_the_compiler_starts_early_waits_before_it_writes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts on who comes next, and who comes next on it. The compiler leaves the wait out of a kernel that reads
    nothing."""
    codes: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", codes.append)
    monkeypatch.setattr(StepGraphs, "capture", lambda self: None)
    world = World(architecture, tmp_path, {"rank4": recipes(architecture)["rank4"]}, [])
    torch._dynamo.reset()  # it would keep what an earlier test of this process has had compiled
    with torch._inductor.utils.fresh_cache():
        world.engine(tmp_path, device="cuda", dtype="bfloat16", max_sequences=4).close()
    kernels = [part for code in codes for part in re.split(r"async_compile\.triton\(", code)[1:]]
    kernels = [kernel for kernel in kernels if "'launch_pdl': True" in kernel]
    assert len(kernels) >= 5
    for kernel in kernels:
        assert 0 < kernel.find("gdc_wait()") < kernel.find("tl.store("), kernel
