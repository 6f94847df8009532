"""CUDA graphs of steps: one launch instead of a thousand.

A graph is captured for a shape and a LoRA variant (graph_shapes.py). In the shapes called decode every sequence has
one token; in the others, up to so many tokens of prompts and decoding sequences come together, in any division. It ends
with the draw of each sequence's next token. Inputs lie at fixed places in one int32 buffer per shape, so a step is one
copy from pinned memory and one replay. What a smaller batch leaves empty is told on the device: tokens with slot -1 (no
KV entry is written), sequences beyond the count of those that decode, tiles of sequence -1, and the LoRA plan's own
lengths. Batches that fit no graph run without one.

The deterministic engine has one shape for all steps, and LoRA in all of them: every product has the same size in every
step, so the library computes it by the same kernel, and each row of it in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.backend import TritonKernels, many_tokens_each
from adapters.kernels.device_plan import DevicePlan, PlanShape, PlanSizeError, pack
from adapters.kernels.shares import Size, replayed
from adapters.kernels.side import LEAST_TOKENS, MOST_TOKENS
from adapters.kernels.tail import Placed
from adapters.kernels.tail_plan import TailPlan, TailShape, pack_tail
from adapters.plan import NOTHING, LoraPlan, covering
from service.engine import memsets
from service.engine.attention import StepLayout
from service.engine.attention_triton import TritonPagedAttention
from service.engine.draw import WIDTH
from service.engine.draw_triton import draw_into
from service.engine.graph_shapes import (
    SAME_VARIANTS,
    Need,
    Shape,
    Variant,
    candidates,
    one_shape,
    variants_of_shapes,
)
from service.engine.step_arrays import TILE, StepArrays, tiles
from service.engine.transfer import fill_pending

log = logging.getLogger(__name__)

LATER = 1.02
"""A size whose steps take so many times what a larger one's do is left out: the library has chosen a bad kernel for
its products, as cuBLAS does for 448 tokens of an 8B model (steps of 18.3 ms, and 15.2 for 512)."""
_ALIGN = 16


@dataclass(frozen=True, slots=True)
class _PlanShapes:
    """Of one variant's plans, one behind the other."""

    tail: TailShape | None
    beside: PlanShape | None

    @classmethod
    def of(cls, variant: Variant, shape: Shape) -> _PlanShapes:
        tail = TailShape(shape.tokens, variant.slots) if variant.slots else None
        if not variant.rank:
            return cls(tail, None)
        waves = variant.waves
        entries, segments = shape.tokens * waves, shape.sequences * waves + 1
        return cls(tail, PlanShape.bounded(entries, segments, waves, variant.block_m, variant.rank))

    @property
    def first(self) -> int:
        """Where the plan of those beside the product begins."""
        return self.tail.size if self.tail else 0

    @property
    def size(self) -> int:
        return self.first + (self.beside.size if self.beside else 0)


