"""Memsets of captured steps, made kernels.

Some products of cuBLASLt give out their tiles by a counter, which is set to zero before each of them: in a CUDA graph
that is a memset between two kernels. The device then drains, and fills again, for 11 us a layer, where a kernel in its
place takes 2. Six of seven steps with prompts of an 8B model took 0.1 to 0.5 ms less (H100, benchmarks/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from typing import Any

import torch

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 16
"""Of a memset that one block of threads is to do. What is larger stays as it is."""
_THREADS = 256
_PTX = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry zero(.param .u64 begin, .param .u32 words)
{
    .reg .pred %p<2>;
    .reg .b32 %r<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [begin];
    ld.param.u32 %r1, [words];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, 0;
next:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra done;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r4;
    add.u32 %r2, %r2, %r3;
    bra next;
done:
    ret;
}
"""


class GraphDamagedError(Exception):
    """A graph that could be neither changed nor left as it was: it must not run."""


def instantiate(graph: torch.cuda.CUDAGraph) -> int:
    """Makes a graph that was captured with keep_graph=True executable, with kernels instead of its small memsets to
    zero; their number. Where the driver's interface does not allow that, they stay: the graph does the same. Raises
    GraphDamagedError."""
    replaced = 0
    try:
        replaced = _replace(graph.raw_cuda_graph())
    except GraphDamagedError:
        raise
    except Exception:  # whatever another version of the driver's bindings may raise
        _complain()
    graph.instantiate()
    return replaced


def _replace(address: int) -> int:
    from cuda.bindings import driver  # comes with torch for CUDA

    graph, replaced = driver.CUgraph(address), 0
    for node in _all(driver.cuGraphGetNodes, graph):
        if _checked(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
            continue
        memset = _checked(driver.cuGraphMemsetNodeGetParams(node))
        begin, size = int(memset.dst), memset.width * memset.elementSize
        if memset.value or memset.height > 1 or size > MOST_BYTES or size % 4 or begin % 4:
            continue
        before = _all(driver.cuGraphNodeGetDependencies, node)
        after = _all(driver.cuGraphNodeGetDependentNodes, node)
        kernel = driver.CUDA_KERNEL_NODE_PARAMS()
        kernel.func = _function(torch.cuda.current_device())
        kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = 1
        kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = _THREADS, 1, 1
        kernel.kernelParams = ((begin, size // 4), (ctypes.c_void_p, ctypes.c_uint))
        new = _checked(driver.cuGraphAddKernelNode(graph, before, len(before), kernel))
        try:
            _link(driver, graph, new, after)
        except Exception as error:
            # Nothing waits for it yet: it might zero the counter of a product that runs.
            _destroy(driver, new, error)
            raise
        _checked(driver.cuGraphDestroyNode(node))  # if it stays, both zero the same before the same product
        replaced += 1
    return replaced


def _link(driver: Any, graph: Any, node: Any, after: list[Any]) -> None:
    """Lets the nodes `after` wait for `node`."""
    if after:
        from cuda.bindings import __version__ as version

        edges = () if int(version.partition(".")[0]) < 13 else (None,)  # bindings of CUDA 12 have no edge data there
        _checked(driver.cuGraphAddDependencies(graph, [node] * len(after), after, *edges, len(after)))


def _destroy(driver: Any, node: Any, cause: Exception) -> None:
    try:
        _checked(driver.cuGraphDestroyNode(node))
    except Exception as error:
        raise GraphDamagedError(f"a node could be neither linked ({cause}) nor taken away ({error})") from cause


def _all(query: Any, of: Any) -> list[Any]:
    """What a query gives that is asked twice: how many there are, and for them."""
    count = _checked(query(of))[-1]
    return list(_checked(query(of, count))[0]) if count else []


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *found = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver: {error}")
    return found[0] if len(found) == 1 else found


@lru_cache(maxsize=16)
def _function(device: int) -> Any:
    from cuda.bindings import driver

    module = _checked(driver.cuModuleLoadData(_PTX + b"\0"))
    return _checked(driver.cuModuleGetFunction(module, b"zero"))


@lru_cache(maxsize=1)
def _complain() -> None:
    log.warning("memsets in CUDA graphs stay as they are: steps with prompts take longer", exc_info=True)
