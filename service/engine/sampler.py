"""From logits to tokens. Everything a request may ask of sampling is applied here, row by row independent of the batch.

Order (as vLLM's, so that the same parameters mean the same): banned ids and logit_bias, penalties, temperature,
min_p, top_k and top_p, then one draw. Log-probabilities are of the raw logits. A draw uses one uniform number made of
(seed, position) alone, turned into a token by the inverse of the cumulative distribution: the same request gives
the same tokens alone, in a batch, after a preemption, and on another device up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.messages import SamplingParams, TokenLogprob
from service.engine.request import Sampled, Sequence
from service.engine.transfer import Readback, column, to_device

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken for 0 (as vLLM takes them): logits divided by less overflow."""
LOGPROB_ROWS = 256
"""Rows of a prompt whose log-probabilities are computed at once; bounds the float32 copy of the logits."""


Pending = Callable[[int], Tensor]
"""Row -> the token, [1] on the device, for which PENDING stands at the end of its sequence."""


@dataclass(slots=True)
class Drawn:
    """Tokens drawn on the device, and a way to know them."""

    tokens: Tensor
    """int64 [n]"""
    _tokens: Readback
    _logprobs: Logprobs | None
    _alternatives: dict[int, int]
    """Row that asked for log-probabilities -> how many alternatives; in the order of `_logprobs`."""

    def read(self) -> list[Sampled]:
        """Waits for the device."""
        results = [Sampled(token) for token in self._tokens.read().tolist()]
        if self._logprobs is not None:
            for (row, most), entry in zip(self._alternatives.items(), self._logprobs.read(), strict=True):
                results[row].logprob = TokenLogprob(entry.token_id, entry.logprob, entry.top[:most])
        return results


def sample(logits: Tensor, seqs: Seq[Sequence], greedy: Tensor | None = None, pending: Pending | None = None) -> Drawn:
    """Draws one token per row of `logits` [n, vocabulary] (any float dtype); `seqs[i]` is the sequence of row i.
    `greedy`: the most probable token of each row, where it is known already. Queues work, and waits for none."""
    if all(_is_plain(seq.sampling) for seq in seqs):
        chosen = logits.argmax(-1) if greedy is None else greedy
    else:
        chosen = _choose(logits.float(), seqs, pending)
    asked = {i: seq.sampling.logprobs for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None}
    logprobs = None
    if asked:
        rows = column(list(asked), torch.int64, logits.device)
        logprobs = Logprobs(logits[rows], chosen[rows], max(asked.values()))
    return Drawn(chosen, Readback(chosen), logprobs, asked)


class Logprobs:
    """Log-probabilities of `tokens` [n] and of the `alternatives` most probable ones under `logits` [n, vocabulary]."""

    def __init__(self, logits: Tensor, tokens: Tensor, alternatives: int) -> None:
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        self._tokens = Readback(tokens)
        self._own = Readback(logprobs.gather(1, tokens[:, None])[:, 0])
        values, ids = logprobs.topk(alternatives, dim=-1)
        self._values, self._ids = Readback(values), Readback(ids)

    def read(self) -> list[TokenLogprob]:
        """Waits for the device."""
        parts = (part.read().tolist() for part in (self._tokens, self._own, self._ids, self._values))
        return [
            TokenLogprob(token, value, list(zip(ids, values, strict=True)))
            for token, value, ids, values in zip(*parts, strict=True)
        ]


