"""draw.py in one launch: a program per row, nothing sorted, nothing that the host has to know.

Cuts are found by asking, of several thresholds at once, how many tokens lie above each, or how much mass: a row of
128k logits lies in the L2 cache, and five such passes find any threshold among the 65536 values of a 16-bit float (the
idea of the sorting-free samplers, e.g. FlashInfer, Ye et al. 2025). The token is found by the same question about
places in the vocabulary. Sums are of a fixed order, so a row gives the same token in any batch.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from service.engine import draw as rules_of
from service.engine.transfer import to_device

BLOCK = 4096
PIVOTS = 4
WARPS = 32
"""The best of eight such triples on an H100, 64 rows of 128,256 in bfloat16: most probable 23 us, temperature alone
127, with top_p 449; torch's argmax 44, draw.py's torch operations 88, 976 and 2,065."""
LOW_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Bits of a value of this dtype that are zero once it is a float32."""
_LOG2E = tl.constexpr(1.4426950408889634)
_NOT_FINITE = tl.constexpr(rules_of.NOT_FINITE)
_WIDTH = tl.constexpr(rules_of.WIDTH)


def draw(logits: Tensor, rules: NDArray[np.int32]) -> Tensor:
    """As draw.Draw says."""
    tokens = torch.empty(len(rules), dtype=torch.int64, device=logits.device)
    draw_into(tokens, logits, to_device(rules, logits.device))
    return tokens


def draw_into(tokens: Tensor, logits: Tensor, rules: Tensor) -> None:
    """tokens: int64 [n]; logits [n, vocabulary], elements of a row adjacent; rules: int32 [n, WIDTH]."""
    if logits.stride(1) != 1 or not rules.is_contiguous():
        raise ValueError(f"logits, rules: strides {logits.stride()}, {rules.stride()}: rows must be whole")
    draw_kernel[(len(tokens),)](
        logits,
        rules,
        tokens,
        logits.stride(0),
        V=logits.shape[1],
        LOW=LOW_BITS[logits.dtype],
        BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
        PIVOTS=PIVOTS,
        num_warps=WARPS,
    )


@triton.jit
def _key(value, LOW: tl.constexpr):
    """float32 -> int32 in the same order, with -0.0 equal to 0.0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> LOW


@triton.jit
def _value(key, LOW: tl.constexpr):
    """The float32 of a key."""
    key = key.to(tl.int32)
    bits = (key << LOW) | tl.where(key < 0, (1 << LOW) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(row, n0, V: tl.constexpr, BLOCK: tl.constexpr):
    n = n0 + tl.arange(0, BLOCK)
    return n, tl.load(row + n, mask=n < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _mass(score, top, factor, min_p):
    """Probability in units of the most probable token's; 0 below min_p."""
    mass = tl.exp2((score - top) * factor)
    return tl.where(mass >= min_p, mass, 0.0)


@triton.jit
def _kept(n, score, mass, threshold, last, LOW: tl.constexpr):
    key = _key(score, LOW)
    return tl.where((key > threshold) | ((key == threshold) & (n <= last)), mass, 0.0)


