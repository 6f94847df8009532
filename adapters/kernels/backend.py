"""The Triton LoRA kernels behind the runner's interface: a plan once per step, a product per site."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from adapters.arena import Arena
from adapters.kernels import one_row, ops, shares, triton_lora, triton_tail
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.ops import STEP
from adapters.kernels.side import Side
from adapters.kernels.tail import GRANULE, SLOTS, Placed, Tail
from adapters.kernels.tail_plan import TailPlan
from adapters.layers import LoraLinear
from adapters.plan import LoraPlan, covering, parted
from adapters.site import Site

DECODE_ENTRIES = 512
"""Plans of at most so many (token, adapter) pairs use small tiles: their time is that of reading factors."""
LARGE_SEGMENTS = 48
"""From so many tokens an adapter on, it stands in the tails, or a step with prompts uses large LoRA tiles."""
EARLY_TOKENS = 32
"""Steps of up to so many tokens start their kernels early if they have adapters: that takes 2% off with 4 to 16
sequences, 0.7 with 32. Those of the base take up to 1% longer so, but for a single token's (H200,
benchmarks/RESULTS.md)."""
TAIL_TOKENS = 64
"""Steps of so many tokens use the tails: in smaller ones what they add to the base product, and behind it, costs more
than LoRA beside it (benchmarks/RESULTS.md)."""


def many_tokens_each(plan: LoraPlan) -> bool:
    """Whether its adapters have many tokens each."""
    return len(plan.tokens) >= LARGE_SEGMENTS * len(plan.seg_row)


class TritonKernels:
    """Binds each step's plan to the arena."""

    fused = True

    def __init__(self, arena: Arena, *, overlap: bool = True, tails: bool = False, uniform: bool = False) -> None:
        """overlap: LoRA runs on a side stream beside the base product, where that does not do its share. tails: where
        many tokens share few adapters, it does (tail.py). uniform: the base products of every step are the library's,
        computed in one way; else a step of one token has those of one_row.py, and one with LoRA may leave
        multiprocessors free (side.py)."""
        self.arena = arena
        self._installed: list[LoraLinear] = []
        """In the model, for `warm_up`."""
        self.tails = tails
        """May be switched off for a time."""
        self.tailed = False
        """The step's adapters stand in the tails: read while layers are traced."""
        self._uniform = uniform
        self.one_row = False
        """The step is one token, and computed as one_row.py does: read while layers are traced."""
        self.starts_early = False
        """The compiler's kernels and attention start early in this step (early.py)."""
        STEP.tables, STEP.plan, STEP.tail_plan, STEP.tails = arena, None, None, None
        STEP.side = None
        if overlap and arena.data.is_cuda:
            half = arena.data.element_size() == 2
            STEP.side = Side(arena.data.device, leave_free=half and not uniform)

    def bind(self, installed: list[LoraLinear], targets: int) -> None:
        """The layers that will use it; targets: number of all target indices."""
        self._installed = installed
        if self.tails:
            sites = [(layer.site, layer.tail) for layer in installed if layer.tail is not None]
            STEP.tails = triton_tail.Tails(sites, targets, self.arena.data.device)

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None:
        if plan is None:
            self.use(None, None, tokens)
            return
        part, rest = self.parted(plan, tokens)
        placed = None if part is None else self.place(part)
        if placed is None:
            self.use(self._beside(plan, covered=tokens), None, tokens)
            return
        tail = TailPlan.from_plan(part, placed, tokens, self.arena.data.device, beside=rest)
        self.use(None if rest is None else self._beside(rest), tail, tokens)
        self.stage()
        self.launched(placed)

    def _beside(self, plan: LoraPlan, covered: int = 0) -> DevicePlan:
        """covered: tokens that the plan is to cover."""
        # float32 has no tensor cores to fill, and its larger tiles spill registers.
        small = len(plan.tokens) <= DECODE_ENTRIES or self.arena.data.element_size() == 4
        if covered:
            plan = covering(plan, covered)
        ranks, device = self.ranks(plan), self.arena.data.device
        return DevicePlan.from_plan(
            plan, int(ranks.max(initial=1)), device, 16 if small else 64, covers=bool(covered), ranks=ranks
        )

    def use(self, beside: DevicePlan | None, tail: TailPlan | None, tokens: int) -> None:
        """Plans that lie on the device already (a CUDA graph's own), for steps of so many tokens."""
        STEP.tables, STEP.plan, STEP.tail_plan = self.arena, beside, tail
        self.tailed = tail is not None
        self.one_row = tokens == 1 and not self._uniform
        few = beside is not None and tail is None and tokens <= EARLY_TOKENS and not self._uniform
        self.starts_early = self.one_row or few

    def parted(self, plan: LoraPlan, tokens: int) -> tuple[LoraPlan | None, LoraPlan | None]:
        """The adapters that are to stand in the tails, as many as have room there and those with most tokens first, and
        the others; either may be None."""
        if STEP.tails is None or not self.tails or tokens < TAIL_TOKENS:
            return None, plan
        last = plan.waves[0][1]
        starts, end = plan.seg_start[:last], plan.seg_start[last]
        alone = np.ones(end, dtype=bool)
        if end < len(plan.tokens):  # mixes are no tail's
            mixed = np.zeros(tokens, dtype=bool)
            mixed[plan.tokens[end:]] = True
            alone = ~mixed[plan.tokens[:end]]
        counts = np.add.reduceat(alone, starts, dtype=np.int32)
        slots = -(-self.ranks(plan)[:last] // GRANULE)
        fit = (counts >= LARGE_SEGMENTS) & (slots > 0) & (slots <= SLOTS)
        stand, room = np.zeros(last, dtype=bool), SLOTS
        for segment in sorted(np.flatnonzero(fit).tolist(), key=lambda segment: -counts[segment]):
            if slots[segment] <= room:
                stand[segment] = True
                room -= slots[segment]
        chosen = np.zeros(len(plan.tokens), dtype=bool)
        if stand.any():
            chosen[:end] = alone & np.repeat(stand, np.diff(plan.seg_start[: last + 1]))
        return parted(plan, chosen)

    def place(self, plan: LoraPlan, slots: int = SLOTS) -> Placed | None:
        """Where the plan's adapters stand in the first `slots` of the tails; None if they cannot. `launched` is told
        once the step is on its way."""
        if STEP.tails is None or not self.tails:
            return None
        return STEP.tails.slots.place(plan, self.ranks(plan), self.arena.generation, slots)

    def launched(self, placed: Placed | None) -> None:
        """A step with these places, or without any, is on its way: the device will have what it stages."""
        if STEP.tails:
            STEP.tails.slots.launched(placed)

    def stage(self) -> None:
        """Copies to the tails what the step's plan lists; before its first product."""
        if STEP.tails and STEP.tail_plan:
            STEP.tails.stage(STEP.tail_plan, self.arena)

    def share_out(self, sizes: Iterable[shares.Size], stream: torch.cuda.Stream, folder: Path | None) -> None:
        """Measures what products of such sizes leave to LoRA; folder: where that is kept."""
        if STEP.side:
            shares.settle(STEP.side, self.arena, self._installed, sizes, stream, folder)

    def warm_up(self, beside: DevicePlan | None, tail: TailPlan | None, tokens: int) -> None:
        """Launches the kernels of every kind of site once, as `linear` and `gated` will, so that they are compiled and
        loaded, for plans that are in use and empty."""
        if tail is not None and STEP.tails:
            STEP.tails.stage(tail, self.arena)
        kinds: dict[object, LoraLinear] = {}
        for layer in self._installed:
            site = layer.site
            kinds[site.in_features, site.widths, layer.gate, layer.bias is None, layer.onto] = layer
        for layer in kinds.values():
            site = layer.site
            targets = triton_lora.target_tensor(site.targets, self.arena.data.device)
            x = self.arena.data.new_zeros(tokens, site.in_features)
            if tail is not None and layer.tail is not None and layer.gate is not None:
                self.gated(x, layer.tail, targets, layer.gate)
            elif tail is not None or (self.one_row and one_row.fits(site)):
                residual = x.new_zeros(tokens, site.out_features) if layer.onto else None
                self.linear(x, cast(Tensor, layer.weight), layer.tail, layer.bias, targets, site, residual)
            elif beside is not None:
                y = x.new_zeros(tokens, site.out_features)
                add = not beside.covers
                triton_lora.deltas(y, x, targets, site.offsets, site.widths, beside, self.arena, add=add)

    def ranks(self, plan: LoraPlan) -> NDArray[np.int32]:
        """[segments] the largest rank that each segment's row has in any target; 0 without an adapter."""
        return np.where(plan.seg_row < 0, 0, self.arena.largest[plan.seg_row])

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        tail: Tail | None,
        bias: Tensor | None,
        targets: Tensor,
        site: Site,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Base product and deltas beside each other; their sum is left to the compiler, which folds it into the
        kernel that reads the result anyway. Or the product that does their share, with the tails; or the kernels of
        one_row.py."""
        offsets, widths = list(site.offsets), list(site.widths)
        if self.tailed and tail is not None:
            return ops.tail_linear(x, *tail, targets, offsets, widths, residual)[:, : site.out_features]
        if self.one_row and one_row.fits(site):
            return ops.one_row_linear(x, weight, bias, targets, offsets, widths, residual)
        y, delta = ops.lora_linear(x, weight, bias, targets, offsets, widths)
        return y + delta if residual is None else residual + (y + delta)

    def gated(self, x: Tensor, tail: Tail, targets: Tensor, gate: str) -> Tensor:
        return ops.tail_gated(x, *tail, targets, gate)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        # The output layer sees only the tokens whose logits are wanted: in a step of one token perhaps none.
        if self.one_row and x.shape[0] == 1:
            return ops.one_row_product(x, weight, bias, residual)
        if residual is None:
            return functional.linear(x, weight, bias)
        if bias is not None:
            residual = residual + bias
        ops.add_product(residual, x, weight)
        return residual

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None:
        if STEP.plan is not None:
            triton_lora.apply(y, x, site, STEP.plan, self.arena)
