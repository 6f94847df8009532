"""Who takes part in a step, and what follows from that alone: from step to step it stays the same while nobody comes or
goes. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from adapters.plan import LoraPlan, Rows, build_plan, order_by_adapter
from service.engine.request import Scheduled, Sequence

_SEQ, _COUNT, _SAMPLES, _ROWS = map(attrgetter, ("seq", "count", "samples", "rows"))


@dataclass(slots=True)
class Wanted:
    """Which tokens of a step need logits: only where a token is drawn or a prompt's log-probabilities are asked."""

    tokens: NDArray[np.int64]
    """Index in the step, by row of logits."""
    rows: Collection[int]
    """Those from which a token is drawn, in the order of Lineup.drawing."""
    prompts: list[tuple[Sequence, int, list[int], int]]
    """(sequence, first row, the tokens that follow those of the rows, alternatives)"""


class Lineup:
    """Sequences with so many tokens each. [S] is in the order of their tokens in the step: those with one token first
    (attention treats them together), and neighbours share adapters."""

    def __init__(self, items: list[Scheduled]) -> None:
        self._key = seqs, counts, samples, rows = _key(items)
        by_adapter = order_by_adapter(rows)
        self.order = [i for i in by_adapter if counts[i] == 1]
        """Places in the batch."""
        self.num_decode = len(self.order)
        self.order += [i for i in by_adapter if counts[i] > 1]
        self.seqs = [seqs[i] for i in self.order]
        self.counts = [counts[i] for i in self.order]
        self.query_lens = np.array(self.counts, dtype=np.int32)
        ends = np.cumsum(self.query_lens, dtype=np.int64)
        starts = ends - self.query_lens
        self.owner = np.repeat(np.arange(len(seqs)), self.query_lens)
        """[T] whose a token is."""
        self.within = np.arange(len(self.owner)) - starts[self.owner]
        """[T] how many of its tokens are before it in this step."""
        spans = zip(starts.tolist(), self.counts, [rows[i] for i in self.order], strict=True)
        self.plan: LoraPlan | None = build_plan(spans)
        self.samples = [samples[i] for i in self.order]
        self.places = [place for place, drawn in zip(self.order, self.samples, strict=True) if drawn]
        """In the batch, of those from which a token is drawn."""
        self.drawing = [seqs[place] for place in self.places]
        """The same as sequences."""
        self.row_of = {seq: row for row, seq in enumerate(self.drawing)}
        self._wanted: Wanted | None = None
        if not [seq for seq in seqs if seq.prompt_logprobs is not None]:
            self._wanted = Wanted((ends - 1)[self.samples], range(len(self.places)), [])

    def is_of(self, items: list[Scheduled]) -> bool:
        """Whether this is the lineup of these items too."""
        return _key(items) == self._key

    @property
    def wanted(self) -> Wanted:
        """Changes from step to step where prompts' log-probabilities are asked for."""
        return self._find_wanted() if self._wanted is None else self._wanted

    def _find_wanted(self) -> Wanted:
        tokens: list[int] = []
        rows: list[int] = []
        prompts: list[tuple[Sequence, int, list[int], int]] = []
        start = 0
        for seq, count, drawn in zip(self.seqs, self.counts, self.samples, strict=True):
            if seq.prompt_logprobs is not None:
                # Row of token t predicts token t + 1. A recomputed sequence has some already; what the step in flight
                # will bring is all before num_computed.
                first = max(seq.num_computed, len(seq.prompt_logprobs) - 1)
                last = min(seq.num_computed + count, seq.num_prompt - 1)
                if first < last:
                    following = seq.tokens[first + 1 : last + 1]
                    prompts.append((seq, len(tokens), following, seq.sampling.prompt_logprobs or 0))
                    tokens += range(start + first - seq.num_computed, start + last - seq.num_computed)
            if drawn:
                rows.append(len(tokens))
                tokens.append(start + count - 1)
            start += count
        return Wanted(np.array(tokens, dtype=np.int64), rows, prompts)


def _key(items: list[Scheduled]) -> tuple[list[Sequence], list[int], list[bool], list[Rows]]:
    """What a lineup is made of, in the order of the batch. Sequences are equal if they are the same one."""
    seqs = list(map(_SEQ, items))
    return seqs, list(map(_COUNT, items)), list(map(_SAMPLES, items)), list(map(_ROWS, seqs))
