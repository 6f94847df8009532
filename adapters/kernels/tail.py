"""Spare columns behind a base weight, in which the factors of a step's prompts lie beside it. Torch alone, no Triton.

A base weight W0 [d, k] has RANKS columns of its own for each target of its site: the tail. The B of an adapter is
copied there ("staged"), a rank to a column, in the rows of its target. Where each row of x is followed by its
s = w · scale · (x Aᵀ), in the same columns, and by zeros where a token has another adapter or none,

    [x | s] [W0 | B]ᵀ = x W0ᵀ + s Bᵀ

is one product of the library's, and no delta is ever in memory. W0's own columns are never written. The kernels are
adapters/kernels/triton_tail.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.manifest import Manifest
from adapters.plan import LoraPlan

RANKS = 64
"""Columns of each target: the ranks of all adapters that are staged at once."""
GRANULE = 16
SLOTS = RANKS // GRANULE
"""Adapters that are staged at most; one takes as many neighbouring slots as its largest rank needs."""
_ALIGN = 16


def spare(targets: int) -> int:
    """Columns of the tail of a site with so many targets."""
    return targets * RANKS


def spare_bytes(manifest: Manifest, siblings: Sequence[Sequence[str]], itemsize: int) -> int:
    """Of all tails of a model. siblings: names of projections that may share a site (layers.SHARED_INPUT)."""
    shared = {name: len(group) for group in siblings for name in group}
    linears = manifest.linears
    return sum(m.out_features * spare(shared.get(m.name.rpartition(".")[2], 1)) for m in linears) * itemsize


def can_have(in_features: Iterable[int], dtype: torch.dtype) -> bool:
    """bfloat16, as scaled s could leave float16's range, and float32 has no tensor cores to gain from; rows at
    multiples of 16 bytes."""
    return dtype == torch.bfloat16 and all(k * dtype.itemsize % _ALIGN == 0 for k in in_features)


def with_tail(parts: Sequence[Tensor]) -> Tensor:
    """A copy of weights [d_j, k] one below the other, [d, k], in memory that has room for the tail behind every row."""
    d, k = sum(len(part) for part in parts), parts[0].shape[1]
    memory = parts[0].new_zeros(d, k + spare(len(parts)))
    torch.cat(list(parts), out=memory[:, :k])
    return memory[:, :k]


def whole(weight: Tensor, targets: int) -> Tensor:
    """What `with_tail` gave, with its tail: [d, k + spare]. ValueError for a weight without one."""
    d, k = weight.shape
    width = k + spare(targets)
    if weight.stride() != (width, 1):
        raise ValueError(f"weight: strides {weight.stride()} are not those of one with a tail for {targets} targets")
    return weight.as_strided((d, width), (width, 1))


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the adapters of a plan stand in the tails."""

    columns: NDArray[np.int32]
    """[segments] first column of each segment's adapter among those of a target; 0 without one."""
    staged: tuple[tuple[int, int], ...]
    """(arena row, first column) of those that have to be copied there before."""


class Slots:
    """Which adapters are staged. The device follows in the order of steps: what was placed is either `launched` before
    anything else is placed, or its step has failed, and then nobody knows what stands there."""

    def __init__(self) -> None:
        self._waiting: Placed | None = None
        """Was to be staged, and is not known to have been launched."""
        self._held: dict[int, tuple[int, int, int]] = {}
        """Arena row -> first slot, slots, the row's generation; the one used last stands last."""

    def place(self, plan: LoraPlan, ranks: NDArray[np.integer], generation: NDArray[np.integer]) -> Placed | None:
        """None if the plan's adapters do not fit, or are mixed. ranks [segments]: the largest of each segment's adapter
        in any target; generation [arena rows]: what changes when a row gets another block."""
        if self._waiting is not None:
            self._held.clear()
            self._waiting = None
        if len(plan.waves) > 1 or len(plan.seg_row) > SLOTS + 1:
            return None
        wanted = {
            row: -(-rank // GRANULE)
            for row, rank in zip(plan.seg_row.tolist(), ranks.tolist(), strict=True)
            if row >= 0 and rank > 0
        }
        if sum(wanted.values()) > SLOTS:
            return None
        for row, (_, _, known) in list(self._held.items()):
            if known != generation[row]:
                del self._held[row]
        missing = sorted((row for row in wanted if row not in self._held), key=lambda row: -wanted[row])
        for row in wanted:  # used last
            if row in self._held:
                self._held[row] = self._held.pop(row)
        if not self._insert(missing, wanted, generation):
            self._held.clear()
            missing = sorted(wanted, key=lambda row: -wanted[row])
            self._insert(missing, wanted, generation)
        first = {row: self._held[row][0] * GRANULE for row in wanted}
        columns = np.array([first.get(row, 0) for row in plan.seg_row.tolist()], dtype=np.int32)
        placed = Placed(columns, tuple((row, first[row]) for row in missing))
        self._waiting = placed if missing else None
        return placed

    def launched(self, placed: Placed | None) -> None:
        """A step is on its way, with what it stages; None for one without places, which says nothing of those."""
        if placed is self._waiting:
            self._waiting = None

    def _insert(self, rows: Sequence[int], wanted: dict[int, int], generation: NDArray[np.integer]) -> bool:
        """Gives each a place of its own, that of those used least recently; False if the wanted ones leave no room."""
        for row in rows:
            count = wanted[row]
            age = {held: i for i, held in enumerate(self._held)}
            best: tuple[int, int] | None = None
            victims: list[int] = []
            for begin in range(SLOTS - count + 1):
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
