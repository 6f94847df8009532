"""One step as the engine's CUDA graphs get it, made up and replayed as often as one likes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from adapters.plan import build_plan
from benchmarks.engine import Driver
from service.engine.attention import StepLayout
from service.engine.draw import WIDTH
from service.engine.graph_shapes import Variant
from service.engine.graphs import StepGraphs


class Case:
    """`decoding` sequences with a context of `context` tokens, and whole prompts of `prompts` tokens each."""

    def __init__(
        self,
        driver: Driver,
        graphs: StepGraphs,
        rows: Sequence[int],
        decoding: int,
        prompts: Sequence[int],
        context: int,
    ) -> None:
        """rows: of adapters in the arena, each sequence's own in turn."""
        self.graphs = graphs
        counts = np.array([1] * decoding + list(prompts), dtype=np.int32)
        contexts = np.array([context] * decoding + list(prompts), dtype=np.int32)
        size = driver.engine.pool.page_size
        width = -(-int(contexts.max()) // size)
        table = np.arange(len(counts) * width, dtype=np.int32) % driver.engine.pool.num_pages
        table = table.reshape(len(counts), width)
        owner = np.repeat(np.arange(len(counts)), counts)
        before = contexts - counts
        positions = np.concatenate([np.arange(b, b + n) for b, n in zip(before, counts, strict=True)])
        self.layout = StepLayout(
            slots=table[owner, positions // size].astype(np.int64) * size + positions % size,
            query_lens=counts,
            context_lens=contexts,
            page_table=table,
            num_decode=decoding,
        )
        self.positions = positions.astype(np.int64)
        self.ids = np.arange(len(positions)) % 1000
        self.wanted = np.cumsum(counts) - 1
        self.rules = np.zeros((len(counts), WIDTH), dtype=np.int32)
        self.drawn = torch.empty(0, dtype=torch.int64, device="cuda")
        self.captured: tuple[Variant, ...] | None = None
        """By `capture`, at most one; None: the engine's own graphs are there."""
        self.plans = {"none": None}
        begins = np.cumsum(counts) - counts
        for name, distinct in (("one", 1), ("distinct", len(rows))):
            spans = [
                (int(b), int(n), ((rows[i % distinct], 1.0),))
                for i, (b, n) in enumerate(zip(begins, counts, strict=True))
            ]
            self.plans[name] = build_plan(spans)
        found = next(graphs.fitting(len(self.ids), self.layout, self.wanted), None)
        if found is None:
            raise ValueError(f"{decoding} decoding and {sum(prompts)} tokens of prompts fit no graph")
        self.places = found[0]

    def capture(self, name: str, block_m: int, slots: int | None = None) -> None:
        """Captures the case's graph anew, as the only one there is, with tiles of `block_m` entries for LoRA beside the
        products (0: none is), and so many slots in the tails of the base weights."""
        plan, variant = self.plans[name], None
        if plan is not None:
            rank = self.graphs._kernels.ranks(plan).max()
            variant = next(
                v
                for v in self.places.variants
                if v and v.block_m == block_m and slots in (None, v.slots) and (not v.rank or rank <= v.rank)
            )
        self.captured = () if variant is None else (variant,)
        graph = self.graphs._capture(self.places, variant, torch.cuda.graph_pool_handle())
        self.graphs._graphs = {(self.places.shape, variant): graph}

    def time(self, name: str, repeats: int = 15) -> tuple[float, Variant | None]:
        """Median ms of a replay of what `capture` captured, else of the engine's own graph, and its variant."""
        plan, variant = self.plans[name], None
        every = self.places.plans
        if self.captured is not None:
            self.places.plans = {v: every[v] for v in self.captured}
        try:
            for _ in range(2):  # the first may have staged adapters, what it wrote for the second stages none
                self.graphs.run(self.ids, self.positions, self.layout, plan, self.wanted, self.rules, self.drawn)
            if plan is not None:
                variant, _ = self.graphs._write_plan(plan, self.places, len(self.ids))
        finally:
            self.places.plans = every
        graph = self.graphs._graphs.get((self.places.shape, variant))
        if graph is None or (variant is None) != (plan is None):
            raise ValueError(f"{name}: this step takes {variant}, which is not captured")
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times), variant
