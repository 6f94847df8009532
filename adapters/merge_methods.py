"""The mathematics of merging one module's LoRA factors, equal to PEFT 0.21's add_weighted_adapter in float32.

Sources: peft/utils/merge_utils.py and LoraModel._svd_generalized_task_arithmetic_weighted_adapter and
._generalized_task_arithmetic_weighted_adapter; TIES: arXiv:2306.01708; DARE: arXiv:2311.03099. But for the SVDs, every
operation is done on the same numbers in the same order, so that A and B equal PEFT's bit for bit.

Differences, all of them where PEFT computes something else than what was asked for:
- one source alone is merged by the method that was asked for (PEFT turns every method into linear);
- an SVD's rank is at most that of the matrix (PEFT fails, or gives factors that do not fit).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapters.merge_memory import SLICE_VALUES, is_dense
from adapters.merge_request import METHODS, MergeOptions, Method

RUN = 16
"""torch.sum(dim=0) adds up the tensors of a stack in runs of so many, and then the runs' sums (on CPU, up to 256)."""


class Source(Protocol):
    """One source's share of a module: weight · scale · B A. a [r, k] and b [d, r] in float32 may be read anew whenever
    they are asked for."""

    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Factors:
    """A Source in memory."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def merge_module(
    sources: Sequence[Source], options: MergeOptions, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A [rank, k], B [d, rank]) of the merged module, to be applied with scale 1. `rank` as merge_plan's gives it.

    `generator` is advanced by dare_*: for A of each source, then B of each; with SVD once for the product of each.
    adapters/merge_memory.py says what memory it takes."""
    method = METHODS[options.method]
    if options.method == "cat":
        a = torch.cat([one.a * one.weight * one.scale for one in sources], dim=0)
        return a, torch.cat([one.b for one in sources], dim=1)
    if method.svd:
        d, k = sources[0].b.shape[0], sources[0].a.shape[1]
        if is_dense(options.method, d, k, [one.rank for one in sources]):
            return _svd(_combine_products(sources, method, options, generator), rank)
        return _svd_of_factors(sources, rank)
    # Half of the weight on each side; its sign on A alone, else it would cancel.
    roots = [math.sqrt(abs(one.weight * one.scale)) for one in sources]
    signed = [root if one.weight * one.scale >= 0 else -root for root, one in zip(roots, sources, strict=True)]
    a = _combine((one.a for one in sources), signed, method, options, generator)
    b = _combine((one.b for one in sources), roots, method, options, generator)
    return a, b


def _combine(
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    method: Method,
    options: MergeOptions,
    generator: torch.Generator,
) -> Tensor:
    """Prunes each tensor, then adds them up with their weights: all values, or those of the elected sign averaged.

    `tensors` are taken one by one: besides what is pruned already, only one of them is in memory."""
    factors = torch.tensor(weights, dtype=torch.float32).view(-1, 1)
    density = 1.0 if options.density is None else options.density
    pruned = [_prune(tensor, method, density, generator) for tensor in tensors]
    shape = pruned[0].shape
    flat = [tensor.reshape(-1) for tensor in pruned]
    result = torch.empty_like(flat[0])
    for begin in range(0, result.numel(), SLICE_VALUES):
        part = slice(begin, begin + SLICE_VALUES)
        stack = torch.stack([tensor[part] for tensor in flat])
        if method.elects_sign:
            agrees = _elected(stack, options.majority_sign_method or "total")
            total = (stack * factors * agrees).sum(dim=0)
            result[part] = total / torch.clamp(agrees.sum(dim=0), min=1.0)
        else:
            result[part] = (stack * factors).sum(dim=0)
    return result.view(shape)


def _combine_products(
    sources: Sequence[Source], method: Method, options: MergeOptions, generator: torch.Generator
) -> Tensor:
    """The same with each source's scale · B A [d, k], of which one at a time is in memory.

    An election has to see all of them before the first can be added, so they are computed twice, the second time with
    the same random numbers. The sums are PEFT's bit for bit: see _Sum."""
    density = 1.0 if options.density is None else options.density
    state = generator.get_state()

    def pruned() -> Iterator[tuple[Tensor, float]]:
        generator.set_state(state)
        for one in sources:
            yield _prune((one.b @ one.a).mul_(one.scale), method, density, generator), one.weight

    total = _Sum()
    if not method.elects_sign:
        for tensor, weight in pruned():
            total.add(tensor.mul_(weight))
        return total.value()
    votes = _Sum()
    for tensor, _ in pruned():
        votes.add(tensor if (options.majority_sign_method or "total") == "total" else tensor.sign_())
    positive = votes.value() >= 0
    del votes, tensor
    count = torch.zeros_like(positive, dtype=torch.uint8)
    for tensor, weight in pruned():
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        count += agrees
        total.add(tensor.mul_(weight).mul_(agrees))
    return total.value() / count.clamp_(min=1)


class _Sum:
    """Σ of tensors in the order of torch.sum(dim=0) over a stack of them, which then need not be in memory together.

    Bit for bit but for the last d·k modulo 32 values, in whose place torch's loop adds up in another order. A tensor
    that is added belongs to the sum."""

    def __init__(self) -> None:
        self._count = 0
        self._run: Tensor | None = None
        self._runs: Tensor | None = None

    def add(self, tensor: Tensor) -> None:
        self._run = tensor if self._run is None else self._run.add_(tensor)
        self._count += 1
        if self._count % RUN == 0:
            self._runs = self._run if self._runs is None else self._runs.add_(self._run)
            self._run = None

    def value(self) -> Tensor:
        """ValueError if nothing was added. Nothing can be added after it."""
        parts = [part for part in (self._run, self._runs) if part is not None]
        if not parts:
            raise ValueError("a sum of nothing")
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def _prune(tensor: Tensor, method: Method, density: float, generator: torch.Generator) -> Tensor:
    if method.prune is None or density >= 1:
        return tensor
    if method.prune == "random":
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * kept / density
    count = int(density * tensor.numel())
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=count, sorted=False)[1]] = 1  # sorting took most of the time
    return tensor * mask.reshape(tensor.shape)


def _elected(stack: Tensor, majority: str) -> Tensor:
    """Which values [n, count] have the sign of their sum ("total") or of the sum of their signs ("frequency")."""
    sign = stack.sign()
    votes = stack.sum(dim=0) if majority == "total" else sign.sum(dim=0)
    return sign == torch.where(votes >= 0, 1, -1)


def _svd_of_factors(sources: Sequence[Source], rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of Σ w·s·B A out of its factors: an SVD of [R, R] instead of [d, k], R the sum of the ranks.

    With B = Qb Rb and Aᵀ = Qa Ra, B A = Qb (Rb Raᵀ) Qaᵀ, whose outer factors are orthonormal. In float64: the
    singular values of the product must not suffer from those of the factors."""
    b = torch.cat([one.b.double() * (one.weight * one.scale) for one in sources], dim=1)
    a = torch.cat([one.a.double() for one in sources], dim=0)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return (vh[:rank] @ right.T).float(), (left @ (u[:, :rank] * s[:rank])).float()


def _svd(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = Vᵀ and B = U S of the `rank` largest singular values, as PEFT puts them."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return vh[:rank].contiguous(), u[:, :rank] * s[:rank]
