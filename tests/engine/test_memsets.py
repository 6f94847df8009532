"""What becomes of a captured graph whose memsets cannot all be replaced: a driver of dictionaries fails where it is
told to. That real ones are, and that graphs then do the same, is in tests/gpu."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from service.engine import memsets


class Kind(IntEnum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMSET = 2


class Driver:
    """k0 -> m0 -> k1 -> m1 -> k2, and k0 -> k2 beside."""

    CUgraphNodeType = Kind
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, version: int, failing: str = "") -> None:
        self.version, self.failing = version, failing
        self.after = {"k0": ["m0", "k2"], "m0": ["k1"], "k1": ["m1"], "m1": ["k2"], "k2": []}
        self.sizes = {"m0": 64, "m1": 128}
        self.cleared: dict[str, tuple[int, int]] = {}

    def _answer(self, name: str, *found: Any) -> tuple[Any, ...]:
        if name in self.failing.split():
            return (999,)
        return (0, *found)

    def CUgraph(self, address: int) -> int:
        return address

    def cuGraphGetNodes(self, graph: int, count: int = 0) -> tuple[Any, ...]:
        return self._answer("nodes", list(self.after), len(self.after))

    def cuGraphNodeGetType(self, node: str) -> tuple[Any, ...]:
        return self._answer(
            "type", Kind.CU_GRAPH_NODE_TYPE_MEMSET if node[0] == "m" else Kind.CU_GRAPH_NODE_TYPE_KERNEL
        )

    def cuGraphMemsetNodeGetParams(self, node: str) -> tuple[Any, ...]:
        size = self.sizes[node]
        return self._answer("params", SimpleNamespace(dst=4096, value=0, elementSize=4, width=size // 4, height=1))

    def _neighbours(self, found: list[str]) -> tuple[Any, ...]:
        edges = [[None] * len(found)] if self.version >= 13 else []
        return self._answer("neighbours", found, *edges, len(found))

    def cuGraphNodeGetDependencies(self, node: str, count: int = 0) -> tuple[Any, ...]:
        return self._neighbours([name for name, after in self.after.items() if node in after])

    def cuGraphNodeGetDependentNodes(self, node: str, count: int = 0) -> tuple[Any, ...]:
        return self._neighbours(self.after[node])

    def cuGraphAddKernelNode(self, graph: int, before: list[str], count: int, kernel: Any) -> tuple[Any, ...]:
        if "add" in self.failing.split():
            return (999,)
        name = f"new{len(self.cleared)}"
        values, _ = kernel.kernelParams
        self.cleared[name] = values
        for node in before:
            self.after[node].append(name)
        self.after[name] = []
        return (0, name)

    def cuGraphAddDependencies(self, graph: int, before: list[str], after: list[str], *rest: Any) -> tuple[Any, ...]:
        if len(rest) != (2 if self.version >= 13 else 1):
            raise TypeError("cuGraphAddDependencies() takes another number of arguments")
        if "link" in self.failing.split():
            return (999,)
        for one, other in zip(before, after, strict=True):
            self.after[one].append(other)
        return (0,)

    def cuGraphDestroyNode(self, node: str) -> tuple[Any, ...]:
        if "destroy" in self.failing.split():
            return (999,)
        del self.after[node]
        for after in self.after.values():
            after[:] = [name for name in after if name != node]
        return (0,)


class Graph:
    def __init__(self) -> None:
        self.made = False

    def raw_cuda_graph(self) -> int:
        return 1

    def instantiate(self) -> None:
        self.made = True


@pytest.fixture
def driving(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    def start(version: int, failing: str = "") -> Driver:
        driver: Any = Driver(version, failing)
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        bindings.__version__ = f"{version}.3.1"  # type: ignore[attr-defined]
        bindings.driver = driver  # type: ignore[attr-defined]
        for name, module in {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": driver}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(memsets, "_function", lambda device: "zero")
        monkeypatch.setattr(memsets.torch.cuda, "current_device", lambda: 0)
        memsets._complain.cache_clear()
        return driver

    return start


@pytest.mark.parametrize("version", [12, 13])
def test_kernels_stand_where_memsets_stood(driving: Callable[..., Driver], version: int) -> None:
    driver, graph = driving(version), Graph()
    assert memsets.instantiate(graph) == 2  # type: ignore[arg-type]
    assert graph.made
    assert driver.after == {"k0": ["k2", "new0"], "k1": ["new1"], "k2": [], "new0": ["k1"], "new1": ["k2"]}
    assert driver.cleared == {"new0": (4096, 16), "new1": (4096, 32)}


@pytest.mark.parametrize("failing", ["nodes", "type", "params", "neighbours", "add", "link"])
def test_what_fails_leaves_the_graph_as_it_was(
    driving: Callable[..., Driver], failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Above all no kernel for which nobody waits: it would zero a counter that is in use."""
    driver, graph = driving(13, failing), Graph()
    before = Driver(13).after
    assert memsets.instantiate(graph) == 0  # type: ignore[arg-type]
    assert graph.made
    assert {name: sorted(after) for name, after in driver.after.items()} == {k: sorted(v) for k, v in before.items()}
    assert "memsets in CUDA graphs stay as they are" in caplog.text


def test_a_memset_that_stays_beside_its_kernel_does_no_harm(driving: Callable[..., Driver]) -> None:
    driver, graph = driving(13, "destroy"), Graph()
    memsets.instantiate(graph)  # type: ignore[arg-type]
    assert graph.made
    assert driver.after["new0"] == driver.after["m0"] == ["k1"]


def test_a_graph_that_can_be_neither_changed_nor_mended_does_not_run(driving: Callable[..., Driver]) -> None:
    driving(13, "link destroy")
    graph = Graph()
    with pytest.raises(memsets.GraphDamagedError, match="neither linked"):
        memsets.instantiate(graph)  # type: ignore[arg-type]
    assert not graph.made


def test_without_the_bindings_graphs_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    memsets._complain.cache_clear()
    graph = Graph()
    assert memsets.instantiate(graph) == 0  # type: ignore[arg-type]
    assert graph.made
    assert "stay as they are" in caplog.text
