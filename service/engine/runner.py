"""Executes one scheduled batch on the device: arrays, forward pass, sampling. Knows nothing of queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from adapters import layers
from adapters.arena import Arena
from adapters.kernels import reference
from adapters.plan import LoraPlan, build_plan, order_by_adapter
from adapters.site import Site
from service.engine import sampler
from service.engine.attention import Attention, Current, StepLayout, attach
from service.engine.model import LoadedModel
from service.engine.request import Batch, Sampled, Scheduled

if TYPE_CHECKING:  # it imports Triton, which torch for CPU does not bring
    from service.engine.graphs import DecodeGraphs


class LoraKernels(Protocol):
    """What the runner needs of an implementation of the LoRA products; see layers.LoraHook."""

    fused: bool

    def begin_step(self, plan: LoraPlan | None) -> None: ...

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, site: Site) -> Tensor: ...


class ReferenceKernels:
    """adapters/kernels/reference.py behind the runner's interface."""

    fused = False

    def __init__(self, arena: Arena, in_features: list[int], out_features: list[int]) -> None:
        self._arena = arena
        self._views = reference.ViewCache(arena, in_features, out_features)
        self._plan: reference.PreparedPlan | None = None

    def begin_step(self, plan: LoraPlan | None) -> None:
        self._plan = None if plan is None else reference.PreparedPlan(plan, self._arena, self._views)

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None:
        if self._plan is not None:
            reference.apply(y, x, site, self._plan)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, site: Site) -> Tensor:
        y = functional.linear(x, weight, bias)
        self.apply(y, x, site)
        return y


class _Hook:
    def __init__(self, kernels: LoraKernels) -> None:
        self.kernels = kernels
        self.fused = kernels.fused
        self.active = False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, site: Site) -> Tensor:
        return self.kernels.linear(x, weight, bias, targets, site)

    def __call__(self, y: Tensor, x: Tensor, site: Site) -> None:
        self.kernels.apply(y, x, site)


class Runner:
    """The model with its LoRA layers and its KV cache.

    `execute` reads its sequences and changes none of them, but for appending prompt log-probabilities."""

    def __init__(
        self, loaded: LoadedModel, attention: Attention, kernels: LoraKernels, page_size: int, *, fuse: bool = True
    ) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._attention = attention
        self._kernels = kernels
        self.page_size = page_size
        self.hook = _Hook(kernels)
        self.sites = layers.install(loaded.model, loaded.manifest, self.hook, fuse=fuse)
        self.graphs: DecodeGraphs | None = None
        """Set once captured."""
        attach(loaded.attention_modules, loaded.shapes, attention)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[Sampled | None]:
        """Runs the batch; one result per item, None for an item that does not sample."""
        order = self._order(batch.items)
        items = [batch.items[i] for i in order]
        plan = build_plan(_spans(items))
        layout = self._layout(items)
        ids, positions = _tokens(items)
        results: list[Sampled | None] = [None] * len(items)
        if self.graphs is not None and layout.num_decode == len(items) and all(item.samples for item in items):
            done = self.graphs.run(ids, positions, layout, plan)
            if done is not None:
                for i, sampled in enumerate(sampler.sample(done[0], [item.seq for item in items], done[1])):
                    results[order[i]] = sampled
                return results
        wanted, finish = _wanted_rows(items)
        for i, sampled in finish(self.forward(ids, positions, layout, plan, wanted)).items():
            results[order[i]] = sampled
        return results

    @torch.inference_mode()
    def forward(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        layout: StepLayout,
        plan: LoraPlan | None,
        wanted: NDArray[np.int64],
    ) -> Tensor:
        """One step through the model: logits [wanted, vocabulary] of the token indices `wanted`."""
        Current.backend = self._attention
        self._attention.begin_step(layout)
        self._kernels.begin_step(plan)
        self.hook.active = plan is not None
        ids_, positions_, wanted_ = (
            torch.from_numpy(array).to(self._device, non_blocking=True) for array in (ids, positions, wanted)
        )
        return self.logits(ids_, positions_, wanted_)

    def logits(self, ids: Tensor, positions: Tensor, wanted: Tensor | None) -> Tensor:
        """The bare model on device tensors, all [T]; `wanted` None: every token's logits."""
        return self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if wanted is None else wanted,
        ).logits[0]

    def _order(self, items: list[Scheduled]) -> list[int]:
        """Decoding sequences first (attention treats them together), and neighbours share adapters."""
        by_adapter = order_by_adapter([item.seq.rows for item in items])
        return sorted(by_adapter, key=lambda i: items[i].count > 1)

    def _layout(self, items: list[Scheduled]) -> StepLayout:
        size = self.page_size
        contexts = np.array([item.seq.num_computed + item.count for item in items], dtype=np.int32)
        table = np.zeros((len(items), int(-(-contexts.max() // size))), dtype=np.int32)
        slots = []
        for s, item in enumerate(items):
            used = -(-int(contexts[s]) // size)
            table[s, :used] = item.seq.pages[:used]
            position = np.arange(item.seq.num_computed, contexts[s])
            slots.append(table[s, position // size].astype(np.int64) * size + position % size)
        return StepLayout(
            slots=np.concatenate(slots),
            query_lens=np.array([item.count for item in items], dtype=np.int32),
            context_lens=contexts,
            page_table=table,
            num_decode=sum(item.count == 1 for item in items),
        )


def _spans(items: list[Scheduled]) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
    spans, start = [], 0
    for item in items:
        spans.append((start, item.count, item.seq.rows))
        start += item.count
    return spans


def _tokens(items: list[Scheduled]) -> tuple[np.ndarray, np.ndarray]:
    ids, positions = [], []
    for item in items:
        begin, end = item.seq.num_computed, item.seq.num_computed + item.count
        ids.append(np.asarray(item.seq.tokens[begin:end], dtype=np.int64))
        positions.append(np.arange(begin, end, dtype=np.int64))
    return np.concatenate(ids), np.concatenate(positions)


def _wanted_rows(items: list[Scheduled]) -> tuple[np.ndarray, Callable[[Tensor], dict[int, Sampled]]]:
    """Which token positions of the step need logits, and what to do with them: logits are computed only where a
    token is drawn or a prompt's log-probabilities are asked."""
    rows: list[int] = []
    prompts: list[tuple[int, int, int]] = []
    samples: list[tuple[int, int]] = []
    start = 0
    for i, item in enumerate(items):
        seq = item.seq
        if seq.prompt_logprobs is not None:
            # Row of token t predicts token t + 1; a recomputed sequence has some already.
            first = max(seq.num_computed, len(seq.prompt_logprobs) - 1)
            last = min(seq.num_computed + item.count, seq.num_prompt - 1)
            if first < last:
                prompts.append((i, len(rows), last - first))
                rows += range(start + first - seq.num_computed, start + last - seq.num_computed)
        if item.samples:
            samples.append((i, len(rows)))
            rows.append(start + item.count - 1)
        start += item.count

    def finish(logits: Tensor) -> dict[int, Sampled]:
        for i, row, count in prompts:
            seq = items[i].seq
            known = seq.prompt_logprobs
            if known is None:
                continue
            following = seq.tokens[len(known) : len(known) + count]
            alternatives = seq.sampling.prompt_logprobs or 0
            known += sampler.prompt_logprobs(logits[row : row + count], following, alternatives)
        drawn = sampler.sample(logits[[row for _, row in samples]], [items[i].seq for i, _ in samples])
        return {i: sampled for (i, _), sampled in zip(samples, drawn, strict=True)}

    return np.asarray(rows, dtype=np.int64), finish