@triton.jit
def _threshold(
    row,
    top,
    factor,
    min_p,
    low,
    high,
    limit,
    COUNT: tl.constexpr,
    V: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest key in (low, high] above which lies less than `limit` of the row's mass, COUNT: fewer than so many
    tokens; and how much that is. Above `high` lies none."""
    found = tl.zeros([], tl.float64)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + step * (tl.arange(0, PIVOTS) + 1), high)
        sums = tl.zeros([PIVOTS, BLOCK], tl.float32)
        for n0 in range(0, V, BLOCK):
            _, score = _load(row, n0, V, BLOCK)
            weight = _mass(score, top, factor, min_p)
            if COUNT:
                weight = tl.where(weight > 0, 1.0, 0.0)
            key = _key(score, LOW).to(tl.int64)
            sums += tl.where(key[None, :] > pivots[:, None], weight[None, :], 0.0)
        above = tl.sum(sums.to(tl.float64), 1)
        less = above < limit
        if tl.max(less.to(tl.int32), 0) > 0:
            high = tl.min(tl.where(less, pivots, high), 0)
            found = tl.max(tl.where(less, above, 0.0), 0)
        low = tl.max(tl.where(less, low, pivots), 0)
    return high, found


@triton.jit
def _place(
    row,
    top,
    factor,
    min_p,
    threshold,
    last,
    high,
    target,
    EQUAL: tl.constexpr,
    V: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The first place in the vocabulary, `high` at the latest, up to which more than `target` of the kept mass lies;
    EQUAL: more than so many tokens equal to the threshold."""
    low = tl.zeros([], tl.int64) - 1
    high = high.to(tl.int64)
    before = tl.zeros([], tl.float64)
    while high - low > 1:
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = tl.minimum(low + step * (tl.arange(0, PIVOTS) + 1), high)
        sums = tl.zeros([PIVOTS, BLOCK], tl.float32)
        begin = (low + 1) // BLOCK * BLOCK
        for n0 in range(begin.to(tl.int32), (high + 1).to(tl.int32), BLOCK):
            n, score = _load(row, n0, V, BLOCK)
            mass = _mass(score, top, factor, min_p)
            if EQUAL:
                weight = tl.where((_key(score, LOW) == threshold) & (mass > 0), 1.0, 0.0)
            else:
                weight = _kept(n, score, mass, threshold, last, LOW)
            weight = tl.where(n > low, weight, 0.0)
            sums += tl.where(n[None, :] <= pivots[:, None], weight[None, :], 0.0)
        upto = before + tl.sum(sums.to(tl.float64), 1)
        more = upto > target
        before = tl.max(tl.where(more, before, upto), 0)
        low = tl.max(tl.where(more, low, pivots), 0)
        high = tl.min(tl.where(more, pivots, high), 0)
    return high


@triton.jit
def draw_kernel(
    logits,
    rules,
    tokens,
    stride,
    V: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    rule = rules + r * _WIDTH
    temperature = tl.load(rule).to(tl.float32, bitcast=True)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    strange = tl.zeros([BLOCK], tl.int32)
    for n0 in range(0, V, BLOCK):
        n, score = _load(row, n0, V, BLOCK)
        strange |= (score != score).to(tl.int32)
        better = score > best
        place = tl.where(better, n, place)
        best = tl.where(better, score, best)
    top = tl.max(best, 0)
    finite = (tl.max(strange, 0) == 0) & (top > float("-inf")) & (top < float("inf"))
    token = tl.min(tl.where(best == top, place, V), 0).to(tl.int64)

    if finite & (temperature > 0):
        min_p = tl.load(rule + 1).to(tl.float32, bitcast=True)
        top_p = tl.load(rule + 2).to(tl.float32, bitcast=True)
        top_k = tl.load(rule + 3)
        number = (tl.load(rule + 4).to(tl.float64) * 134217728.0 + tl.load(rule + 5).to(tl.float64)) * (
            1.0 / 9007199254740992.0
        )
        factor = _LOG2E / temperature
        high = _key(top, LOW).to(tl.int64)
        # Below 2^-149 of the most probable one nothing has a mass.
        threshold = _key(top - 150.0 / factor, LOW).to(tl.int64) - 1
        last = tl.zeros([], tl.int64) + V
        allowed = tl.zeros([], tl.float64) + V
        cut = tl.zeros([], tl.int32)
        if (top_k > 0) & (top_k < V):
            threshold, above = _threshold(
                row, top, factor, min_p, threshold, high, top_k.to(tl.float64), True, V, LOW, BLOCK, PIVOTS
            )
            allowed = top_k - above
            cut += 1
        if top_p < 1.0:
            sums = tl.zeros([BLOCK], tl.float32)
            for n0 in range(0, V, BLOCK):
                _, score = _load(row, n0, V, BLOCK)
                key = _key(score, LOW).to(tl.int64)
                sums += tl.where(key > threshold, _mass(score, top, factor, min_p), 0.0)
            mass = tl.sum(sums.to(tl.float64), 0)
            if cut > 0:
                mass += allowed * _mass(_value(threshold, LOW), top, factor, min_p)
            wanted = top_p * mass
            lowest = threshold
            threshold, above = _threshold(
                row, top, factor, min_p, threshold - 1, high, wanted, False, V, LOW, BLOCK, PIVOTS
            )
            each = _mass(_value(threshold, LOW), top, factor, min_p)
            enough = tl.maximum(tl.ceil((wanted - above) / tl.maximum(each.to(tl.float64), 1e-45)), 1.0)
            allowed = tl.where((cut > 0) & (threshold == lowest), tl.minimum(allowed, enough), enough)
            cut += 1
        if cut > 0:
            # The last of those equal to the threshold that is kept: the first place with more than allowed - 1.
            last = _place(
                row, top, factor, min_p, threshold, last, last - 1, allowed - 1.0, True, V, LOW, BLOCK, PIVOTS
            )
        sums = tl.zeros([BLOCK], tl.float32)
        ends = tl.zeros([BLOCK], tl.int32)
        for n0 in range(0, V, BLOCK):
            n, score = _load(row, n0, V, BLOCK)
            mass = _kept(n, score, _mass(score, top, factor, min_p), threshold, last, LOW)
            sums += mass
            ends = tl.where(mass > 0, n, ends)
        target = number * tl.sum(sums.to(tl.float64), 0)
        token = _place(row, top, factor, min_p, threshold, last, tl.max(ends, 0), target, False, V, LOW, BLOCK, PIVOTS)
    tl.store(tokens + r, tl.where(finite, token, _NOT_FINITE))
