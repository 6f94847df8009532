"""How many multiprocessors each product leaves to LoRA: measured when the engine starts.

Which kernel the library takes for a product changes with the multiprocessors that it may use, and what it takes then
leaps: no rule follows it (benchmarks/RESULTS.md). So products of the sizes that steps have are timed as they will run,
LoRA with ADAPTERS different adapters beside them. What was measured is kept in a file, as compiled code is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from torch.nn import functional

from adapters.kernels import triton_lora
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.side import Side
from adapters.layers import LoraLinear
from adapters.plan import LoraPlan, build_plan, covering

log = logging.getLogger(__name__)

ADAPTERS, RANK = 64, 16
"""Of the steps that are measured. With fewer adapters LoRA ends sooner; one for all tokens stands in the tails, but in
steps of a few tokens, which miss the multiprocessors least."""
LAYERS = 3
"""Of one kind that a measurement goes through at most: weights and factors should not be found in the cache."""
REPLAYS = 3
MOST_S = 15.0
"""Seconds after which what is left keeps the rule. An 8B model has 80 products to measure."""
GAIN = 0.985
"""What was chosen by rule stays, unless another choice takes at most so much of its time."""


class Size(NamedTuple):
    """Of steps whose products run beside LoRA."""

    tokens: int
    tailed: bool
    """Adapters with many tokens stand in the tails, so the products are those of the weights with tails, and each token
    that LoRA has is of a sequence that decodes."""


def choose(times: dict[int, float], by_rule: int) -> int:
    """Of the multiprocessors left free, by what a step took with each."""
    best = min(times, key=lambda free: times[free])
    return best if by_rule not in times or times[best] < GAIN * times[by_rule] else by_rule


def settle(
    side: Side,
    tables: triton_lora.Tables,
    installed: Sequence[LoraLinear],
    sizes: Iterable[Size],
    stream: torch.cuda.Stream,
    folder: Path | None = None,
) -> None:
    """Sets `side.measured` for the layers' products in steps of such sizes; what cannot be measured keeps the rule of
    side.py. tables: the arena, whose data is read as factors of made up adapters, whatever it holds. folder: of a file
    with what was measured before."""
    choices = side.choices()
    if len(choices) < 2:
        return
    machine = _machine(tables.data)
    path = folder / f"shares-{_digest(machine)}.json" if folder else None
    begin, known = time.perf_counter(), _read(path, machine, choices)
    graphs: list[torch.cuda.CUDAGraph] = []
    pool, new = torch.cuda.graph_pool_handle(), 0
    kinds = _kinds(installed)
    # Largest first, each in the memory of the one before.
    for size in sorted(set(sizes), reverse=True):
        for layers in kinds:
            weights = _weights(layers, size)
            if not weights:
                continue
            key = (size.tokens, *weights[0].shape)
            if key not in known and time.perf_counter() - begin < MOST_S and has_room(tables.data, layers, size):
                try:
                    case = _Case(side, tables, layers, weights, size)
                    graphs = case.captured(choices, stream, pool, graphs)
                    known[key] = choose(_times(graphs, choices, stream), side.left_free(*key))
                    new += 1
                except Exception:
                    log.warning("what a product of %s leaves to LoRA was not measured", key, exc_info=True)
            if key in known:
                side.measured[key] = known[key]
    if new:
        del graphs
        torch.cuda.empty_cache()
        log.info("what %d products leave to LoRA measured in %.1f s", new, time.perf_counter() - begin)
        if path:
            _write(path, machine, known)


def _kinds(installed: Sequence[LoraLinear]) -> list[list[LoraLinear]]:
    """Layers with products alike."""
    kinds: dict[object, list[LoraLinear]] = {}
    for layer in installed:
        if layer.weight is not None:
            key = (layer.site.in_features, layer.site.widths, layer.tail is None, layer.bias is None)
            kinds.setdefault(key, []).append(layer)
    return [layers[:: -(-len(layers) // LAYERS)] for layers in kinds.values()]


def _weights(layers: Sequence[LoraLinear], size: Size) -> list[Tensor]:
    if size.tailed:
        return [layer.tail.whole for layer in layers if layer.tail is not None]
    return [layer.weight for layer in layers if layer.weight is not None]


def plan_of(size: Size, adapters: int) -> LoraPlan:
    """So many different adapters, in rows 0 and up: one token each where tokens of prompts are the tails', else all
    tokens are divided among them."""
    adapters = min(adapters, size.tokens)
    ends = np.arange(1, adapters + 1) * (adapters if size.tailed else size.tokens) // adapters
    begins = np.concatenate([[0], ends[:-1]])
    spans = [
        (int(begin), int(end - begin), ((row, 1.0),)) for row, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    plan = build_plan(spans)
    if plan is None:
        raise ValueError(f"{size}: no tokens")
    return plan if size.tailed else covering(plan, size.tokens)


def has_room(data: Tensor, layers: Sequence[LoraLinear], size: Size) -> bool:
    """Whether the made up adapters have factors of their own each; else they would be found in the cache."""
    site = layers[0].site
    adapters = min(ADAPTERS, size.tokens)
    return data.numel() >= adapters * len(layers) * RANK * (len(site.widths) * site.in_features + site.out_features)


class Factors:
    """A table of made up adapters (triton_lora.Tables), whose factors lie one behind the other in the data."""

    def __init__(self, tables: triton_lora.Tables, adapters: int, layers: int, k: int, widths: Sequence[int]) -> None:
        cells, device = layers * len(widths), tables.data.device
        sizes = np.array([[RANK * k, RANK * width] for width in widths] * layers * adapters, dtype=np.int64).reshape(-1)
        begins = (np.cumsum(sizes) - sizes) // 8 * 8  # loads of 16 bytes
        # Rows as long as the arena's: the compiler makes other code for other strides.
        rows = (adapters, tables.ranks.shape[1])
        offsets = np.zeros((*rows, 2), dtype=np.int64)
        offsets[:, :cells] = begins.reshape(adapters, cells, 2)
        self.data = tables.data
        self.ranks = torch.full(rows, RANK, dtype=torch.int32, device=device)
        self.offsets = torch.from_numpy(offsets).to(device)
        self.scales = torch.ones(rows, device=device)


class _Case:
    """The same product of several layers, one behind the other, LoRA beside each."""

    def __init__(
        self,
        side: Side,
        tables: triton_lora.Tables,
        layers: Sequence[LoraLinear],
        weights: Sequence[Tensor],
        size: Size,
    ) -> None:
        site, data = layers[0].site, tables.data
        device = data.device
        self._side, self._weights = side, weights
        plan = plan_of(size, ADAPTERS)
        self._plan = DevicePlan.from_plan(plan, RANK, device, covers=not size.tailed)
        self._table = Factors(tables, min(ADAPTERS, size.tokens), len(layers), site.in_features, site.widths)
        every = torch.arange(len(layers) * len(site.widths), dtype=torch.int32, device=device)
        self._targets = every.view(len(layers), -1).unbind()
        self._x = torch.randn(size.tokens, site.in_features, dtype=data.dtype, device=device)
        self._delta = torch.empty(size.tokens, site.out_features, dtype=data.dtype, device=device)
        self._site = site
        self._biases = [layer.tail.bias if size.tailed and layer.tail is not None else layer.bias for layer in layers]

    def _run(self) -> None:
        for weight, bias, targets in zip(self._weights, self._biases, self._targets, strict=True):

            def product(weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
                return functional.linear(self._x, weight, bias)

            def deltas(targets: Tensor = targets) -> None:
                site, plan, table = self._site, self._plan, self._table
                triton_lora.deltas(self._delta, self._x, targets, site.offsets, site.widths, plan, table, add=False)

            self._side.beside(self._x, weight.shape[0], product, deltas)

    def captured(
        self, choices: Sequence[int], stream: torch.cuda.Stream, pool: Any, before: list[torch.cuda.CUDAGraph]
    ) -> list[torch.cuda.CUDAGraph]:
        """A graph for each number of multiprocessors left free. before: graphs whose memory they may have."""
        key = (len(self._x), *self._weights[0].shape)
        graphs = []
        stream.wait_stream(torch.cuda.current_stream(self._x.device))
        try:
            with torch.cuda.stream(stream):
                for free in choices:
                    self._side.measured[key] = free
                    graphs.append(_captured(self._run, stream, pool))
        finally:
            self._side.measured.pop(key, None)
            before.clear()
        return graphs


def _captured(run: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    run()  # compiles and loads what it needs
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        run()
    except BaseException:
        with suppress(RuntimeError):  # which says that the capture has failed
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _times(
    graphs: Sequence[torch.cuda.CUDAGraph], choices: Sequence[int], stream: torch.cuda.Stream
) -> dict[int, float]:
    """Seconds of a replay of each, in two turns, as clocks and neighbours change."""
    found = dict.fromkeys(choices, math.inf)
    with torch.cuda.stream(stream):
        for _ in range(2):
            for free, graph in zip(choices, graphs, strict=True):
                found[free] = min(found[free], replayed(graph))
    return found


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay on the current stream: the shortest of REPLAYS, after one that is not counted."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return min(begin.elapsed_time(end) for begin, end in pairwise(events)) / 1e3


def _machine(data: Tensor) -> dict[str, str]:
    """What the figures hold for: device, versions, and the code that was measured."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in _CODE)
    return {
        "device": torch.cuda.get_device_name(data.device) if data.is_cuda else data.device.type,
        "dtype": str(data.dtype),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "code": hashlib.sha256(code).hexdigest(),
    }


_CODE = ("lora_kernels.py", "shares.py", "side.py", "triton_lora.py", "tuned.json", "tuning.py")


def _digest(machine: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path | None, machine: dict[str, str], choices: Sequence[int]) -> dict[tuple[int, int, int], int]:
    """What was measured on such a machine; nothing where there is no file, or a damaged one."""
    try:
        found = json.loads(path.read_text()) if path else {}
        rows = found["left_free"] if found.get("machine") == machine else []
        return {(int(tokens), int(n), int(k)): free for tokens, n, k, free in rows if free in choices}
    except FileNotFoundError:
        return {}
    except Exception:  # whatever a file may hold
        log.warning("%s: damaged, it will be measured again", path, exc_info=True)
        return {}


def _write(path: Path, machine: dict[str, str], known: dict[tuple[int, int, int], int]) -> None:
    rows = [[*key, free] for key, free in sorted(known.items())]
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"machine": machine, "left_free": rows}))
        part.replace(path)
    except OSError:
        log.warning("%s: not written, it will be measured again", path, exc_info=True)
        with suppress(OSError):
            part.unlink()
