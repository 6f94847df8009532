"""From logits to tokens. Everything a request may ask of sampling is applied here, row by row independent of the batch.

Order (as vLLM's, so that the same parameters mean the same): banned ids and logit_bias, penalties, temperature,
min_p, top_k and top_p, then one draw. Log-probabilities are of the raw logits. A draw uses one uniform number made of
(seed, position) alone, turned into a token by the inverse of the cumulative distribution: the same request gives
the same tokens alone, in a batch, after a preemption, and on another device up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from service.engine.messages import SamplingParams, TokenLogprob
from service.engine.request import Sampled, Sequence

LOGPROB_ROWS = 256
"""Rows of a prompt whose log-probabilities are computed at once; bounds the float32 copy of the logits."""


def sample(logits: Tensor, seqs: Seq[Sequence], greedy: Tensor | None = None) -> list[Sampled]:
    """One token per row of `logits` [n, vocabulary] (any float dtype); `seqs[i]` is the sequence of row i.
    `greedy`: the most probable token of each row, where it is known already."""
    if not seqs:
        return []
    if all(_is_plain(seq.sampling) for seq in seqs):
        chosen = logits.argmax(-1) if greedy is None else greedy
    else:
        chosen = _choose(logits.float(), seqs)
    tokens: list[int] = chosen.tolist()
    results = [Sampled(token) for token in tokens]
    asked = [i for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    if asked:
        most = max(seqs[i].sampling.logprobs or 0 for i in asked)
        entries = _logprobs(logits[asked], [tokens[i] for i in asked], most)
        for i, entry in zip(asked, entries, strict=True):
            results[i].logprob = TokenLogprob(
                entry.token_id, entry.logprob, entry.top[: seqs[i].sampling.logprobs or 0]
            )
    return results


def prompt_logprobs(logits: Tensor, next_tokens: Seq[int], alternatives: int) -> list[TokenLogprob]:
    """Log-probability of each prompt token given those before it: row i of `logits` predicts next_tokens[i]."""
    found: list[TokenLogprob] = []
    for begin in range(0, len(next_tokens), LOGPROB_ROWS):
        rows = slice(begin, begin + LOGPROB_ROWS)
        found += _logprobs(logits[rows], next_tokens[rows], alternatives)
    return found


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


def _is_plain(p: SamplingParams) -> bool:
    """Greedy with nothing that moves the logits."""
    return p.temperature == 0.0 and not _moves_logits(p)


def _moves_logits(p: SamplingParams) -> bool:
    return bool(
        p.logit_bias or p.min_tokens or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    )


def _choose(logits: Tensor, seqs: Seq[Sequence]) -> Tensor:
    logits = logits.clone()
    for row, seq in enumerate(seqs):
        if _moves_logits(seq.sampling):
            _move(logits[row], seq)
    chosen = logits.argmax(-1)
    drawn = [i for i, seq in enumerate(seqs) if seq.sampling.temperature > 0.0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _draw(logits[index], [seqs[i] for i in drawn])
    return chosen


def _move(row: Tensor, seq: Sequence) -> None:
    """Applies bans, biases and penalties to the logits [vocabulary] of one sequence, in place."""
    p = seq.sampling
    device = row.device
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(seq.tokens)), device=device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        ids, counts = np.unique(np.asarray(seq.tokens[seq.num_prompt :], dtype=np.int64), return_counts=True)
        if len(ids):
            times = torch.from_numpy(counts).to(device=device, dtype=row.dtype)
            row[torch.from_numpy(ids).to(device)] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        ids_of_bias = torch.tensor(list(p.logit_bias), device=device)
        row[ids_of_bias] += torch.tensor(list(p.logit_bias.values()), device=device, dtype=row.dtype)
    if seq.num_generated < p.min_tokens and p.stop_token_ids:
        row[torch.tensor(p.stop_token_ids, device=device)] = float("-inf")


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
        index = torch.tensor(rows, device=logits.device)
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
    return torch.tensor(values, device=like.device, dtype=dtype)[:, None]


def _logprobs(logits: Tensor, tokens: Seq[int], alternatives: int) -> list[TokenLogprob]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if not alternatives:
        return [TokenLogprob(token, value, []) for token, value in zip(tokens, own, strict=True)]
    values, ids = logprobs.topk(alternatives, dim=-1)
    return [
        TokenLogprob(token, value, list(zip(i, v, strict=True)))
        for token, value, i, v in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]
