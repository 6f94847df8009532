"""Everything that compiles is compiled before the engine says that it is ready: no request pays for it.

Dummy steps run through the layers in every shape class that kernels and compiled layers distinguish. They write no KV
entry (slot -1), and their adapter is a row of zeros.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from adapters.arena import Arena
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
    """Runs dummy steps of up to `budget` tokens. Kernels for the highest class of ranks are compiled when graphs are
    captured."""
    begin = time.perf_counter()
    sizes = (budget,) if deterministic else TOKENS

    def step(tokens: int, *parts: tuple[int, Rows]) -> None:
        _step(runner, tokens, budget, parts, manifest.max_positions)

    for tokens in () if deterministic else sizes:
        step(tokens)
    with ExitStack() as stack:
        rows = [
            row
            for number, rank in enumerate(RANK_BUCKETS[:2])
            if (row := stack.enter_context(dummy_adapter(arena, manifest, number, rank))) is not None
        ]
        if len(rows) < 2:
            log.warning("the arena has no room for two adapters, of ranks to %d: not all is warmed up", RANK_BUCKETS[1])
        if rows:
            low, high = ((rows[0], 1.0),), ((rows[-1], 1.0),)
            kernels = runner.kernels
            tails, kernels.tails = kernels.tails, False
            try:
                for tokens in sizes:
                    step(tokens, (tokens, low))
                if not deterministic:
                    for tokens in (TOKENS[0], TOKENS[-1]):  # in small steps expand starts early
                        step(tokens, (tokens, high))
            finally:
                kernels.tails = tails
            if tails:
                step(TOKENS[0], (TOKENS[0], low))
                step(TOKENS[0], (1, high), (TOKENS[0] - 1, low))  # what decodes is computed beside
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    log.info("warmed up in %.1f s", time.perf_counter() - begin)


@contextmanager
def dummy_adapter(arena: Arena, manifest: Manifest, row: int, rank: int) -> Iterator[int | None]:
    """The row, bound to factors of `rank` for every target, zeros all at the same place; None if they do not fit, or
    the arena has no such row. What a fresh arena holds may be no numbers, and what is staged from it in the tails of
    base weights stays there until an adapter takes its place."""
    linears = manifest.linears
    largest = max(rank * max(module.in_features, module.out_features) for module in linears)
    region = arena.allocate(largest * arena.data.element_size()) if row < arena.rows else None
    if region is None:
        yield None
        return
    arena.bytes[region.offset : region.end].zero_()
    zeros = np.zeros((len(linears), 2), np.int64)
    entries = RowEntries(np.full(len(linears), rank, np.int32), zeros, np.ones(len(linears), np.float32))
    arena.bind(row, region, entries)
    try:
        yield row
    finally:
        arena.unbind(row)
        arena.free(region)


def _step(runner: Runner, wanted: int, budget: int, parts: Sequence[tuple[int, Rows]], positions: int) -> None:
    """A sequence that decodes, and beside it a prompt of the other tokens, if there are any, `wanted` or the budget in
    all: nothing is written to the cache, and nothing of it is kept. parts: how many tokens, one part after the other,
    have which adapters. positions: how many the model knows."""
    tokens = min(wanted, budget)
    spans, at = [], 0
    for count, rows in parts:
        spans.append((at, min(count, tokens - at), rows))
        at += spans[-1][1]
    plan: LoraPlan | None = build_plan(spans) if spans else None
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
