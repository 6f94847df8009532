"""The LoRA products in plain torch: the oracle for the Triton kernels, and the path used on CPU.

    y[t, o_j : o_j + d_j] += w · s_j · (x[t] A_jᵀ) B_j        for every (segment, token t, target j)

with A_j [r, k] and B_j [r, d_j] (that is lora_B.weight transposed), s_j = α/r or α/√r as the block says, and w the
weight of the adapter in the request (Hu et al. 2021, "LoRA"; PEFT's lora.Linear.forward states the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.arena import Arena
from adapters.plan import LoraPlan
from adapters.site import Site

Factors = tuple[Tensor, Tensor, float] | None
"""A [r, k], B [r, d], scale; None where the adapter does not target that module."""


class PreparedPlan:
    """A plan bound to the arena for one step: index tensors and block views are made once, not once per site."""

    def __init__(self, plan: LoraPlan, arena: Arena, views: ViewCache) -> None:
        self.segments: list[tuple[slice | Tensor, float | Tensor, list[Factors]]] = []
        device = arena.data.device
        for s in range(len(plan.seg_row)):
            begin, end = int(plan.seg_start[s]), int(plan.seg_start[s + 1])
            tokens, weights = plan.tokens[begin:end], plan.weights[begin:end]
            first, last = int(tokens[0]), int(tokens[-1])
            where: slice | Tensor
            if last - first + 1 == end - begin and (tokens[1:] > tokens[:-1]).all():
                where = slice(first, last + 1)
            else:
                where = torch.from_numpy(tokens.astype("int64")).to(device)
            weight: float | Tensor = float(weights[0])
            if (weights != weights[0]).any():
                weight = torch.from_numpy(weights).to(device=device, dtype=arena.data.dtype)[:, None]
            self.segments.append((where, weight, views.row(int(plan.seg_row[s]))))


class ViewCache:
    """Views of each resident block's A and B, by row. Making a view costs microseconds, and a step needs
    two per target and adapter; a row's views stay valid until its table entry changes."""

    def __init__(self, arena: Arena, in_features: list[int], out_features: list[int]) -> None:
        self._arena = arena
        self._shapes = list(zip(in_features, out_features, strict=True))
        self._rows: dict[int, tuple[tuple[int, int], list[Factors]]] = {}

    def row(self, row: int) -> list[Factors]:
        arena = self._arena
        stamp = (int(arena.generation[row]), int(arena.offsets_np[row].max(initial=0)))
        known = self._rows.get(row)
        if known is not None and known[0] == stamp:
            return known[1]
        factors: list[Factors] = []
        for target, (k, d) in enumerate(self._shapes):
            r = int(arena.ranks_np[row, target])
            if r == 0:
                factors.append(None)
                continue
            a, b = (int(v) for v in arena.offsets_np[row, target])
            factors.append(
                (
                    arena.data[a : a + r * k].view(r, k),
                    arena.data[b : b + r * d].view(r, d),
                    float(arena.scales_np[row, target]),
                )
            )
        self._rows[row] = (stamp, factors)
        return factors


def apply(y: Tensor, x: Tensor, site: Site, plan: PreparedPlan) -> None:
    """Adds every segment's delta to y [T, out_features] in place; x is [T, in_features], same dtype."""
    for where, weight, factors in plan.segments:
        xs: Tensor | None = None
        for target, offset, width in zip(site.targets, site.offsets, site.widths, strict=True):
            factor = factors[target]
            if factor is None:
                continue
            a, b, scale = factor
            if xs is None:
                xs = x[where]
            h = torch.mm(xs, a.t())
            if isinstance(weight, Tensor):
                h, alpha = h * weight, scale
            else:
                alpha = scale * weight
            if isinstance(where, slice):
                y[where, offset : offset + width].addmm_(h, b, alpha=alpha)
            else:
                y[:, offset : offset + width].index_add_(0, where, torch.mm(h, b), alpha=alpha)
