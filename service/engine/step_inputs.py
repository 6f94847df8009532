"""What a step hands to the device, as numpy arrays, out of what is true of its sequences.

What is the same in every step while the same sequences take part is in lineup.py; the page table is kept as well, and
gets the pages that are new (`PageTable`). What is left of a step in which all decode is to read one token and one
position of each sequence.
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from service.engine.attention import StepLayout
from service.engine.lineup import Lineup
from service.engine.request import PENDING, Scheduled, Sequence

_PAGES, _COMPUTED = map(attrgetter, ("pages", "num_computed"))
_SPARE = 16
"""Pages for which the kept table has room beyond the most that a sequence has."""
_NO_PAGES: list[int] = []
"""Nobody's."""


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
