"""A step's layout as the GPU's attention kernels read it: arrays on the device, and prompts divided into tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.plan import ranges
from service.engine.attention import StepLayout

TILE = 64
"""Queries of a tile of prompts."""
SMALL_TILE = 16
"""The same where prompts are short, without tensor cores, and where all sequences go the way of prompts."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A StepLayout on the device. Tensors are int32; sequences with one query come first."""

    slots: Tensor
    """[T]; -1 skips a token."""
    context_lens: Tensor
    """[S]"""
    query_starts: Tensor
    """[S + 1] cumulative query lengths; sequence s has tokens query_starts[s] : query_starts[s + 1]."""
    page_table: Tensor
    """[S, most pages]"""
    tile_seq: Tensor
    """[N] the sequence of each tile of `block_m` queries of those with several; -1: no tile."""
    tile_row: Tensor
    """[N] its first query's place in its sequence's."""
    block_m: int
    num_decode: int
    """The first so many sequences have one query; an upper bound where `count` is."""
    max_context: int
    """Of the decoding sequences: what grids are sized by, an upper bound will do."""
    count: Tensor | None = None
    """[1] the same as num_decode, known on the device only (a CUDA graph's)."""
    starts_early: bool = False
    """All sequences decode, and attention starts before the kernel before it has ended (adapters/kernels/early.py)."""

    @classmethod
    def from_layout(cls, layout: StepLayout, device: torch.device, block_m: int | None = None) -> StepArrays:
        """One copy to the device for all arrays: ten small copies take 122 us of host time, one takes 6."""
        n = layout.num_decode
        block_m = block_m or rows_per_tile(layout)
        seqs, rows = tiles(layout, block_m)
        parts: list[NDArray] = [
            layout.slots,
            layout.context_lens,
            np.concatenate([[0], np.cumsum(layout.query_lens)]),
            layout.page_table.reshape(-1),
            seqs,
            rows,
        ]
        host = torch.empty(sum(p.size for p in parts), dtype=torch.int32, pin_memory=device.type == "cuda")
        np.concatenate(parts, out=host.numpy(), casting="same_kind", dtype=None)
        slots, contexts, starts, table, seqs_, rows_ = host.to(device, non_blocking=True).split([p.size for p in parts])
        return cls(
            slots=slots,
            context_lens=contexts,
            query_starts=starts,
            page_table=table.view(layout.page_table.shape),
            tile_seq=seqs_,
            tile_row=rows_,
            block_m=block_m,
            num_decode=n,
            max_context=int(layout.context_lens[:n].max(initial=0)),
        )


def rows_per_tile(layout: StepLayout) -> int:
    """Queries of a tile. 64 with 4 warps beat 128 with 8 on an H200 for 8 prompts of 512: 99 us against 108 to 112."""
    return TILE if layout.query_lens[layout.num_decode :].max(initial=0) > SMALL_TILE else SMALL_TILE


def tiles(layout: StepLayout, block_m: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(sequence, first query) of every tile of the sequences with several queries. Those that see the most keys come
    first: they take longest."""
    n = layout.num_decode
    counts = layout.query_lens[n:]
    each = -(-counts // block_m)
    seqs = np.repeat(np.arange(n, len(layout.query_lens), dtype=np.int32), each)
    rows = ranges(np.zeros(len(counts), dtype=np.int32), each) * block_m
    sees = (layout.context_lens - layout.query_lens)[seqs] + rows
    order = np.argsort(-sees, kind="stable")
    return seqs[order], rows[order]
