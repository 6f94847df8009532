"""Memsets in CUDA graphs become kernels, and the graphs do what they did."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from cuda.bindings import driver

from service.engine import memsets

pytestmark = pytest.mark.gpu


def captured(step) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        step()
        graph.capture_end()
    return graph


def number_of_memsets(graph: torch.cuda.CUDAGraph) -> int:
    kind = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET
    nodes = memsets._all(driver.cuGraphGetNodes, driver.CUgraph(graph.raw_cuda_graph()))
    return sum(memsets._checked(driver.cuGraphNodeGetType(node)) == kind for node in nodes)


def test_small_memsets_become_kernels_in_their_place() -> None:
    sums = torch.zeros(1000, device="cuda")
    seen = torch.zeros(3, 1000, device="cuda")

    def step() -> None:
        for i in range(3):
            sums.zero_()
            sums.add_(i + 1)
            seen[i].copy_(sums)

    step()
    graph = captured(step)
    if not (found := number_of_memsets(graph)):
        pytest.skip("zero_ is a kernel in this torch")
    assert memsets.instantiate(graph) == found
    assert number_of_memsets(graph) == 0
    for _ in range(20):
        sums.fill_(7.0)
        seen.fill_(7.0)
        graph.replay()
        assert (seen == torch.tensor([1.0, 2.0, 3.0], device="cuda")[:, None]).all()


def test_others_stay() -> None:
    """One larger than a block of threads should do, and one of another value."""
    large = torch.ones(memsets.MOST_BYTES + 4, dtype=torch.uint8, device="cuda")
    first = torch.ones(4096, dtype=torch.uint8, device="cuda")
    large.zero_()

    def step() -> None:
        large.zero_()
        first.copy_(large[:4096])

    graph = captured(step)
    found = number_of_memsets(graph)
    assert memsets.instantiate(graph) == 0
    assert number_of_memsets(graph) == found
    graph.replay()
    assert not large.any()
    assert not first.any()


def test_a_product_of_the_sizes_that_have_them_gives_the_same() -> None:
    """As in a step with a prompt of an 8B model."""
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(x, weight)
    y = torch.empty_like(wanted)

    def step() -> None:
        for _ in range(3):
            y.copy_(torch.nn.functional.linear(x, weight))

    step()
    graph = captured(step)
    memsets.instantiate(graph)
    assert number_of_memsets(graph) == 0
    for _ in range(5):
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
