"""Spare rows below a base weight, in which the A of a step's adapters lie beside it. Torch alone, no Triton.

A base weight W0 [d, k] has rows of its own below it: the tail. Where few adapters have many tokens each, their A are
copied there ("staged"), a rank to a row, and

    x [W0 ; A]ᵀ = [x W0ᵀ | s],   s = x Aᵀ

is one product of the library's, which takes hardly longer than that of x W0ᵀ. s of all staged adapters is computed for
every token; whoever reads the product next adds w · scale · s B of the token's own adapter (triton_tail.py). B and
scale are staged too, at fixed places: that kernel then has no table to look them up in. W0's own rows are never
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.plan import LoraPlan
from adapters.site import Site

GRANULE = 16
"""Ranks of a slot."""
SLOTS = 4
"""Adapters that are staged at most; one takes as many neighbouring slots as its largest rank needs."""
RANKS = SLOTS * GRANULE
_LEAST_ROWS = 128
"""Of a tail. With 16 to 64 rows more the library's products took up to 18% longer than with 128 (o and down of an 8B
model, 160 to 384 tokens, H100)."""


class Tail(NamedTuple):
    """A base weight with its tail, and what else is staged beside it."""

    whole: Tensor
    """[d + spare, k]: W0, and below it, for each slot in turn, GRANULE rows of each target's A in turn."""
    bias: Tensor | None
    """[d + spare], zeros behind the model's own."""
    b: Tensor
    """[RANKS, d]: B of each slot in turn, side by side those of the targets."""
    scales: Tensor
    """float32 [targets, SLOTS]"""


def spare(targets: int) -> int:
    """Rows of the tail of a site with so many targets."""
    return max(_LEAST_ROWS, targets * RANKS)


def spare_bytes(sites: Iterable[Site], itemsize: int) -> int:
    """Of the tails of all a model's sites, and of what is staged beside them."""
    elements = sum(spare(len(site.targets)) * site.in_features + RANKS * site.out_features for site in sites)
    return elements * itemsize


def can_have(dtype: torch.dtype) -> bool:
    """Half precision: s is rounded to it, as PEFT does, and float32 has no tensor cores to gain from."""
    return dtype in (torch.bfloat16, torch.float16)


def with_tail(parts: Sequence[Tensor], bias: Tensor | None) -> Tail:
    """Copies of weights [d_j, k] one below the other, and of their bias [d], with a tail of zeros."""
    d, k = sum(len(part) for part in parts), parts[0].shape[1]
    whole = parts[0].new_zeros(d + spare(len(parts)), k)
    torch.cat(list(parts), out=whole[:d])
    long = None
    if bias is not None:
        long = bias.new_zeros(len(whole))
        long[:d] = bias
    scales = torch.zeros(len(parts), SLOTS, dtype=torch.float32, device=whole.device)
    return Tail(whole, long, whole.new_zeros(RANKS, d), scales)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the adapters of a plan stand in the tails."""

    slots: NDArray[np.int32]
    """[segments, 2] first slot of each segment's adapter, and the one behind its last; both 0 without an adapter."""
    staged: tuple[tuple[int, int, int], ...]
    """(arena row, first slot, number of slots) of those that have to be copied there before."""


class Slots:
    """Which adapters are staged. The device follows in the order of steps: what was placed is either `launched` before
    anything else is placed, or its step has failed, and then nobody knows what stands there."""

    def __init__(self) -> None:
        self._waiting: Placed | None = None
        """Was to be staged, and is not known to have been launched."""
        self._held: dict[int, tuple[int, int, int]] = {}
        """Arena row -> first slot, slots, the row's generation; the one used last stands last."""

    def place(
        self, plan: LoraPlan, ranks: NDArray[np.integer], generation: NDArray[np.integer], slots: int = SLOTS
    ) -> Placed | None:
        """None if the plan's adapters do not fit into the first `slots`, or are mixed. ranks [segments]: the largest of
        each segment's adapter in any target; generation [arena rows]: what changes when a row gets another block."""
        if self._waiting is not None:
            self._held.clear()
            self._waiting = None
        if len(plan.waves) > 1 or len(plan.seg_row) > slots + 1:
            return None
        wanted = {
            row: -(-rank // GRANULE)
            for row, rank in zip(plan.seg_row.tolist(), ranks.tolist(), strict=True)
            if row >= 0 and rank > 0
        }
        if sum(wanted.values()) > slots:
            return None
        for row, (first, count, known) in list(self._held.items()):
            if known != generation[row] or (row in wanted and first + count > slots):
                del self._held[row]
        missing = sorted((row for row in wanted if row not in self._held), key=lambda row: -wanted[row])
        for row in wanted:  # used last
            if row in self._held:
                self._held[row] = self._held.pop(row)
        if not self._insert(missing, wanted, generation, slots):
            self._held.clear()
            missing = sorted(wanted, key=lambda row: -wanted[row])
            self._insert(missing, wanted, generation, slots)
        where = {row: (self._held[row][0], self._held[row][0] + self._held[row][1]) for row in wanted}
        found = np.array([where.get(row, (0, 0)) for row in plan.seg_row.tolist()], dtype=np.int32).reshape(-1, 2)
        placed = Placed(found, tuple((row, self._held[row][0], wanted[row]) for row in missing))
        self._waiting = placed if missing else None
        return placed

    def launched(self, placed: Placed | None) -> None:
        """A step is on its way, with what it stages; None for one without places, which says nothing of those."""
        if placed is self._waiting:
            self._waiting = None

    def _insert(self, rows: Sequence[int], wanted: dict[int, int], generation: NDArray[np.integer], slots: int) -> bool:
        """Gives each a place of its own, that of those used least recently; False if the wanted ones leave no room."""
        for row in rows:
            count = wanted[row]
            age = {held: i for i, held in enumerate(self._held)}
            best: tuple[int, int] | None = None
            victims: list[int] = []
            for begin in range(slots - count + 1):
                there = [
                    held
                    for held, (first, size, _) in self._held.items()
                    if first < begin + count and begin < first + size
                ]
                if any(held in wanted for held in there):
                    continue
                score = (max((age[held] for held in there), default=-1), begin)
                if best is None or score < best:
                    best, victims = score, there
            if best is None:
                return False
            for held in victims:
                del self._held[held]
            self._held[row] = (best[1], count, int(generation[row]))
        return True
