"""One token from each row of logits: by which rules, and how on a CPU. draw_triton.py does the same in one launch.

What is kept of a row: tokens of at least `min_p` of the most probable one's probability, of these the `top_k` most
probable, of these the fewest that have `top_p` of their mass. Equal logits count in the order of the vocabulary. The
token is where the cumulative mass, in the order of the vocabulary, exceeds the row's number: the same on any device
up to rounding, and whoever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.request import Sequence
from service.engine.transfer import to_device

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken for 0 (as vLLM takes them): logits divided by less overflow."""
NOT_FINITE = -2
"""Drawn from a row whose largest logit is no finite number: there is nothing to draw from."""
WIDTH = 8
"""int32 elements of a row of rules, see `Rules`."""
TEMPERATURE, MIN_P, TOP_P, TOP_K, NUMBER = 0, 1, 2, 3, 4
"""Where they lie: float32, float32, float32, int32, and the number in [0, 1), the upper 26 and the lower 27 of its 53
bits."""
_LOW_BITS = 27
_ALL = 2**31 - 1
"""A top_k that no vocabulary reaches."""

Draw = Callable[[Tensor, NDArray[np.int32]], Tensor]
"""(logits [n, vocabulary] of any float dtype, rules) -> tokens, int64 [n]"""


class Rules:
    """How the next tokens of some sequences are drawn, made once for all their steps."""

    def __init__(self, seqs: Seq[Sequence]) -> None:
        self._rows = [i for i, seq in enumerate(seqs) if seq.sampling.temperature >= GREEDY_BELOW]
        self._seqs = [seqs[i] for i in self._rows]
        self._seeds = np.array([seq.seed for seq in self._seqs], dtype=np.uint64)
        self._fixed = np.zeros((len(seqs), WIDTH), dtype=np.int32)
        for row, seq in zip(self._rows, self._seqs, strict=True):
            p = seq.sampling
            self._fixed.view(np.float32)[row, :TOP_K] = p.temperature, p.min_p, p.top_p
            self._fixed[row, TOP_K] = min(p.top_k, _ALL)

    def now(self) -> NDArray[np.int32]:
        """int32 [n, WIDTH], with the numbers of the tokens to come. Zeros: the most probable token."""
        if not self._rows:
            return self._fixed
        out = self._fixed.copy()
        bits = uniform_bits(self._seeds, np.array([len(seq.tokens) for seq in self._seqs], dtype=np.uint64))
        out[self._rows, NUMBER] = bits >> _LOW_BITS
        out[self._rows, NUMBER + 1] = bits & ((1 << _LOW_BITS) - 1)
        return out


def uniform_bits(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[n] of 53 bits that depend on (seed, position) alone, of numbers uniform in [0, 1): two rounds of SplitMix64
    (Steele et al. 2014)."""
    wrap = np.uint64
    state = seeds * wrap(0x9E3779B97F4A7C15) + positions * wrap(0xD1B54A32D192ED03) + wrap(0x632BE59BD9B4E019)
    for _ in range(2):
        state += wrap(0x9E3779B97F4A7C15)
        state = (state ^ (state >> wrap(30))) * wrap(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> wrap(27))) * wrap(0x94D049BB133111EB)
        state ^= state >> wrap(31)
    return (state >> wrap(11)).astype(np.int64)


def draw(logits: Tensor, rules: NDArray[np.int32]) -> Tensor:
    """As `Draw` says, in plain torch."""
    logits = logits.float()
    top, chosen = logits.max(dim=-1)
    rows = np.flatnonzero(rules[:, TEMPERATURE])
    if len(rows):
        index = to_device(rows, logits.device)
        chosen[index] = _draw(logits[index], top[index, None], rules[rows])
    return chosen.where(top.isfinite(), NOT_FINITE)


def _draw(logits: Tensor, top: Tensor, rules: NDArray[np.int32]) -> Tensor:
    """Of rows that are all drawn by chance; top [n, 1] is their largest logit."""

    def column(values: NDArray[np.generic]) -> Tensor:
        return to_device(np.ascontiguousarray(values)[:, None], logits.device)

    floats = rules.view(np.float32)
    masses = ((logits - top) / column(floats[:, TEMPERATURE])).exp()
    masses = masses.where(masses >= column(floats[:, MIN_P]), 0.0)
    top_k, top_p = rules[:, TOP_K], floats[:, TOP_P]
    # Sorting costs most, and must not change what a row gives that needs none: both go by the vocabulary in the end.
    cut = np.flatnonzero((top_p < 1.0) | ((top_k > 0) & (top_k < logits.shape[1])))
    if len(cut):
        index = to_device(cut, logits.device)
        ks = np.where(top_k[cut] > 0, top_k[cut], logits.shape[1])
        masses[index] = _cut(logits[index], masses[index], column(ks), column(top_p[cut]))
    numbers = column((rules[:, NUMBER].astype(np.int64) << _LOW_BITS | rules[:, NUMBER + 1]) * 2.0**-53)
    cumulative = masses.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=logits.shape[1] - 1)


def _cut(logits: Tensor, masses: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """masses [n, vocabulary] with 0 for those that top_k and top_p [n, 1] leave out."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = masses.gather(1, order)
    rank = torch.arange(ranked.shape[1], device=ranked.device)[None]
    ranked = ranked.where(rank < top_k, 0.0)
    before = ranked.cumsum(-1) - ranked
    # The first is kept whatever top_p is.
    ranked = ranked.where((before < top_p * ranked.sum(-1, keepdim=True)) | (rank == 0) | (top_p >= 1.0), 0.0)
    return torch.zeros_like(masses).scatter_(1, order, ranked)
