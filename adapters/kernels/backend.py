"""The Triton LoRA kernels behind the runner's interface: a plan once per step, a product per site."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.arena import Arena
from adapters.kernels import ops, triton_lora
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.ops import STEP
from adapters.plan import LoraPlan, covering
from adapters.site import Site

DECODE_ENTRIES = 512
"""Plans of at most so many (token, adapter) pairs use small tiles: their time is that of reading factors."""


class TritonKernels:
    """Binds each step's plan to the arena."""

    fused = True

    def __init__(self, arena: Arena, *, overlap: bool = True) -> None:
        """overlap: LoRA runs on a side stream beside the base product."""
        self.arena = arena
        self.sites: list[Site] = []
        """Of the model, for `warm_up`."""
        STEP.tables, STEP.plan = arena, None
        # Of high priority: its kernels are short, and what follows waits for them; the base product takes what is left.
        STEP.side = torch.cuda.Stream(arena.data.device, priority=-1) if overlap and arena.data.is_cuda else None

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None:
        STEP.tables = self.arena
        if plan is None:
            STEP.plan = None
            return
        # float32 has no tensor cores to fill, and its larger tiles spill registers.
        small = len(plan.tokens) <= DECODE_ENTRIES or self.arena.data.element_size() == 4
        plan = covering(plan, tokens)
        ranks = self.ranks(plan)
        STEP.plan = DevicePlan.from_plan(
            plan, int(ranks.max(initial=1)), self.arena.data.device, 16 if small else 64, covers=True, ranks=ranks
        )

    def use(self, plan: DevicePlan | None) -> None:
        """A plan that lies on the device already (a CUDA graph's own)."""
        STEP.tables, STEP.plan = self.arena, plan

    def warm_up(self, plan: DevicePlan, tokens: int) -> None:
        """Launches the kernels of every kind of site once, so that they are compiled and loaded."""
        kinds = {(site.in_features, site.widths): site for site in self.sites}
        for site in kinds.values():
            x, y = (self.arena.data.new_zeros(tokens, size) for size in (site.in_features, site.out_features))
            targets = triton_lora.target_tensor(site.targets, x.device)
            partials = triton_lora.shrink(x, targets, plan, self.arena)
            triton_lora.expand(y, partials, targets, site.offsets, site.widths, plan, self.arena, add=not plan.covers)

    def ranks(self, plan: LoraPlan) -> NDArray[np.int32]:
        """[segments] the largest rank that each segment's row has in any target; 0 without an adapter."""
        return np.where(plan.seg_row < 0, 0, self.arena.largest[plan.seg_row])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, site: Site) -> Tensor:
        """Base product and deltas beside each other; their sum is left to the compiler, which folds it into the
        kernel that reads the result anyway."""
        y, delta = ops.lora_linear(x, weight, bias, targets, list(site.offsets), list(site.widths))
        return y + delta

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None:
        if STEP.plan is not None:
            triton_lora.apply(y, x, site, STEP.plan, self.arena)
