"""Executes one scheduled batch on the device: arrays, forward pass, sampling. Knows nothing of queues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from adapters import layers
from adapters.arena import Arena
from adapters.kernels import reference
from adapters.plan import LoraPlan, build_plan, order_by_adapter, ranges
from adapters.site import Site
from service.engine import draw, sampler
from service.engine.attention import Attention, Current, StepLayout, attach
from service.engine.core import Collect
from service.engine.errors import EngineError
from service.engine.model import LoadedModel
from service.engine.request import PENDING, Batch, Sampled, Scheduled, Sequence
from service.engine.transfer import column, fill_pending, to_device

if TYPE_CHECKING:  # it imports Triton, which torch for CPU does not bring
    from service.engine.graphs import StepGraphs


_NO_RULES = np.empty((0, draw.WIDTH), dtype=np.int32)


class LoraKernels(Protocol):
    """What the runner needs of an implementation of the LoRA products; see layers.LoraHook."""

    fused: bool

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None: ...

    def apply(self, y: Tensor, x: Tensor, site: Site) -> None: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, site: Site) -> Tensor: ...


class ReferenceKernels:
    """adapters/kernels/reference.py behind the runner's interface."""

    fused = False

    def __init__(self, arena: Arena, in_features: list[int], out_features: list[int]) -> None:
        self._arena = arena
        self._views = reference.ViewCache(arena, in_features, out_features)
        self._plan: reference.PreparedPlan | None = None

    def begin_step(self, plan: LoraPlan | None, tokens: int) -> None:
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
        self._kernels = kernels
        self.page_size = page_size
        self.hook = _Hook(kernels)
        self.sites = layers.install(loaded.model, loaded.manifest, self.hook, fuse=fuse)
        self.graphs: StepGraphs | None = None
        """Set once captured."""
        self._drawn = torch.empty(0, dtype=torch.int64, device=loaded.device)
        """The tokens of the last launch."""
        self._row_of: dict[Sequence, int] = {}
        """Where in them a sequence's lies."""
        self._pages_of: dict[Sequence, tuple[list[int], NDArray[np.int32]]] = {}
        """Of the sequences of the last step, as an array: pages change once in page_size tokens."""
        attach(loaded.attention_modules, loaded.shapes, attention)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Collect:
        """Queues the batch on the device. What is returned waits for it: one result per item, None for one that does
        not sample. Tokens that the launch before has drawn need not be known here: they are taken where they lie."""
        order = self._order(batch.items)
        items = [batch.items[i] for i in order]
        plan = build_plan(_spans(items))
        layout = self._layout(items)
        ids, positions = self._tokens(items)
        wanted = _wanted_rows(items)
        tokens = np.asarray(wanted.tokens, dtype=np.int64)
        seqs = [items[i].seq for i in wanted.samples]
        rules = draw.rules(seqs)
        logits, known = self._compute(ids, positions, layout, plan, tokens, None if wanted.prompts else rules)
        told = [
            (items[i].seq, sampler.prompt_logprobs(logits[row : row + len(following)], following, alternatives))
            for i, row, following, alternatives in wanted.prompts
        ]
        if told:
            logits = logits[column(wanted.rows, torch.int64, self._device)]
        before, row_of = self._drawn, self._row_of
        drawn = sampler.sample(
            logits, seqs, rules, self._draw, known, lambda i: before[row_of[seqs[i]] : row_of[seqs[i]] + 1]
        )
        self._drawn, self._row_of = drawn.tokens, {seq: row for row, seq in enumerate(seqs)}
        places = [order[i] for i in wanted.samples]

        def collect() -> list[Sampled | None]:
            for seq, parts in told:
                if seq.prompt_logprobs is not None:
                    seq.prompt_logprobs += [entry for part in parts for entry in part.read()]
            results: list[Sampled | None] = [None] * len(items)
            for place, result in zip(places, drawn.read(), strict=True):
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
        self._kernels.begin_step(plan, len(ids))
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

    def _order(self, items: list[Scheduled]) -> list[int]:
        """Decoding sequences first (attention treats them together), and neighbours share adapters."""
        by_adapter = order_by_adapter([item.seq.rows for item in items])
        return sorted(by_adapter, key=lambda i: items[i].count > 1)

    def _tokens(self, items: list[Scheduled]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids, positions) of the step's tokens. A token that is pending has an id that says where it lies."""
        ids: list[int] = []
        for item in items:
            seq, begin, end = item.seq, item.seq.num_computed, item.seq.num_computed + item.count
            ids += seq.tokens[begin:end]
            if ids[-1] == PENDING:
                ids[-1] = -1 - self._row_of[seq]
        begins = np.array([item.seq.num_computed for item in items], dtype=np.int64)
        return np.array(ids, dtype=np.int64), ranges(begins, [item.count for item in items])

    def _layout(self, items: list[Scheduled]) -> StepLayout:
        size = self.page_size
        counts = np.array([item.count for item in items], dtype=np.int32)
        contexts = np.array([item.seq.num_computed for item in items], dtype=np.int32) + counts
        table = np.zeros((len(items), int(-(-contexts.max() // size))), dtype=np.int32)
        known, self._pages_of = self._pages_of, {}
        for s, item in enumerate(items):
            seq = item.seq
            pages = known.get(seq)
            if pages is None or pages[0] != seq.pages:
                pages = list(seq.pages), np.array(seq.pages, dtype=np.int32)
            self._pages_of[seq] = pages
            row = pages[1][: table.shape[1]]
            table[s, : len(row)] = row
        positions = ranges((contexts - counts).astype(np.int64), counts)
        owner = np.repeat(np.arange(len(items)), counts)
        return StepLayout(
            slots=table[owner, positions // size].astype(np.int64) * size + positions % size,
            query_lens=counts,
            context_lens=contexts,
            page_table=table,
            num_decode=int((counts == 1).sum()),
        )


def _spans(items: list[Scheduled]) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
    spans, start = [], 0
    for item in items:
        spans.append((start, item.count, item.seq.rows))
        start += item.count
    return spans


@dataclass(slots=True)
class _Wanted:
    """Which tokens of a step need logits: only where a token is drawn or a prompt's log-probabilities are asked."""

    tokens: list[int] = field(default_factory=list)
    """Index in the step, by row of logits."""
    samples: list[int] = field(default_factory=list)
    """Items that draw a token."""
    rows: list[int] = field(default_factory=list)
    """Their rows."""
    prompts: list[tuple[int, int, list[int], int]] = field(default_factory=list)
    """(item, first row, the tokens that follow those of the rows, alternatives)"""


def _wanted_rows(items: list[Scheduled]) -> _Wanted:
    wanted, start = _Wanted(), 0
    for i, item in enumerate(items):
        seq = item.seq
        if seq.prompt_logprobs is not None:
            # Row of token t predicts token t + 1. A recomputed sequence has some already; what the step in flight will
            # bring is all before num_computed.
            first = max(seq.num_computed, len(seq.prompt_logprobs) - 1)
            last = min(seq.num_computed + item.count, seq.num_prompt - 1)
            if first < last:
                following = seq.tokens[first + 1 : last + 1]
                wanted.prompts.append((i, len(wanted.tokens), following, seq.sampling.prompt_logprobs or 0))
                wanted.tokens += range(start + first - seq.num_computed, start + last - seq.num_computed)
        if item.samples:
            wanted.samples.append(i)
            wanted.rows.append(len(wanted.tokens))
            wanted.tokens.append(start + item.count - 1)
        start += item.count
    return wanted
