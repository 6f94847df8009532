"""Set-ups of benchmarks/kernels.py: kernels on the shapes of Llama-3.1-8B, over more memory than the caches hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.kernels import one_row, triton_lora, triton_tail
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.tail import SLOTS, with_tail
from adapters.kernels.tail_plan import TailPlan
from adapters.kernels.triton_tail import Config
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig
from adapters.plan import build_plan, parted
from adapters.site import Site
from service.engine.attention import StepLayout
from service.engine.attention_triton import NewEntries, decode, kv_write, paged_attention
from service.engine.step_arrays import StepArrays

HIDDEN, QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 4096, 32, 8, 128, 16
SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""name -> (k, widths)"""
COLD_BYTES = 200 << 20
"""A round over the layers of a set-up reads at least this much, four times the L2 cache: factors are never warm, as in
a model. x, y, q are few bytes and stay warm, also as in a model, where the kernel before has just written them."""


LAUNCHES = 64
"""Kernels of a graph that is timed, at least."""


def replay_us(launch: Callable[[], None], launches: int, repeats: int = 11) -> float:
    """Median time of one of the `launches` that `launch` makes, replayed as a CUDA graph. A replay itself takes some
    20 us, so a graph has at least LAUNCHES."""
    launch()
    torch.cuda.synchronize()
    rounds = max(1, -(-LAUNCHES // launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            launch()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (launches * rounds))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second of a device copy of 2 GiB."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    us = replay_us(lambda: target.copy_(source), 1)
    return 2 * source.nbytes / us * 1e6


@dataclass
class LoraCase:
    site: str
    tokens: int
    adapters: int
    """Distinct; token t uses adapter t * adapters // tokens."""
    ranks: tuple[int, ...]
    """Adapter a has rank ranks[a % len(ranks)] in every target."""

    def __str__(self) -> str:
        return f"{self.site:<8} T={self.tokens:<5} adapters={self.adapters:<4} ranks={','.join(map(str, self.ranks))}"


class LoraSetup:
    """One case over several layers, each with factors of its own."""

    data: Tensor
    ranks: Tensor
    offsets: Tensor
    scales: Tensor

    def __init__(self, case: LoraCase) -> None:
        self.case = case
        self.k, self.widths = SITES[case.site]
        self.d, count = sum(self.widths), len(self.widths)
        rank = [case.ranks[a % len(case.ranks)] for a in range(case.adapters)]
        self.a_bytes = 2 * sum(rank) * self.k * count
        self.b_bytes = 2 * sum(rank) * self.d
        self.layers = max(2, min(256, -(-COLD_BYTES // (self.a_bytes + self.b_bytes))))
        targets = self.layers * count
        self.ranks = torch.tensor(rank, dtype=torch.int32)[:, None].repeat(1, targets).cuda()
        self.scales = torch.ones(case.adapters, targets, device="cuda")
        # As the arena lays blocks out: adapter by adapter, in it layer by layer, A then B of each target.
        sizes = np.array([[[r * self.k, r * w] for w in self.widths] * self.layers for r in rank], dtype=np.int64)
        ends = sizes.reshape(-1).cumsum()
        self.offsets = torch.from_numpy((ends - sizes.reshape(-1)).reshape(sizes.shape)).cuda()
        self.data = torch.empty(int(ends[-1]), dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        spans = [(t, 1, ((t * case.adapters // case.tokens, 1.0),)) for t in range(case.tokens)]
        plan = build_plan(spans)
        if plan is None:
            raise ValueError(f"{case}: no adapters")
        self.plan = DevicePlan.from_plan(plan, max(rank), "cuda", block_m=16 if case.tokens <= 512 else 64)
        self.targets = torch.arange(targets, dtype=torch.int32, device="cuda").view(self.layers, count).unbind()
        self.x = torch.randn(case.tokens, self.k, device="cuda", dtype=torch.bfloat16)
        self.y = torch.randn(case.tokens, self.d, device="cuda", dtype=torch.bfloat16)
        self.columns = tuple(int(v) for v in np.cumsum([0, *self.widths])[:-1])

    def bytes(self, kernel: str) -> int:
        """Fewest bytes to move: factors, x read once, y read and written once."""
        shrink, expand = self.a_bytes + self.x.nbytes, self.b_bytes + 2 * self.y.nbytes
        return {"shrink": shrink, "expand": expand, "both": shrink + expand}[kernel]

    def time(
        self, kernel: str, shrink: ShrinkConfig | None = None, expand: ExpandConfig | None = None, repeats: int = 11
    ) -> float:
        """us of "shrink", "expand" or "both" for one site of one layer."""
        partials = triton_lora.shrink(self.x, self.targets[0], self.plan, self, shrink)

        def launch() -> None:
            part = partials
            for targets in self.targets:
                if kernel != "expand":
                    part = triton_lora.shrink(self.x, targets, self.plan, self, shrink)
                if kernel != "shrink":
                    triton_lora.expand(self.y, part, targets, self.columns, self.widths, self.plan, self, expand)

        # y grows with every expand; it must stay a number.
        self.y.normal_()
        return replay_us(launch, self.layers, repeats)


class OneRowSetup:
    """A product of one row over several layers, each with a weight of its own, and an adapter of rank 16."""

    def __init__(self, site: str) -> None:
        self.lora = LoraSetup(LoraCase(site, 1, 1, (16,)))
        shape = (self.lora.d, self.lora.k)
        self.weight_bytes = 2 * shape[0] * shape[1]
        layers = max(2, -(-COLD_BYTES // self.weight_bytes))
        self.weights = [torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02) for _ in range(layers)]

    @property
    def adapter_bytes(self) -> int:
        return self.lora.a_bytes + self.lora.b_bytes

    def time(self, kernel: str) -> float:
        """us of "library", "base" or "adapter" (base product and adapter) for one layer."""
        lora = self.lora

        def launch() -> None:
            for weight, targets in zip(self.weights, lora.targets, strict=False):
                if kernel == "library":
                    functional.linear(lora.x, weight)
                    continue
                deltas = None
                if kernel == "adapter":
                    s = one_row.shrink(lora.x, targets, lora.plan, lora)
                    deltas = one_row.Deltas(s, targets, lora.columns, lora.widths, lora.plan, lora)
                one_row.product(lora.x, weight, None, deltas)

        return replay_us(launch, len(self.weights))


class TailSetup:
    """A product of weights with adapters of rank 16 in their tails, over several layers, and the kernel that reads it:
    for gate and up the activation, else expand, for down with a residual."""

    def __init__(self, site: str, tokens: int, adapters: int, decoding: int = 0) -> None:
        """adapters: of prompts, which share the tokens. decoding: the first so many tokens have an adapter each, whose
        deltas are computed beside the product."""
        k, self.widths = SITES[site]
        self.columns = tuple(int(v) for v in np.cumsum([0, *self.widths])[:-1])
        d, count = sum(self.widths), len(self.widths)
        layers = max(2, -(-COLD_BYTES // (2 * k * d)))
        self.gated, self.onto = site == "gate_up", site == "down"
        parts = [torch.empty(w, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02) for w in self.widths]
        self.tails = [with_tail(parts, None) for _ in range(layers)]
        for tail in self.tails:
            tail.b.normal_()
            tail.scales.fill_(1.0)
        ends = [decoding + (tokens - decoding) * (a + 1) // adapters for a in range(adapters)]
        spans = [(t, 1, ((adapters + t, 1.0),)) for t in range(decoding)]
        spans += [(b, e - b, ((a, 1.0),)) for a, (b, e) in enumerate(zip([decoding, *ends], ends, strict=False))]
        plan = build_plan(spans)
        if plan is None:
            raise ValueError(f"{site}: no tokens")
        beside, prompts = parted(plan, plan.tokens < decoding)
        if prompts is None:
            raise ValueError(f"{site}: no prompts")
        rows = adapters + decoding
        where = [Site(tuple(range(i * count, (i + 1) * count)), self.columns, self.widths, k, d) for i in range(layers)]
        slots = triton_tail.Tails(zip(where, self.tails, strict=True), layers * count, "cuda").slots
        ranks, size = np.full(len(prompts.seg_row), 16), 1 if adapters == 1 and not decoding else SLOTS
        placed = slots.place(prompts, ranks, np.zeros(rows, dtype=np.int64), size)
        self.plan = TailPlan.from_plan(prompts, placed, tokens, "cuda", size, beside)
        self.x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        self.y = functional.linear(self.x, self.tails[0].whole)
        self.delta = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16) if decoding else None
        self.residual = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16) if self.onto else None
        self._decoding, self._d = decoding, d

    @property
    def bytes(self) -> int:
        """Fewest that the reader moves: the product, its own result, B, the deltas of those that decode, and the
        residual."""
        tokens, size = len(self.x), self.x.element_size()
        written = self._d // 2 if self.gated else self._d
        b = 16 * self.plan.shape.slots * self._d
        residual = tokens * self._d if self.onto else 0
        return size * (tokens * (self.y.shape[1] + written) + b + self._decoding * self._d + residual)

    def time(self, kernel: str, config: Config | None = None) -> float:
        """us of "base" (the product without tails), "product" (with them) or "reader" for one layer."""

        def launch() -> None:
            for whole, _, b, scales in self.tails:
                if kernel == "base":
                    functional.linear(self.x, whole[: self._d])
                elif kernel == "product":
                    functional.linear(self.x, whole)
                elif self.gated:
                    triton_tail.gated(self.y, b, scales, "silu", self.plan, self.delta, config)
                else:
                    rest = (self.plan, self.delta, config)
                    triton_tail.expand(self.y, b, scales, self.columns, self.widths, *rest, residual=self.residual)

        # As for LoraSetup: what expand adds to must stay a number.
        self.y.normal_()
        return replay_us(launch, len(self.tails))


class AttentionSetup:
    """Sequences of (queries, keys) over several layers, each with caches of its own."""

    def __init__(self, sequences: Sequence[tuple[int, int]]) -> None:
        self.sequences = sequences
        tokens = sum(n for n, _ in sequences)
        keys = sum(c for _, c in sequences)
        self.kv_bytes = keys * KV_HEADS * HEAD_DIM * 2 * 2
        self.layers = max(2, min(64, -(-COLD_BYTES // self.kv_bytes)))
        counts = [-(-c // PAGE) for _, c in sequences]
        order = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
        table = np.zeros((len(counts), max(counts)), dtype=np.int32)
        slots, at = [], 0
        for s, (n, c) in enumerate(sequences):
            table[s, : counts[s]] = order[at : at + counts[s]]
            at += counts[s]
            position = np.arange(c - n, c)
            slots.append(table[s, position // PAGE].astype(np.int64) * PAGE + position % PAGE)
        self.step = StepArrays.from_layout(
            StepLayout(
                slots=np.concatenate(slots),
                query_lens=np.array([n for n, _ in sequences], dtype=np.int32),
                context_lens=np.array([c for _, c in sequences], dtype=np.int32),
                page_table=table,
                num_decode=sum(n == 1 for n, _ in sequences),
            ),
            torch.device("cuda"),
        )
        shape = (self.layers, 2, sum(counts), PAGE, KV_HEADS, HEAD_DIM)
        self.caches = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        self.q = torch.randn(tokens, QUERY_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.k, self.v = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.counters = torch.zeros(len(sequences) * KV_HEADS, device="cuda", dtype=torch.int32)

    @property
    def flops(self) -> float:
        """Of the two products, what the causal mask hides left out."""
        pairs = sum(n * c - n * (n - 1) / 2 for n, c in self.sequences)
        return 4 * pairs * QUERY_HEADS * HEAD_DIM

    def time(self, *, writes: bool = False) -> float:
        """writes: the tokens' own keys as well."""
        new = NewEntries(self.k, self.v, self.step.slots) if writes else None

        def launch() -> None:
            for k_cache, v_cache in self.caches:
                paged_attention(
                    self.q, k_cache, v_cache, self.step, new=new, scale=HEAD_DIM**-0.5, counters=self.counters
                )

        return replay_us(launch, self.layers)

    def time_decode(self, splits: int) -> float:
        out, step = torch.empty_like(self.q), self.step

        def launch() -> None:
            for k_cache, v_cache in self.caches:
                decode(
                    self.q,
                    k_cache,
                    v_cache,
                    step.page_table,
                    step.context_lens,
                    out,
                    scale=HEAD_DIM**-0.5,
                    max_context=step.max_context,
                    splits=splits,
                    counters=self.counters,
                )

        return replay_us(launch, self.layers)

    def time_write(self) -> float:
        def launch() -> None:
            for k_cache, v_cache in self.caches:
                kv_write(self.k, self.v, k_cache, v_cache, self.step.slots)

        return replay_us(launch, self.layers)
