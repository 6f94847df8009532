"""Executes one scheduled batch on the device: forward pass, sampling. Knows nothing of queues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from adapters import layers
from adapters.arena import Arena
from adapters.kernels import reference
from adapters.kernels.tail import Tail
from adapters.layers import LoraLinear, LoraProducts
from adapters.plan import LoraPlan
from adapters.site import Site
from service.engine import draw, sampler
from service.engine.attention import Attention, Current, StepLayout, attach
from service.engine.core import Collect
from service.engine.errors import EngineError
from service.engine.lineup import Lineup
from service.engine.model import LoadedModel
from service.engine.request import Batch, Sampled, Sequence
from service.engine.sampler import Sampling
from service.engine.step_inputs import StepInputs
from service.engine.transfer import column, fill_pending, to_device

if TYPE_CHECKING:  # it imports Triton, which torch for CPU does not bring
    from service.engine.graphs import StepGraphs


_NO_RULES = np.empty((0, draw.WIDTH), dtype=np.int32)


class LoraKernels(LoraProducts, Protocol):
    """What the runner needs of an implementation of the LoRA products."""

    tails: bool
    """It wants weights with spare rows (adapters/kernels/tail.py)."""
    starts_early: bool
    """The compiler's kernels and attention start early in the current step (adapters/kernels/early.py)."""

    def bind(self, installed: list[LoraLinear], targets: int) -> None:
        """The layers that will use it; targets: number of all target indices."""

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None: ...

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None: ...


class ReferenceKernels:
    """adapters/kernels/reference.py behind the runner's interface."""

    fused = False
    tails = False
    tailed = False
    starts_early = False

    def __init__(self, arena: Arena, in_features: list[int], out_features: list[int]) -> None:
        self._arena = arena
        self._views = reference.ViewCache(arena, in_features, out_features)
        self._plan: reference.PreparedPlan | None = None

    def bind(self, installed: list[LoraLinear], targets: int) -> None:
        """Nothing to prepare."""

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None:
        self._plan = None if plan is None else reference.PreparedPlan(plan, self._arena, self._views)

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None:
        if self._plan is not None:
            reference.apply(y, x, site, self._plan)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias) if residual is None else residual + functional.linear(x, weight, bias)

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
        y = self.product(x, weight, bias, residual)
        self.apply(y, x, site)
        return y

    def gated(self, x: Tensor, tail: Tail, targets: Tensor, gate: str) -> Tensor:
        raise NotImplementedError("gated: there are no tails")


class _Hook:
    def __init__(self, kernels: LoraKernels) -> None:
        self.kernels = kernels
        self.fused = kernels.fused
        self.active = False

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return self.kernels.product(x, weight, bias, residual)

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
        return self.kernels.linear(x, weight, tail, bias, targets, site, residual)

    @property
    def tailed(self) -> bool:
        return self.kernels.tailed

    def gated(self, x: Tensor, tail: Tail, targets: Tensor, gate: str) -> Tensor:
        return self.kernels.gated(x, tail, targets, gate)

    def __call__(self, y: Tensor, x: Tensor, site: Site) -> None:
        self.kernels.apply(y, x, site)


