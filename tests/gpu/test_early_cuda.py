"""Kernels that start before those before them have ended give what they give one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

from adapters.kernels import early, ops, triton_lora
from adapters.kernels.device_plan import DevicePlan
from tests.kernels.lora_cases import make_site, make_table, plan_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not early.can_start_early(torch.device("cuda")), reason="needs a Hopper GPU or a later one"),
]

DEVICE = torch.device("cuda")
HIDDEN, INNER, LAYERS = 1024, 4096, 6


@pytest.fixture
def layers() -> Iterator[Callable[[Tensor], Tensor]]:
    """Of a decoder, without attention: norm, gate and up with adapters, activation, down, and the sum with what came
    in, whose kernel reads what four kernels before wrote."""
    site = make_site(HIDDEN, (INNER, INNER))
    table = make_table([[16, 16], [40, 3]], [(HIDDEN, INNER)] * 2, torch.bfloat16, DEVICE)
    plan = plan_of([(1, ((0, 1.0), (1, 0.5)))])
    assert plan is not None
    ops.STEP.tables, ops.STEP.plan = table, DevicePlan.from_plan(plan, table.max_rank, DEVICE)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def weight(d: int, k: int) -> Tensor:
        return torch.randn(d, k, device=DEVICE, generator=generator, dtype=torch.bfloat16) * k**-0.5

    weights = [(weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)) for _ in range(LAYERS)]

    def run(x: Tensor) -> Tensor:
        for into, back in weights:
            y = functional.rms_norm(x, (HIDDEN,))
            gate, up = ops.one_row_linear(y, into, None, targets, site.offsets, site.widths).chunk(2, -1)
            x = x + ops.one_row_product(functional.silu(gate) * up, back, None)
        return x

    yield run
    ops.STEP.plan = ops.STEP.tables = None


def compiled(layers: Callable[[Tensor], Tensor], *, starts_early: bool) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(layers, options={"triton.enable_pdl": starts_early})


def captured(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    return graph, y


def test_the_same_bits_in_a_graph(layers: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
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


def test_every_kernel_of_the_compiler_waits(layers: Callable[[Tensor], Tensor]) -> None:
    """One that did not could end before the one before it, and what comes next would count on both."""
    x = torch.randn(1, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode(), torch._inductor.utils.fresh_cache():
        _, codes = run_and_get_code(compiled(layers, starts_early=True), x)
    kernels = [part for code in codes for part in re.split(r"async_compile\.triton\(", code)[1:]]
    assert len(kernels) >= 3
    for kernel in kernels:
        assert "'launch_pdl': True" in kernel
        assert "gdc_wait()" in kernel
