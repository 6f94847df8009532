"""From logits to tokens. Everything a request may ask of sampling is applied here, row by row independent of the batch.

Order (as vLLM's, so that the same parameters mean the same): banned ids and logit_bias, penalties, temperature,
min_p, top_k and top_p, then one draw (draw.py). Log-probabilities are of the raw logits. A draw uses one uniform number
made of (seed, position) alone: the same request gives the same tokens alone, in a batch, after a preemption, and on
another device up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.draw import Draw, Rules
from service.engine.messages import SamplingParams, TokenLogprob
from service.engine.request import Sampled, Sequence, State
from service.engine.transfer import Readback, column, to_device

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


class _Tally:
    """The tokens of a sequence from `begin` on, each once, and how often it has come. Kept from step to step, since a
    context may be long: what is known of it is not looked at again."""

    def __init__(self, begin: int) -> None:
        self._end = begin
        self._place: dict[int, int] = {}
        self._ids = self._counts = np.empty(0, dtype=np.int64)

    def of(self, tokens: list[int], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids, counts) of tokens[begin:end]; to be read before the next call."""
        new = tokens[self._end : end]
        if not self._place and new:
            ids, counts = np.unique(np.array(new, dtype=np.int64), return_counts=True)
            self._place = dict(zip(ids.tolist(), range(len(ids)), strict=True))
            self._ids, self._counts = _longer(ids), _longer(counts)
            new = []
        for token in new:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids, self._counts = _longer(self._ids), _longer(self._counts)
            self._ids[place] = token
            self._counts[place] += 1
        self._end = max(self._end, end)
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


def _longer(array: NDArray[np.int64]) -> NDArray[np.int64]:
    """With as many zeros behind, and some more."""
    return np.concatenate((array, np.zeros(len(array) + 16, dtype=np.int64)))


class Sampling:
    """What some sequences ask of sampling, found out once for all their steps."""

    def __init__(self, seqs: Seq[Sequence], before: Sampling | None = None) -> None:
        """before: that of the last step. What it knows of sequences is not found out again."""
        self.seqs = seqs
        self.rules = Rules(seqs).now
        """To be asked in each step."""
        self.moved = [i for i, seq in enumerate(seqs) if moves_logits(seq.sampling)]
        """Rows that ask for more than a draw from the logits as they are."""
        self.logprobs = {i: seq.sampling.logprobs for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None}
        """Row -> alternatives."""
        self.everything: dict[Sequence, _Tally] = {} if before is None else _kept(before.everything)
        """What is penalised for repetition: the prompt's tokens, too."""
        self.generated: dict[Sequence, _Tally] = {} if before is None else _kept(before.generated)
        """What is penalised for presence and frequency."""
        for seq in (seqs[row] for row in self.moved):
            p = seq.sampling
            if p.repetition_penalty != 1.0 and seq not in self.everything:
                self.everything[seq] = _Tally(0)
            if (p.presence_penalty or p.frequency_penalty) and seq not in self.generated:
                self.generated[seq] = _Tally(seq.num_prompt)


def _kept(tallies: dict[Sequence, _Tally]) -> dict[Sequence, _Tally]:
    """Of those that have not ended: whoever is not in this step comes back."""
    return {seq: tally for seq, tally in tallies.items() if seq.state is not State.FINISHED}


def sample(
    logits: Tensor,
    asked: Sampling,
    rules: NDArray[np.int32],
    draw: Draw,
    drawn: Tensor | None = None,
    pending: Pending | None = None,
) -> Drawn:
    """Draws one token per row of `logits` [n, vocabulary] (any float dtype), by `rules`, which are asked.rules() of
    this step. `drawn`: what `draw` gives for these logits as they are, where it is known already. Queues work, and
    waits for none."""
    if asked.moved or drawn is None:
        drawn = draw(_moved(logits, asked, pending) if asked.moved else logits, rules)
    logprobs = None
    if asked.logprobs:
        rows = column(list(asked.logprobs), torch.int64, logits.device)
        logprobs = Logprobs(logits[rows], drawn[rows].clamp(min=0), max(asked.logprobs.values()))
    return Drawn(drawn, Readback(drawn), logprobs, asked.logprobs)


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


def moves_logits(p: SamplingParams) -> bool:
    """Whether bans, biases or penalties are asked for."""
    return bool(
        p.logit_bias or p.min_tokens or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    )


class _Edits:
    """Changes to entries of logits, of all rows together: what a launch costs is paid once for a batch."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[NDArray[np.int64]] = []
        self.values: list[NDArray[np.float32]] = []
        self.last: list[Tensor] = []
        self.last_of: list[tuple[int, float]] = []

    def add(self, row: int, ids: Seq[int] | NDArray[np.int64], values: float | Seq[float] | NDArray) -> None:
        found = np.asarray(ids, dtype=np.int64)
        self.rows.append(row)
        self.ids.append(found)
        self.values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), len(found)))

    def add_last(self, row: int, token: Tensor, value: float) -> None:
        """token: [1] on the device."""
        self.last.append(token)
        self.last_of.append((row, value))

    def on(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
        """((rows, ids), values), None if there are none."""
        if not self.rows and not self.last:
            return None
        rows = np.repeat([*self.rows, *(row for row, _ in self.last_of)], [*map(len, self.ids), *[1] * len(self.last)])
        ids = np.concatenate(self.ids or [np.empty(0, dtype=np.int64)])
        values = np.concatenate((*self.values, np.array([value for _, value in self.last_of], dtype=np.float32)))
        ids_ = torch.cat((to_device(ids, device), *self.last))
        return (to_device(rows, device), ids_), to_device(values, device)


def _moved(logits: Tensor, asked: Sampling, pending: Pending | None) -> Tensor:
    """float32 copy of the logits with the bans, biases and penalties that are asked."""
    biases, repetition, presence, frequency = (_Edits() for _ in range(4))
    for row in asked.moved:
        seq = asked.seqs[row]
        p = seq.sampling
        if seq.num_generated < p.min_tokens and p.stop_token_ids:
            biases.add(row, p.stop_token_ids, float("-inf"))
        if p.logit_bias:
            biases.add(row, list(p.logit_bias), list(p.logit_bias.values()))
        last = pending(row) if pending is not None and seq.pending else None
        known = len(seq.tokens) - (last is not None)
        if (tally := asked.everything.get(seq)) is not None:
            repetition.add(row, tally.of(seq.tokens, known)[0], p.repetition_penalty)
            if last is not None:
                repetition.add_last(row, last, p.repetition_penalty)
        if (tally := asked.generated.get(seq)) is not None:
            ids, counts = tally.of(seq.tokens, known)
            if p.presence_penalty:
                presence.add(row, ids, p.presence_penalty)
            if p.frequency_penalty:
                frequency.add(row, ids, p.frequency_penalty * counts)
            if last is not None:
                for edits, penalty in ((presence, p.presence_penalty), (frequency, p.frequency_penalty)):
                    if penalty:
                        edits.add_last(row, last, penalty)
    out = logits.float().clone()
    if (edit := biases.on(out.device)) is not None:
        out.index_put_(*edit, accumulate=True)
    # A token may be named twice here: both times the same is written.
    if (edit := repetition.on(out.device)) is not None:
        at, penalties = edit
        values = out[at]
        out.index_put_(at, torch.where(values > 0, values / penalties, values * penalties))
    if (edit := presence.on(out.device)) is not None:
        at, penalties = edit
        out.index_put_(at, out[at] - penalties)
    if (edit := frequency.on(out.device)) is not None:
        at, penalties = edit
        out.index_put_(at, -penalties, accumulate=True)
    return out