class Runner:
    """The model with its LoRA layers and its KV cache.

    `launch` reads its sequences and changes none of them; what it returns appends prompt log-probabilities."""

    def __init__(
        self,
        loaded: LoadedModel,
        attention: Attention,
        kernels: LoraKernels,
        page_size: int,
        *,
        draw: draw.Draw = draw.draw,
        fuse: bool = True,
        ahead: bool | None = None,
    ) -> None:
        """ahead: launch steps before those before them are collected; by default where the device works beside the
        host."""
        self._draw = draw
        self.ahead = loaded.device.type == "cuda" if ahead is None else ahead
        self._model = loaded.model
        self._device = loaded.device
        self._attention = attention
        self.kernels = kernels
        self.page_size = page_size
        self.hook = _Hook(kernels)
        installed = layers.install(
            loaded.model,
            loaded.manifest,
            self.hook,
            fuse=fuse,
            tails=kernels.tails,
        )
        self.sites = [layer.site for layer in installed]
        kernels.bind(installed, len(loaded.manifest.linears))
        self.graphs: StepGraphs | None = None
        """Set once captured."""
        self._drawn = torch.empty(0, dtype=torch.int64, device=loaded.device)
        """The tokens of the last launch."""
        self._row_of: dict[Sequence, int] = {}
        """Where in them a sequence's lies."""
        self._inputs = StepInputs(page_size)
        self._lineup: Lineup | None = None
        """Of the last step."""
        self._sampling = Sampling([])
        """Its."""
        attach(loaded.attention_modules, loaded.shapes, attention)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Collect:
        """Queues the batch on the device. What is returned waits for it: one result per item, None for one that does
        not sample. Tokens that the launch before has drawn need not be known here: they are taken where they lie."""
        lineup, ids, positions, layout = self._inputs.build(batch.items, self._row_of)
        if lineup is not self._lineup:
            self._lineup, self._sampling = lineup, Sampling(lineup.drawing, self._sampling)
        wanted, sampling = lineup.wanted, self._sampling
        rules = sampling.rules()
        logits, known = self._compute(
            ids, positions, layout, lineup.plan, wanted.tokens, None if wanted.prompts else rules
        )
        told = [
            (seq, sampler.prompt_logprobs(logits[row : row + len(following)], following, alternatives))
            for seq, row, following, alternatives in wanted.prompts
        ]
        if told:
            logits = logits[column(list(wanted.rows), torch.int64, self._device)]
        before, row_of, seqs = self._drawn, self._row_of, lineup.drawing
        drawn = sampler.sample(
            logits, sampling, rules, self._draw, known, lambda i: before[row_of[seqs[i]] : row_of[seqs[i]] + 1]
        )
        self._drawn, self._row_of = drawn.tokens, lineup.row_of

        def collect() -> list[Sampled | None]:
            for seq, parts in told:
                if seq.prompt_logprobs is not None:
                    seq.prompt_logprobs += [entry for part in parts for entry in part.read()]
            results: list[Sampled | None] = [None] * len(lineup.seqs)
            for place, result in zip(lineup.places, drawn.read(), strict=True):
                results[place] = result
            return results

        return collect

    def _compute(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        layout: StepLayout,
        plan: LoraPlan | None,
        wanted: NDArray[np.int64],
        rules: NDArray[np.int32] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, and the tokens drawn from them where a graph did that). rules: of all tokens wanted, or None."""
        graphs = self.graphs
        if graphs is not None and (rules is not None or graphs.deterministic):
            found = graphs.run(ids, positions, layout, plan, wanted, _NO_RULES if rules is None else rules, self._drawn)
            if found is not None:
                return found[0], None if rules is None else found[1]
            if graphs.deterministic:
                raise EngineError(f"no graph for {len(ids)} tokens of {len(layout.context_lens)} sequences")
        return self.forward(ids, positions, layout, plan, wanted), None

    @torch.inference_mode()
    def forward(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        layout: StepLayout,
        plan: LoraPlan | None,
        wanted: NDArray[np.int64],
    ) -> Tensor:
        """One step through the model: logits [wanted, vocabulary] of the token indices `wanted`. An id of -1 - i stands
        for the i-th token that the launch before has drawn."""
        Current.backend = self._attention
        self._attention.begin_step(layout)
        self.kernels.begin_step(plan, len(ids))
        self.hook.active = plan is not None
        ids_, positions_, wanted_ = (to_device(array, self._device) for array in (ids, positions, wanted))
        if ids.min(initial=0) < 0:
            fill_pending(ids_, self._drawn)
        return self.logits(ids_, positions_, wanted_)

    def logits(self, ids: Tensor, positions: Tensor, wanted: Tensor | None) -> Tensor:
        """The bare model on device tensors, all [T]; `wanted` None: every token's logits."""
        return self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if wanted is None else wanted,
        ).logits[0]
