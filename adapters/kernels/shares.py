"""How many multiprocessors each product leaves to LoRA: measured when the engine starts.

Which kernel the library takes for a product changes with the multiprocessors that it may use, and what it takes then
leaps: no rule follows it (benchmarks/RESULTS.md). So products of the sizes that steps have are timed as they will run,
LoRA with ADAPTERS different adapters beside them. What was measured is kept in a file, as compiled code is.
"""

from __future__ import annotations

import json
import logging
import tempfile
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
REPLAYS = 4
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
    data: Tensor,
    installed: Sequence[LoraLinear],
    sizes: Iterable[Size],
    stream: torch.cuda.Stream,
    folder: Path | None = None,
) -> None:
    """Sets `side.measured` for the layers' products in steps of such sizes. data: the arena's, read as factors of made
    up adapters, whatever it holds. folder: of a file with what was measured before."""
    choices = side.choices()
    if not choices:
        return
    path = folder / "shares.json" if folder else None
    begin, known = time.perf_counter(), _read(path, data)
    kinds = _kinds(installed)
    new = 0
    for size in sorted(set(sizes)):
        for layers in kinds:
            weights, site = _weights(layers, size), layers[0].site
            if not weights or data.numel() < RANK * max(site.in_features, *site.widths):
                continue
            key = (size.tokens, *weights[0].shape)
            if key not in known:
                times = _Case(side, data, layers, weights, size).times(choices, stream)
                known[key] = choose(times, side.left_free(*key))
                new += 1
            side.measured[key] = known[key]
    if new:
        log.info("what %d products leave to LoRA measured in %.1f s", new, time.perf_counter() - begin)
        if path:
            _write(path, data, known)


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


class Factors:
    """A table of made up adapters (triton_lora.Tables), whose factors lie anywhere in the data, which has room for the
    largest."""

    def __init__(self, data: Tensor, adapters: int, layers: int, k: int, widths: Sequence[int]) -> None:
        cells = layers * len(widths)
        sizes = np.array([[RANK * k, RANK * width] for width in widths] * layers, dtype=np.int64)
        room = data.numel() - int(sizes.max())
        ends = np.cumsum(np.broadcast_to(sizes, (adapters, cells, 2)).reshape(-1))
        begins = (ends - np.broadcast_to(sizes, (adapters, cells, 2)).reshape(-1)) % (room + 1)
        self.data = data
        self.ranks = torch.full((adapters, cells), RANK, dtype=torch.int32, device=data.device)
        # As in the arena, blocks of 16 bytes.
        self.offsets = torch.from_numpy((begins // 16 * 16).reshape(adapters, cells, 2)).to(data.device)
        self.scales = torch.ones(adapters, cells, device=data.device)


class _Case:
    """The same product of several layers, one behind the other, LoRA beside each."""

    def __init__(
        self, side: Side, data: Tensor, layers: Sequence[LoraLinear], weights: Sequence[Tensor], size: Size
    ) -> None:
        site, device = layers[0].site, data.device
        self._side, self._weights = side, weights
        plan = plan_of(size, ADAPTERS)
        self._plan = DevicePlan.from_plan(plan, RANK, device, covers=not size.tailed)
        self._table = Factors(data, min(ADAPTERS, size.tokens), len(layers), site.in_features, site.widths)
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

    def times(self, choices: Sequence[int], stream: torch.cuda.Stream) -> dict[int, float]:
        """ms by what is left free."""
        key = (len(self._x), *self._weights[0].shape)
        graphs, found = [], {}
        pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(self._x.device))
        try:
            with torch.cuda.stream(stream):
                for free in choices:
                    self._side.measured[key] = free
                    graphs.append(_captured(self._run, stream, pool))
                    found[free] = _time(graphs[-1])
        finally:
            self._side.measured.pop(key)
        return found


def _captured(run: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    run()  # compiles and loads what it needs
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        run()
    finally:
        graph.capture_end()
    return graph


def _time(graph: torch.cuda.CUDAGraph) -> float:
    """ms of a replay: the shortest of some, after one that is not counted."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return min(begin.elapsed_time(end) for begin, end in pairwise(events))


def _machine(data: Tensor) -> dict[str, str]:
    """What the figures hold for."""
    return {
        "device": torch.cuda.get_device_name(data.device) if data.is_cuda else data.device.type,
        "dtype": str(data.dtype),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def _read(path: Path | None, data: Tensor) -> dict[tuple[int, int, int], int]:
    """What was measured on such a machine; nothing where the file is of another, or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text()) if path else {}
        if found and found["machine"] == _machine(data):
            return {(int(tokens), int(n), int(k)): int(free) for tokens, n, k, free in found["left_free"]}
    return {}


def _write(path: Path, data: Tensor, known: dict[tuple[int, int, int], int]) -> None:
    rows = [[*key, free] for key, free in sorted(known.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"machine": _machine(data), "left_free": rows}, file)
        Path(file.name).replace(path)
    except OSError:
        log.warning("%s: not written, it will be measured again", path, exc_info=True)
