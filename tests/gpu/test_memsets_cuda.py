"""Memsets in CUDA graphs become kernels, and the graphs do what they did."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from cuda.bindings import driver

from service.engine import memsets
from service.engine.build import prefer_cublaslt

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


def memset(tensor: torch.Tensor, value: int) -> None:
    stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    (error,) = driver.cuMemsetD8Async(tensor.data_ptr(), value, tensor.nbytes, stream)
    assert int(error) == 0


def test_small_memsets_become_kernels_in_their_place() -> None:
    sums = torch.zeros(1000, device="cuda")
    seen = torch.zeros(3, 1000, device="cuda")

    def step() -> None:
        for i in range(3):
            memset(sums, 0)
            sums.add_(i + 1)
            seen[i].copy_(sums)

    graph = captured(step)
    assert number_of_memsets(graph) == 3
    assert memsets.instantiate(graph) == 3
    assert number_of_memsets(graph) == 0
    for _ in range(20):
        sums.fill_(7.0)
        seen.fill_(7.0)
        graph.replay()
        assert (seen == torch.tensor([1.0, 2.0, 3.0], device="cuda")[:, None]).all()


def test_others_stay() -> None:
    """One larger than a block of threads should do, and one of another value."""
    large = torch.ones(memsets.MOST_BYTES + 4, dtype=torch.uint8, device="cuda")
    fives = torch.ones(4096, dtype=torch.uint8, device="cuda")

    def step() -> None:
        memset(large, 0)
        memset(fives, 5)

    graph = captured(step)
    assert number_of_memsets(graph) == 2
    assert memsets.instantiate(graph) == 0
    assert number_of_memsets(graph) == 2
    graph.replay()
    assert not large.any()
    assert (fives == 5).all()


def test_a_product_of_the_sizes_that_have_them_gives_the_same() -> None:
    """As in a step with a prompt of an 8B model."""
    prefer_cublaslt()
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
