"""The batch plan: every (token, adapter, weight) of the batch stands in it exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.plan import build_plan, covering, order_by_adapter, parted

rows_of_a_sequence = st.dictionaries(st.integers(0, 6), st.sampled_from([-1.0, 0.25, 1.0]), max_size=4).map(
    lambda mix: tuple(mix.items())
)
batches = st.lists(st.tuples(st.integers(1, 5), rows_of_a_sequence), min_size=1, max_size=12)


def spans_of(batch):
    start = 0
    for count, rows in batch:
        yield start, count, rows
        start += count


@given(batches)
def test_the_plan_holds_every_token_of_every_adapter_once(batch):
    wanted = Counter(
        (token, row, weight)
        for start, count, rows in spans_of(batch)
        for token in range(start, start + count)
        for row, weight in rows
    )
    plan = build_plan(spans_of(batch))
    if plan is None:
        assert not wanted
        return
    found = Counter()
    for s, row in enumerate(plan.seg_row.tolist()):
        piece = slice(plan.seg_start[s], plan.seg_start[s + 1])
        found.update((int(t), row, float(w)) for t, w in zip(plan.tokens[piece], plan.weights[piece], strict=True))
    assert found == wanted
    assert plan.seg_start[-1] == len(plan.tokens) == len(plan.weights)
    assert plan.rows == {row for _, row, _ in wanted}


@given(batches)
def test_no_token_stands_twice_in_a_wave_and_no_row_in_two_segments_of_it(batch):
    plan = build_plan(spans_of(batch))
    if plan is None:
        return
    assert [b for b, _ in plan.waves] == [0, *(e for _, e in plan.waves[:-1])]
    assert plan.waves[-1][1] == len(plan.seg_row)
    for begin, end in plan.waves:
        tokens = plan.tokens[plan.seg_start[begin] : plan.seg_start[end]]
        assert len(np.unique(tokens)) == len(tokens)
        assert len(set(plan.seg_row[begin:end].tolist())) == end - begin


@given(batches)
def test_the_adapters_of_a_mix_stand_in_waves_in_the_order_given(batch):
    plan = build_plan(spans_of(batch))
    found = {}
    for begin, end in plan.waves if plan is not None else ():
        for s in range(begin, end):
            for token in plan.tokens[plan.seg_start[s] : plan.seg_start[s + 1]].tolist():
                found.setdefault(token, []).append(int(plan.seg_row[s]))
    for start, count, rows in spans_of(batch):
        for token in range(start, start + count):
            assert found.get(token, []) == [row for row, _ in rows]


def test_ordered_by_adapter_segments_are_contiguous_slices():
    batch = [((3, 1.0),), (), ((1, 1.0),), ((3, 1.0),), ((1, 1.0),)]
    order = order_by_adapter(batch)
    plan = build_plan((i, 1, batch[j]) for i, j in enumerate(order))
    assert plan is not None
    assert plan.tokens.tolist() == [0, 1, 2, 3]
    assert plan.seg_row.tolist() == [1, 3]
    assert batch[order[-1]] == ()


def test_a_weight_of_zero_costs_nothing_and_a_row_named_twice_is_an_error():
    assert build_plan([(0, 4, ((2, 0.0),))]) is None
    with pytest.raises(ValueError, match="names a row twice"):
        build_plan([(0, 1, ((2, 1.0), (2, 0.5)))])


@given(batches, st.integers(0, 3))
def test_a_covering_plan_is_the_same_with_the_other_tokens_in_its_first_wave(batch, more):
    plan = build_plan(spans_of(batch))
    if plan is None:
        return
    tokens = sum(count for count, _ in batch) + more
    whole = covering(plan, tokens)
    first, last = whole.waves[0]
    wave = whole.tokens[whole.seg_start[first] : whole.seg_start[last]]
    assert sorted(wave.tolist()) == list(range(tokens))

    def held(of):
        entries = Counter()
        for number, (begin, end) in enumerate(of.waves):
            for segment in range(begin, end):
                for p in range(of.seg_start[segment], of.seg_start[segment + 1]):
                    if of.seg_row[segment] >= 0:
                        entries[number, of.seg_row[segment], of.tokens[p], of.weights[p]] += 1
        return entries

    assert held(whole) == held(plan)
    assert (whole.seg_row == -1).sum() <= 1
    assert whole.seg_start[-1] == len(whole.tokens) == len(whole.weights)
    assert whole.waves[-1][1] == len(whole.seg_row) == len(whole.seg_start) - 1


@given(batches, st.data())
def test_a_plan_in_two_parts_holds_what_it_held(batch, data):
    """And waves stay waves: a token of a later one stands in the first of its part."""
    plan = build_plan(spans_of(batch))
    if plan is None:
        return
    end = plan.seg_start[plan.waves[0][1]]
    mixed = set(plan.tokens[end:].tolist())
    chosen = np.zeros(len(plan.tokens), dtype=bool)
    chosen[:end] = [token not in mixed and data.draw(st.booleans()) for token in plan.tokens[:end].tolist()]
    parts = parted(plan, chosen)
    assert (parts[0] is None) == (not chosen.any())
    assert (parts[1] is None) == bool(chosen.all())

    def entries(each):
        rows = np.repeat(each.seg_row, np.diff(each.seg_start))
        return Counter(zip(each.tokens.tolist(), rows.tolist(), each.weights.tolist(), strict=True))

    assert sum((entries(each) for each in parts if each is not None), Counter()) == entries(plan)
    for each in parts:
        if each is not None:
            assert each.waves[0][0] == 0
            assert each.waves[-1][1] == len(each.seg_row)
            assert all(a[1] == b[0] and b[0] < b[1] for a, b in pairwise(each.waves))
            first = set(each.tokens[: each.seg_start[each.waves[0][1]]].tolist())
            assert set(each.tokens.tolist()) <= first