class _Places:
    """Where the inputs of one shape lie in the buffer."""

    def __init__(self, shape: Shape, pages: int, variants: tuple[Variant | None, ...]) -> None:
        """variants: None is a step without LoRA."""
        self.shape = shape
        self.variants = variants
        self.plans = {variant: _PlanShapes.of(variant, shape) for variant in variants if variant is not None}
        """All at the same place."""
        self.waves = max(variant.waves for variant in self.plans)
        lengths = {
            **dict.fromkeys(("ids", "positions", "slots"), shape.tokens),
            "contexts": shape.sequences,
            "wanted": shape.wanted,
            "rules": (shape.wanted or shape.tokens) * WIDTH,
            "starts": shape.sequences + 1,
            **dict.fromkeys(("tile_seq", "tile_row"), shape.tiles),
            "count": 1,
            "plan": max(plan.size for plan in self.plans.values()),
            "table": shape.sequences * pages,  # last, and sent as far as it is used
        }
        self.of: dict[str, slice] = {}
        self.size = 0
        for name, length in lengths.items():
            self.of[name] = slice(self.size, self.size + length)
            self.size += -(-length // _ALIGN) * _ALIGN


class _Inputs:
    """One int32 buffer for the inputs of all shapes: on the device, where a step's are overwritten by the next one's
    behind its replay, and twice in pinned host memory. While a step is prepared, the copy for the one before it may
    not have been made yet; the one before both has been collected."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host, self._other = (torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2))
        self.host = self._host.numpy()

    def send(self, size: int) -> None:
        """Copies the first `size` elements; from now on the other host buffer is written."""
        self.device[:size].copy_(self._host[:size], non_blocking=True)
        self._host, self._other = self._other, self._host
        self.host = self._host.numpy()

    def fill(self, where: slice, values: NDArray[np.integer], rest: int) -> None:
        part = self.host[where]
        part[: len(values)] = values
        part[len(values) :] = rest


Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(ids [T], positions [T], tokens wanted or None for all) -> logits [wanted, vocabulary]"""


class StepGraphs:
    """All graphs of an engine."""

    def __init__(
        self,
        forward: Forward,
        attention: TritonPagedAttention,
        kernels: TritonKernels,
        set_active: Callable[[bool], None],
        *,
        max_sequences: int,
        max_tokens: int,
        max_positions: int,
        page_size: int,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
        folder: Path | None = None,
    ) -> None:
        """folder: for what is measured here and holds for the next start too."""
        self._forward = forward
        self._attention = attention
        self._kernels = kernels
        self._set_active = set_active
        self._max_positions = max_positions
        self._pages = -(-max_positions // page_size)
        self._device = device
        self.deterministic = deterministic
        self._folder = folder
        if deterministic:
            self._places = [_Places(one_shape(max_sequences, max_tokens), self._pages, SAME_VARIANTS)]
        else:
            every = variants_of_shapes(max_sequences, max_tokens, tails=kernels.tails)
            self._places = [_Places(shape, self._pages, those) for shape, those in every.items()]
        self._tile = attention.block_m or TILE
        self._inputs = _Inputs(max(places.size for places in self._places), device)
        self._graphs: dict[tuple[Shape, Variant | None], torch.cuda.CUDAGraph] = {}
        self.seconds: dict[int, float] = {}
        """Of a step without LoRA, and without any context, by the tokens to which steps with prompts are padded."""
        # One for all captures: cuBLAS keeps a workspace for every stream.
        self._stream = torch.cuda.Stream(device)
        # One place for what all of them give: a tensor of its own for each would take gigabytes.
        rows = max(places.shape.wanted or places.shape.tokens for places in self._places)
        self._logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        self._tokens = torch.empty(rows, dtype=torch.int64, device=device)

    def capture(self) -> None:
        """Captures every graph, largest first so that the smaller ones share its memory."""
        self._kernels.share_out(self._beside(), self._stream, self._folder)
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        least = math.inf
        for places in sorted(self._places, key=lambda places: -places.shape.tokens):
            for variant in places.variants:
                self._graphs[places.shape, variant] = self._capture(places, variant, pool)
                if variant is None and places.shape.tiles:
                    taken = replayed(self._graphs[places.shape, None])
                    if taken > LATER * least:
                        log.info("steps of %d tokens take longer than larger ones: padded", places.shape.tokens)
                        del self._graphs[places.shape, None]
                        self._places.remove(places)
                        break
                    least = min(least, taken)
                    self.seconds[places.shape.tokens] = taken
        torch.cuda.synchronize()
        log.info("%d CUDA graphs captured in %.1f s", len(self._graphs), time.perf_counter() - begin)
        sizes = ", ".join(f"{size}: {seconds * 1e3:.1f}" for size, seconds in sorted(self.seconds.items()))
        log.info("ms of a step with prompts, by its tokens: %s", sizes or "not measured")

    def _beside(self) -> Iterator[Size]:
        """Steps whose LoRA runs beside products that may leave multiprocessors free."""
        for places in self._places:
            if LEAST_TOKENS <= places.shape.tokens <= MOST_TOKENS:
                for variant in places.plans:
                    if variant.rank and variant.block_m == 16:
                        yield Size(places.shape.tokens, tailed=variant.slots > 0)

    def run(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        layout: StepLayout,
        plan: LoraPlan | None,
        wanted: NDArray[np.int64],
        rules: NDArray[np.int32],
        drawn: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """(logits [wanted, vocabulary], tokens [wanted] drawn from them by `rules`, see draw.py) of the step's tokens
        `wanted`; None when no graph fits it. An id of -1 - i stands for drawn[i]. The tensors are overwritten by the
        next replay, which is queued behind whatever was queued to read them."""
        if self.deterministic:
            layout, plan = replace(layout, num_decode=0), plan or NOTHING
        for places, seqs, rows in self.fitting(len(ids), layout, wanted):  # noqa: B007 - used after the loop
            variant, placed = (None, None) if plan is None else self._write_plan(plan, places, len(ids))
            if plan is None or variant is not None:
                break
        else:
            return None
        graph = self._graphs.get((places.shape, variant))
        if graph is None:
            return None
        inputs, of = self._inputs, places.of
        inputs.fill(of["ids"], ids, 0)
        inputs.fill(of["positions"], positions, 0)
        inputs.fill(of["slots"], layout.slots, -1)
        inputs.fill(of["contexts"], layout.context_lens, 0)
        if places.shape.wanted:
            inputs.fill(of["wanted"], wanted, 0)
        inputs.fill(of["rules"], rules.reshape(-1), 0)
        inputs.fill(of["tile_seq"], seqs, -1)
        inputs.host[of["tile_row"]][: len(rows)] = rows
        starts = inputs.host[of["starts"]]
        starts[0] = 0
        np.cumsum(layout.query_lens, out=starts[1 : len(layout.query_lens) + 1])
        inputs.host[of["count"]] = layout.num_decode
        sequences, width = layout.page_table.shape
        inputs.host[of["table"]].reshape(-1, self._pages)[:sequences, :width] = layout.page_table
        inputs.send(of["table"].start + sequences * self._pages)
        if ids.min() < 0:
            fill_pending(inputs.device[of["ids"]][: len(ids)], drawn)
        graph.replay()
        self._kernels.launched(placed)
        return self._logits[: len(wanted)], self._tokens[: len(wanted)]

    def fitting(
        self, tokens: int, layout: StepLayout, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[_Places, NDArray[np.int32], NDArray[np.int32]]]:
        """Shapes that a step fits, the smallest first, with the sequence and the first row of each tile of prompts."""
        decoding = layout.num_decode == tokens == len(wanted)
        seqs, rows = tiles(layout, self._tile)
        for places in self._places:
            shape = places.shape
            mixed = len(seqs) <= shape.tiles and len(wanted) <= shape.wanted
            if shape.fits(tokens, layout) and (decoding or mixed):
                yield places, seqs, rows

    def _write_plan(self, plan: LoraPlan, places: _Places, tokens: int) -> tuple[Variant | None, Placed | None]:
        """The variant that it fits, after it has been written, and where its adapters stand in the tails."""
        if len(plan.waves) > places.waves:
            return None, None
        kernels = self._kernels
        part, rest = kernels.parted(plan, tokens)
        whole = covering(plan, tokens)
        for variant in candidates(places.plans, self._need(plan), None if rest is None else self._need(rest)):
            shapes = places.plans[variant]
            placed: Placed | None = None
            beside: LoraPlan | None = whole
            host = self._inputs.host[places.of["plan"]][: shapes.size]
            try:
                if shapes.tail is not None:
                    beside = rest
                    placed = None if part is None else kernels.place(part, variant.slots)
                    if placed is None and part is not None:
                        continue
                    pack_tail(part, placed, shapes.tail, host[: shapes.first], rest)
                if shapes.beside is not None:
                    pack(beside, shapes.beside, host[shapes.first :], None if beside is None else kernels.ranks(beside))
            except PlanSizeError:
                continue
            return variant, placed
        return None, None

    def _need(self, plan: LoraPlan) -> Need:
        block_m = 64 if many_tokens_each(plan) else 16
        return Need(self._kernels.ranks(plan).max(initial=0), len(plan.waves), block_m)

    def _capture(self, places: _Places, variant: Variant | None, pool: Any) -> torch.cuda.CUDAGraph:
        shape = places.shape
        self._blank(places)

        def part(name: str) -> Tensor:
            return self._inputs.device[places.of[name]]

        beside: DevicePlan | None = None
        tail: TailPlan | None = None
        if variant is not None:
            shapes = places.plans[variant]
            buffer = part("plan")[: shapes.size]
            if shapes.tail is not None:
                tail = TailPlan(shapes.tail, buffer[: shapes.first])
            if shapes.beside is not None:
                beside = DevicePlan(shapes.beside, buffer[shapes.first :], variant.rank, covers=tail is None)
        self._kernels.use(beside, tail, shape.tokens)
        self._set_active(variant is not None)
        self._attention.step = StepArrays(
            slots=part("slots"),
            context_lens=part("contexts"),
            query_starts=part("starts"),
            page_table=part("table").view(shape.sequences, self._pages),
            tile_seq=part("tile_seq"),
            tile_row=part("tile_row"),
            block_m=self._tile,
            num_decode=0 if self.deterministic else shape.sequences,
            max_context=self._max_positions,
            count=part("count") if shape.tiles else None,
            starts_early=self._kernels.starts_early and not shape.tiles,
        )
        wanted = part("wanted") if shape.wanted else None

        def step() -> None:
            if variant is not None and variant.slots:
                self._kernels.stage()
            logits = self._forward(part("ids"), part("positions"), wanted)
            draw_into(self._tokens[: len(logits)], logits, part("rules").view(-1, WIDTH))
            self._logits[: len(logits)].copy_(logits)

        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        # Attention that starts early is code of its own.
        whole = self.deterministic or variant in places.variants[: 2 if self._attention.step.starts_early else 1]
        # Compiles and loads outside the capture what it needs, but products that leave multiprocessors free (side.py).
        with torch.cuda.stream(stream):
            if whole:
                step()
            else:
                self._kernels.warm_up(beside, tail, shape.tokens)
        stream.synchronize()
        if whole:  # what the step has left in the allocator's cache is the graph's; the kernels leave little
            torch.cuda.empty_cache()
        # Steps that only decode have one memset at most; what is kept of a graph is host memory.
        graph = torch.cuda.CUDAGraph(keep_graph=bool(shape.tiles))
        # As torch.cuda.graph, which empties the cache each time: 3 s of a start (H100).
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                step()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which says that the capture has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        if shape.tiles:
            memsets.instantiate(graph)
        return graph

    def _blank(self, places: _Places) -> None:
        """Inputs of a step of no tokens."""
        self._inputs.host[: places.size] = 0
        for name in ("slots", "tile_seq"):
            self._inputs.host[places.of[name]] = -1
        self._inputs.send(places.size)
        torch.cuda.synchronize(self._device)
