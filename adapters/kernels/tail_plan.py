"""The batch plan of a step whose adapters stand in the tails (tail.py), as the GPU kernels read it.

A token has one such adapter or none, and its place says which slots that has, so there are no tiles and no segments: a
kernel takes any rows of a product. Other tokens of the step may have adapters whose deltas are computed beside the
product (device_plan.py). int32 arrays in one buffer, at places that the shape alone decides, for CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.device_plan import PlanSizeError, laid_out, length
from adapters.kernels.tail import SLOTS, Placed
from adapters.plan import LoraPlan

ENDS = 16
"""A token's place is its adapter's first slot plus ENDS times the slot behind its last; 0 without an adapter."""
BESIDE = -1
"""The place of a token whose deltas are computed beside the product."""
TILE = 32
"""Tokens, one behind the other, of which a kernel can ask at once what there is to do: a tell, the first slot that any
of them has, plus ENDS times the slot behind the last, plus ENDS² if none has any, or some have deltas from beside."""
STAGED = 3
"""Numbers that say what is to be staged: arena row, first slot, number of slots."""


@dataclass(frozen=True)
class TailShape:
    """What a plan has room for."""

    tokens: int
    slots: int
    """Its adapters stand in the first ones."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 1 <= self.slots <= SLOTS:
            raise ValueError(f"{self}: expected 1 or more tokens and 1 to {SLOTS} slots")

    @cached_property
    def slices(self) -> dict[str, slice]:
        staged = 1 + STAGED * SLOTS
        return laid_out({"tells": self.tiles, "places": self.tiles * TILE, "weights": self.tokens, "staged": staged})

    @property
    def tiles(self) -> int:
        return -(-self.tokens // TILE)

    @cached_property
    def size(self) -> int:
        """Length of the buffer in int32 elements."""
        return length(self.slices)


def pack_tail(
    plan: LoraPlan | None,
    placed: Placed | None,
    shape: TailShape,
    out: NDArray[np.int32],
    beside: LoraPlan | None = None,
) -> None:
    """Writes a plan, and where its adapters stand, into out [shape.size]; None is the empty plan. beside: of the tokens
    whose deltas are computed beside the product. All others have no adapter. Raises PlanSizeError."""
    if (plan is None) != (placed is None):
        raise ValueError(f"placed: {placed} for {plan}")
    if out.shape != (shape.size,) or out.dtype != np.int32:
        raise ValueError(f"out: expected int32 [{shape.size}], found {out.dtype} {list(out.shape)}")
    part = {name: out[where] for name, where in shape.slices.items()}
    part["tells"][:] = ENDS**2
    part["places"][:] = 0
    part["staged"][0] = 0
    if beside is not None:
        if beside.tokens.max(initial=0) >= shape.tokens:
            raise PlanSizeError(f"{len(beside.tokens)} entries beside do not fit {shape}")
        part["places"][beside.tokens] = BESIDE
    if plan is None or placed is None:
        return
    if plan.tokens.max(initial=0) >= shape.tokens or placed.slots.max(initial=0) > shape.slots:
        raise PlanSizeError(f"{len(plan.tokens)} entries, in slots {placed.slots.tolist()}, do not fit {shape}")
    begins, ends = placed.slots.T
    part["places"][plan.tokens] = np.repeat(begins + ENDS * ends, np.diff(plan.seg_start))
    place = part["places"].reshape(-1, TILE)
    first = np.where(place > 0, place % ENDS, SLOTS).min(axis=1)
    slots, rest = first + place.max(axis=1) // ENDS * ENDS, np.where(place.min(axis=1) < 0, ENDS**2, 0)
    part["tells"][:] = np.where(first < SLOTS, slots + rest, ENDS**2)
    part["weights"].view(np.float32)[plan.tokens] = plan.weights
    part["staged"][0] = len(placed.staged)
    listed = np.array(placed.staged, dtype=np.int32).reshape(-1)
    part["staged"][1 : 1 + len(listed)] = listed


class TailPlan:
    """Typed views of one packed plan on the device."""

    def __init__(self, shape: TailShape, buffer: Tensor) -> None:
        """buffer: int32 [shape.size], which the caller fills with what `pack_tail` wrote."""
        if buffer.dtype != torch.int32 or buffer.numel() != shape.size:
            raise ValueError(f"buffer: expected int32 [{shape.size}], found {buffer.dtype} {list(buffer.shape)}")
        self.shape = shape
        self.buffer = buffer
        part = {name: buffer[where] for name, where in shape.slices.items()}
        self.tells = part["tells"]
        """[tiles], see TILE."""
        self.places = part["places"][: shape.tokens]
        """[tokens], see ENDS and BESIDE."""
        self.weights = part["weights"].view(torch.float32)
        """[tokens]; anything where the place is 0."""
        self.staged = part["staged"]
        """[1 + STAGED * SLOTS] how many adapters are to be staged; of each its row, first slot and number of slots."""

    @classmethod
    def from_plan(
        cls,
        plan: LoraPlan | None,
        placed: Placed | None,
        tokens: int,
        device: torch.device | str,
        slots: int = SLOTS,
        beside: LoraPlan | None = None,
    ) -> TailPlan:
        """A plan for a step of so many tokens in a buffer of its own; see `pack_tail`."""
        shape = TailShape(tokens, slots)
        host = torch.empty(shape.size, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
        pack_tail(plan, placed, shape, host.numpy(), beside)
        # A fresh pinned buffer per plan: the caching host allocator reuses it only after the copy's event.
        return cls(shape, host.to(device, non_blocking=True))
