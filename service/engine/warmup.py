"""Everything that compiles is compiled before the engine says that it is ready: no request pays for it.

Dummy steps run through the layers in every shape class that kernels and compiled layers distinguish. They write no KV
entry (slot -1), and their adapter is a row of zeros.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from adapters.arena import Arena
from adapters.kernels.backend import TAIL_TOKENS
from adapters.kernels.device_plan import RANK_BUCKETS
from adapters.manifest import Manifest
from adapters.plan import LoraPlan, Rows, build_plan
from adapters.tiers import RowEntries
from service.engine.attention import StepLayout
from service.engine.runner import Runner

log = logging.getLogger(__name__)


TOKENS = (600, 1, 9)
"""Of the dummy steps. One token, and more, are different code to the compiler; the first step with more decides for
which size it lays out its loops, so it is no small one. Attention has tiles of its own for up to 16 queries, and in a
step of which all tokens decode it writes their keys itself."""
SEVERAL_PARTS = 65
"""Keys of a decoding sequence that attention divides among several programs, which is different code too."""


def warm_up(runner: Runner, arena: Arena, manifest: Manifest, budget: int, *, deterministic: bool) -> None:
    """Runs dummy steps of up to `budget` tokens. Kernels for higher ranks are compiled when graphs are captured."""
    begin = time.perf_counter()
    sizes = (budget,) if deterministic else TOKENS
    for tokens in () if deterministic else sizes:
        _step(runner, tokens, budget, None, manifest.max_positions)
    with dummy_adapter(arena, manifest, RANK_BUCKETS[0]) as row:
        if row is None:
            log.warning("the arena is too small for an adapter of rank %d: LoRA is not warmed up", RANK_BUCKETS[0])
        else:
            kernels = runner.kernels
            tails, kernels.tails = kernels.tails, False
            try:
                for tokens in sizes:
                    _step(runner, tokens, budget, ((row, 1.0),), manifest.max_positions)
            finally:
                kernels.tails = tails
            if tails:
                _step(runner, max(TOKENS[0], TAIL_TOKENS), budget, ((row, 1.0),), manifest.max_positions)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    log.info("warmed up in %.1f s", time.perf_counter() - begin)


@contextmanager
def dummy_adapter(arena: Arena, manifest: Manifest, rank: int) -> Iterator[int | None]:
    """Row 0, bound to factors of `rank` for every target, zeros all at the same place; None if they do not fit. What a
    fresh arena holds may be no numbers, and what is staged from it in the tails of base weights stays there: zero times
    that, for every token of a later step, is none either."""
    linears = manifest.linears
    largest = max(rank * max(module.in_features, module.out_features) for module in linears)
    region = arena.allocate(largest * arena.data.element_size())
    if region is None:
        yield None
        return
    arena.bytes[region.offset : region.end].zero_()
    zeros = np.zeros((len(linears), 2), np.int64)
    entries = RowEntries(np.full(len(linears), rank, np.int32), zeros, np.ones(len(linears), np.float32))
    arena.bind(0, region, entries)
    try:
        yield 0
    finally:
        arena.unbind(0)
        arena.free(region)


def _step(runner: Runner, wanted: int, budget: int, rows: Rows | None, positions: int) -> None:
    """A sequence that decodes, and beside it a prompt of the other tokens, if there are any, `wanted` or the budget in
    all: nothing is written to the cache, and nothing of it is kept. positions: how many the model knows."""
    tokens = min(wanted, budget)
    plan: LoraPlan | None = build_plan([(0, tokens, rows)]) if rows else None
    lens = np.array([1, tokens - 1] if tokens > 1 else [1], dtype=np.int32)
    contexts = lens.copy()
    if wanted >= TOKENS[0]:
        contexts[0] = min(SEVERAL_PARTS, positions)
    layout = StepLayout(
        slots=np.full(tokens, -1, dtype=np.int64),
        query_lens=lens,
        context_lens=contexts,
        page_table=np.zeros((len(lens), -(-int(contexts.max()) // runner.page_size)), dtype=np.int32),
        num_decode=1,
    )
    ids = np.zeros(tokens, dtype=np.int64)
    runner.forward(ids, np.arange(tokens) % positions, layout, plan, np.array([tokens - 1]))
