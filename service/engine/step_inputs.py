"""What a step hands to the device, as numpy arrays, out of what is true of its sequences. No torch.

As long as the same sequences take part with as many tokens each, most of it stays the same from step to step: their
order, the LoRA plan, which tokens are sampled from (`Lineup`). So does the page table but for the pages that are new
(`PageTable`). What is left of a step in which all decode is to read one token and one position of each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from adapters.plan import LoraPlan, Rows, build_plan, order_by_adapter
from service.engine.attention import StepLayout
from service.engine.request import PENDING, Scheduled, Sequence

_SEQ, _COUNT, _SAMPLES, _ROWS, _PAGES, _COMPUTED = map(
    attrgetter, ("seq", "count", "samples", "rows", "pages", "num_computed")
)
_SPARE = 16
"""Pages for which the kept table has room beyond the most that a sequence has."""
_NO_PAGES: list[int] = []
"""Nobody's."""


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
    """Who takes part in a step, with how many tokens, and what follows from that alone. [S] by sequence, in order of
    their tokens: those with one token first (attention treats them together), and neighbours share adapters."""

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


class PageTable:
    """Pages of the sequences of the last step, a row each. Of one that was in it, only new pages are written: its list
    has grown, or is another one (`Sequence.pages`)."""

    def __init__(self) -> None:
        self._seqs: list[Sequence] = []
        self._lists: list[list[int]] = []
        self._lengths: list[int] = []
        """How much of each list stands in the table."""
        self._table = np.zeros((1, 0), dtype=np.int32)

    def of(self, seqs: list[Sequence]) -> NDArray[np.int32]:
        """[S, pages] of `seqs`, with zeros behind each one's. Written to again in the next step."""
        lists = list(map(_PAGES, seqs))
        lengths = list(map(len, lists))
        most = max(lengths)
        if seqs != self._seqs or most > self._table.shape[1]:
            self._arrange(list(seqs), most + _SPARE)
        table = self._table
        rows = zip(lists, self._lists, lengths, self._lengths, strict=True)
        for row, (pages, known, length, before) in enumerate(rows):
            if pages is not known:
                table[row, :length] = pages
                table[row, length:] = 0
            elif length != before:
                table[row, before:length] = pages[before:]
        self._lists, self._lengths = lists, lengths
        return table

    def _arrange(self, seqs: list[Sequence], width: int) -> None:
        """A row for each of `seqs`. What a new one's holds does not matter: its list is not known."""
        row_of = {seq: row for row, seq in enumerate(self._seqs)}
        before = [row_of.get(seq, -1) for seq in seqs]
        table = np.zeros((len(seqs), width), dtype=np.int32)
        kept = self._table[before, :width]
        table[:, : kept.shape[1]] = kept
        lists = [self._lists[row] if row >= 0 else _NO_PAGES for row in before]
        lengths = [self._lengths[row] if row >= 0 else 0 for row in before]
        self._seqs, self._lists, self._lengths, self._table = seqs, lists, lengths, table


class StepInputs:
    """Builds the arrays of one step after the other."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pages = PageTable()
        self._lineup: Lineup | None = None

    def build(
        self, items: list[Scheduled], drawn_before: dict[Sequence, int]
    ) -> tuple[Lineup, NDArray[np.int64], NDArray[np.int64], StepLayout]:
        """(lineup, ids, positions, layout) of a step. A token that is pending has an id of -1 - i, if it is the i-th
        of those drawn before."""
        lineup = self._lineup
        if lineup is None or not lineup.is_of(items):
            lineup = self._lineup = Lineup(items)
        size = self.page_size
        computed = np.array(list(map(_COMPUTED, lineup.seqs)), dtype=np.int64)
        positions = computed[lineup.owner] + lineup.within
        contexts = (computed + lineup.query_lens).astype(np.int32)
        table = self._pages.of(lineup.seqs)
        layout = StepLayout(
            slots=table[lineup.owner, positions // size].astype(np.int64) * size + positions % size,
            query_lens=lineup.query_lens,
            context_lens=contexts,
            page_table=table[:, : -(-int(contexts.max()) // size)].copy(),
            num_decode=lineup.num_decode,
        )
        return lineup, _ids(lineup, drawn_before), positions, layout


def _ids(lineup: Lineup, drawn_before: dict[Sequence, int]) -> NDArray[np.int64]:
    decode = lineup.num_decode
    ids = [
        token if (token := seq.tokens[seq.num_computed]) != PENDING else -1 - drawn_before[seq]
        for seq in lineup.seqs[:decode]
    ]
    for seq, count in zip(lineup.seqs[decode:], lineup.counts[decode:], strict=True):
        ids += seq.tokens[seq.num_computed : seq.num_computed + count]
        if ids[-1] == PENDING:
            ids[-1] = -1 - drawn_before[seq]
    return np.array(ids, dtype=np.int64)
