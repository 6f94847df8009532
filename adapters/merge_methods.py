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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.merge_request import METHODS, MergeOptions, Method

SLICE_VALUES = 1 << 18
"""Pruned tensors are added up in slices of so many values, whose temporaries then cost MBs, not several times d·k."""


@dataclass(frozen=True)
class Factors:
    """One source's share of a module: weight · scale · B A. a [r, k] and b [d, r] in float32."""

    a: Tensor
    b: Tensor
    scale: float
    weight: float


def merge_module(
    sources: Sequence[Factors], options: MergeOptions, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A [rank, k], B [d, rank]) of the merged module, to be applied with scale 1. `rank` as `merged_rank` gives it.

    `generator` is advanced by dare_*: for A of each source, then B of each; with SVD once for the product of each."""
    method = METHODS[options.method]
    if options.method == "cat":
        a = torch.cat([one.a * one.weight * one.scale for one in sources], dim=0)
        return a, torch.cat([one.b for one in sources], dim=1)
    if options.method == "svd":
        return _svd_of_products(sources, rank)
    if method.svd:
        products = ((one.b @ one.a) * one.scale for one in sources)
        return _svd(_combine(products, [one.weight for one in sources], method, options, generator), rank)
    # Half of the weight on each side; its sign on A alone, else it would cancel.
    roots = [math.sqrt(abs(one.weight * one.scale)) for one in sources]
    signed = [root if one.weight * one.scale >= 0 else -root for root, one in zip(roots, sources, strict=True)]
    a = _combine((one.a for one in sources), signed, method, options, generator)
    b = _combine((one.b for one in sources), roots, method, options, generator)
    return a, b


def merged_rank(ranks: Sequence[int], options: MergeOptions, svd_rank: int, out_features: int, in_features: int) -> int:
    """The rank of a merged module from its sources' ranks. `svd_rank`: the one asked for, or PEFT's default."""
    if options.method == "cat":
        return sum(ranks)
    if not METHODS[options.method].svd:
        return ranks[0]
    # A sum of products has no higher rank than its factors together; pruning a product makes it of any rank.
    limit = sum(ranks) if options.method == "svd" else svd_rank
    return min(svd_rank, limit, out_features, in_features)


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


def _prune(tensor: Tensor, method: Method, density: float, generator: torch.Generator) -> Tensor:
    if method.prune is None or density >= 1:
        return tensor
    if method.prune == "random":
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * kept / density
    count = int(density * tensor.numel())
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=count, largest=True)[1]] = 1
    return tensor * mask.reshape(tensor.shape)


def _elected(stack: Tensor, majority: str) -> Tensor:
    """Which values [n, count] have the sign of their sum ("total") or of the sum of their signs ("frequency")."""
    sign = stack.sign()
    votes = stack.sum(dim=0) if majority == "total" else sign.sum(dim=0)
    return sign == torch.where(votes >= 0, 1, -1)


def _svd_of_products(sources: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor]:
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
