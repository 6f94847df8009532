"""CUDA graphs of decode steps: one launch instead of a thousand.

A graph is captured for a number of sequences (a bucket) and a LoRA variant: none, or one for each bound of the
ranks. Its inputs lie at fixed places in one int32 buffer per bucket, so a step is one copy from pinned memory and one
replay; places that a smaller batch leaves empty have slot -1 (no KV entry is written) and context 0 (attention gives
zeros), and the plan says on the device how many tiles there are. Batches that fit no graph run without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.backend import TritonKernels
from adapters.kernels.device_plan import DevicePlan, PlanShape, PlanSizeError, pack
from adapters.plan import LoraPlan
from service.engine.attention import StepLayout
from service.engine.attention_triton import StepArrays, TritonPagedAttention
from service.engine.transfer import fill_pending

log = logging.getLogger(__name__)

RANK_BOUNDS = (16, 64)
"""LoRA variants that are captured; batches with a larger rank run without a graph."""
BLOCK_M = 16
_ALIGN = 16


def buckets(max_sequences: int) -> list[int]:
    """Numbers of sequences that graphs are captured for, ascending: every batch pads by less than a quarter or 16."""
    wanted = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, *range(256, max_sequences + 1, 64)]
    return sorted({min(size, max_sequences) for size in wanted})


@dataclass(slots=True)
class _Buffer:
    """The inputs of one bucket: the same int32 layout in pinned host memory, twice, and on the device. While a step is
    prepared, the copy for the one before it may not have been made yet; the one before both has been collected."""

    size: int
    host: Tensor
    other: Tensor
    device: Tensor
    ids: slice
    positions: slice
    slots: slice
    contexts: slice
    starts: slice
    table: slice
    plan: slice
    plan_shape: PlanShape

    def turn(self) -> None:
        """From now on the other host buffer is written."""
        self.host, self.other = self.other, self.host

    def part(self, where: slice) -> NDArray[np.int32]:
        return self.host.numpy()[where]


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    greedy: Tensor


Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(ids [T], positions [T], rows wanted or None for all) -> logits [rows, vocabulary]"""


class DecodeGraphs:
    """All graphs of an engine."""

    def __init__(
        self,
        forward: Forward,
        attention: TritonPagedAttention,
        kernels: TritonKernels,
        set_active: Callable[[bool], None],
        *,
        max_sequences: int,
        max_positions: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._kernels = kernels
        self._set_active = set_active
        self._max_positions = max_positions
        self._pages = -(-max_positions // page_size)
        self._device = device
        self._sizes = buckets(max_sequences)
        self._buffers = {size: self._buffer(size) for size in self._sizes}
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def capture(self) -> None:
        """Captures every graph, largest first so that the smaller ones share its memory."""
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            for bound in (0, *RANK_BOUNDS):
                self._graphs[size, bound] = self._capture(size, bound, pool)
        torch.cuda.synchronize()
        log.info("%d CUDA graphs captured in %.1f s", len(self._graphs), time.perf_counter() - begin)

    def run(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        layout: StepLayout,
        plan: LoraPlan | None,
        drawn: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """(logits [S, vocabulary], most probable tokens [S]) of a step of S decoding sequences; None when no graph
        fits it. An id of -1 - i stands for drawn[i]. The tensors are overwritten by the next replay, which is queued
        behind whatever was queued to read them."""
        count = len(ids)
        size = next((size for size in self._sizes if size >= count), None)
        bound = 0
        if plan is not None:
            rank = self._kernels.max_rank(plan)
            bound = next((bound for bound in RANK_BOUNDS if rank <= bound), -1)
        graph = None if size is None else self._graphs.get((size, bound))
        if graph is None or size is None:
            return None
        buffer = self._buffers[size]
        buffer.turn()
        try:
            pack(plan, buffer.plan_shape, buffer.part(buffer.plan))
        except PlanSizeError:  # a composition has more waves than a graph provides for
            return None
        for where, values, rest in (
            (buffer.ids, ids, 0),
            (buffer.positions, positions, 0),
            (buffer.slots, layout.slots, -1),
            (buffer.contexts, layout.context_lens, 0),
        ):
            part = buffer.part(where)
            part[:count] = values
            part[count:] = rest
        width = layout.page_table.shape[1]
        buffer.part(buffer.table).reshape(size, self._pages)[:count, :width] = layout.page_table
        buffer.device.copy_(buffer.host, non_blocking=True)
        if ids.min() < 0:
            fill_pending(buffer.device[buffer.ids][:count], drawn)
        graph.graph.replay()
        return graph.logits[:count], graph.greedy[:count]

    def _buffer(self, size: int) -> _Buffer:
        plan_shape = PlanShape.bounded(entries=size, segments=size, waves=1, block_m=BLOCK_M)
        lengths = {
            **dict.fromkeys(("ids", "positions", "slots", "contexts"), size),
            "starts": size + 1,
            "table": size * self._pages,
            "plan": plan_shape.size,
        }
        parts: dict[str, slice] = {}
        at = 0
        for name, length in lengths.items():
            parts[name] = slice(at, at + length)
            at += -(-length // _ALIGN) * _ALIGN
        host, other = (torch.zeros(at, dtype=torch.int32, pin_memory=True) for _ in range(2))
        device = torch.zeros(at, dtype=torch.int32, device=self._device)
        buffer = _Buffer(size=size, host=host, other=other, device=device, plan_shape=plan_shape, **parts)
        for _ in range(2):
            buffer.part(buffer.slots)[:] = -1
            buffer.part(buffer.starts)[:] = np.arange(size + 1)
            buffer.turn()
        buffer.device.copy_(host)
        return buffer

    def _capture(self, size: int, bound: int, pool: Any) -> _Graph:
        buffer = self._buffers[size]
        data = buffer.device
        self._attention.step = StepArrays(
            slots=data[buffer.slots],
            context_lens=data[buffer.contexts],
            query_starts=data[buffer.starts],
            page_table=data[buffer.table].view(size, self._pages),
            num_decode=size,
            max_context=self._max_positions,
            max_query=0,
        )
        self._kernels.use(DevicePlan(buffer.plan_shape, data[buffer.plan], bound) if bound else None)
        self._set_active(bound > 0)

        def step() -> tuple[Tensor, Tensor]:
            logits = self._forward(data[buffer.ids], data[buffer.positions], None)
            return logits, logits.argmax(-1)

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate outside the capture
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, greedy = step()
        return _Graph(graph, logits, greedy)