def prompt_logprobs(logits: Tensor, next_tokens: Seq[int], alternatives: int) -> list[Logprobs]:
    """Log-probability of each prompt token given those before it: row i of `logits` predicts next_tokens[i]."""
    following = column(next_tokens, torch.int64, logits.device)
    return [
        Logprobs(logits[begin : begin + LOGPROB_ROWS], following[begin : begin + LOGPROB_ROWS], alternatives)
        for begin in range(0, len(next_tokens), LOGPROB_ROWS)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: two rounds of SplitMix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & mask
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def _is_greedy(p: SamplingParams) -> bool:
    return p.temperature < GREEDY_BELOW


def _is_plain(p: SamplingParams) -> bool:
    """Greedy with nothing that moves the logits."""
    return _is_greedy(p) and not _moves_logits(p)


def _moves_logits(p: SamplingParams) -> bool:
    return bool(
        p.logit_bias or p.min_tokens or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    )


def _choose(logits: Tensor, seqs: Seq[Sequence], pending: Pending | None) -> Tensor:
    logits = logits.clone()
    for row, seq in enumerate(seqs):
        if _moves_logits(seq.sampling):
            _move(logits[row], seq, pending(row) if pending is not None and seq.pending else None)
    chosen = logits.argmax(-1)
    drawn = [i for i, seq in enumerate(seqs) if not _is_greedy(seq.sampling)]
    if drawn:
        index = column(drawn, torch.int64, logits.device)
        chosen[index] = _draw(logits[index], [seqs[i] for i in drawn])
    return chosen


def _move(row: Tensor, seq: Sequence, last: Tensor | None) -> None:
    """Applies bans, biases and penalties to the logits [vocabulary] of one sequence, in place. `last`: its last token,
    if that is not known here."""
    p = seq.sampling
    device = row.device
    if seq.num_generated < p.min_tokens and p.stop_token_ids:
        row[column(p.stop_token_ids, torch.int64, device)] = float("-inf")
    if p.logit_bias:
        row[column(list(p.logit_bias), torch.int64, device)] += column(list(p.logit_bias.values()), row.dtype, device)
    known = seq.tokens if last is None else seq.tokens[:-1]
    if p.repetition_penalty != 1.0:
        seen = column(sorted(set(known)), torch.int64, device)
        if last is not None:
            seen = torch.cat((seen, last))  # perhaps twice: both write the same
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        ids, counts = np.unique(np.asarray(known[seq.num_prompt :], dtype=np.int64), return_counts=True)
        tokens, times = to_device(ids, device), to_device(counts.astype(np.float32), device)
        present = torch.ones_like(times)
        if last is not None:
            same = tokens == last
            fresh = ~same.any(dim=0, keepdim=True)
            tokens = torch.cat((tokens, last))
            times = torch.cat((times + same, fresh.to(times.dtype)))
            present = torch.cat((present, fresh.to(times.dtype)))
        row.index_add_(0, tokens, -(p.presence_penalty * present + p.frequency_penalty * times))


def _draw(logits: Tensor, seqs: Seq[Sequence]) -> Tensor:
    """Draws one token per row of `logits` [n, vocabulary] float32."""
    vocabulary = logits.shape[1]
    params = [seq.sampling for seq in seqs]
    probs = torch.softmax(logits / _column([p.temperature for p in params], logits), dim=-1)
    if any(p.min_p > 0.0 for p in params):
        probs = probs.where(probs >= _column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True), 0.0)
    numbers = _column([uniform(seq.seed, len(seq.tokens)) for seq in seqs], logits, torch.float64)
    # Rows that cut by rank are drawn from in sorted order, the others in vocabulary order: which of the two must
    # not depend on who else is in the batch.
    chosen = torch.empty(len(seqs), dtype=torch.int64, device=logits.device)
    cut = [p.top_p < 1.0 or 0 < p.top_k < vocabulary for p in params]
    for wanted in (False, True):
        rows = [i for i, is_cut in enumerate(cut) if is_cut is wanted]
        if not rows:
            continue
        index = column(rows, torch.int64, logits.device)
        if wanted:
            kept, order = _cut_by_rank(probs[index], [params[i] for i in rows])
            chosen[index] = order.gather(1, _inverse(kept, numbers[index]))[:, 0]
        else:
            chosen[index] = _inverse(probs[index], numbers[index])[:, 0]
    return chosen


def _cut_by_rank(probs: Tensor, params: Seq[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Applies top_k, then top_p to what is left: (probabilities by descending rank, their token ids)."""
    # A stable sort: ties are kept in vocabulary order on every device and in every batch.
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[1], device=probs.device)[None]
    probs = probs.where(rank < _column([float(p.top_k or probs.shape[1]) for p in params], probs), 0.0)
    # The smallest set of the most probable tokens whose mass reaches top_p; never empty.
    top_p = _column([p.top_p for p in params], probs)
    before = probs.cumsum(-1) - probs
    probs = probs.where((before < top_p * probs.sum(-1, keepdim=True)) | (rank == 0) | (top_p >= 1.0), 0.0)
    return probs, order


def _inverse(probs: Tensor, numbers: Tensor) -> Tensor:
    """[n, 1] the first column whose cumulative mass exceeds numbers [n, 1] in [0, 1): never one of mass zero."""
    cumulative = probs.double().cumsum(-1)
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)


def _column(values: list[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return column(values, dtype, like.device)[:, None]
