"""The arrays of a step are what its sequences say, whatever the steps before were."""

from __future__ import annotations

import random

import pytest

from service.engine.messages import SamplingParams, TokenLogprob
from service.engine.request import PENDING, Scheduled, Sequence
from service.engine.step_inputs import StepInputs

SIZE = 4
MIXES = ((), ((1, 1.0),), ((2, 1.0),), ((1, 0.5), (2, 0.5)))


def sequence(rng: random.Random, number: int) -> Sequence:
    tokens = [rng.randrange(100) for _ in range(rng.randint(1, 30))]
    asks = rng.random() < 0.2
    return Sequence(
        request_id=str(number), index=0, client=b"", tokens=tokens, num_prompt=len(tokens), seed=0,
        sampling=SamplingParams(prompt_logprobs=1 if asks else None), rows=rng.choice(MIXES),
        prompt_logprobs=[None] if asks else None,
    )  # fmt: skip


def check(inputs: StepInputs, items: list[Scheduled], drawn: dict[Sequence, int]) -> None:
    lineup, ids, positions, layout = inputs.build(items, drawn)
    assert sorted(lineup.order) == list(range(len(items)))
    ordered = [items[i] for i in lineup.order]
    assert lineup.seqs == [item.seq for item in ordered]
    assert [item.count == 1 for item in ordered] == [i < layout.num_decode for i in range(len(items))]
    assert layout.query_lens.tolist() == [item.count for item in ordered]
    start, wanted, prompts = 0, [], []
    segments = {}
    for row, item in enumerate(ordered):
        seq, begin, end = item.seq, item.seq.num_computed, item.seq.num_computed + item.count
        expected = [-1 - drawn[seq] if token == PENDING else token for token in seq.tokens[begin:end]]
        piece = slice(start, start + item.count)
        assert ids[piece].tolist() == expected
        assert positions[piece].tolist() == list(range(begin, end))
        assert layout.slots[piece].tolist() == [seq.pages[p // SIZE] * SIZE + p % SIZE for p in range(begin, end)]
        assert layout.context_lens[row] == end
        width = layout.page_table.shape[1]
        assert layout.page_table[row].tolist() == (seq.pages + [0] * width)[:width]
        if seq.prompt_logprobs is not None:
            known = len(seq.prompt_logprobs) - 1
            asked = [p for p in range(begin, min(end, seq.num_prompt - 1)) if p >= known]
            if asked:
                prompts.append((seq, len(wanted), [seq.tokens[p + 1] for p in asked], 1))
            wanted += [start + p - begin for p in asked]
        if item.samples:
            wanted.append(start + item.count - 1)
        for row_weight in seq.rows:
            segments.setdefault(row_weight[0], set()).update(range(start, start + item.count))
        start += item.count
    assert layout.page_table.shape[1] == -(-int(layout.context_lens.max()) // SIZE)
    assert lineup.wanted.tokens.tolist() == wanted
    assert lineup.wanted.prompts == prompts
    assert [items[place].seq for place in lineup.places] == lineup.drawing == [i.seq for i in ordered if i.samples]
    assert lineup.row_of == {seq: row for row, seq in enumerate(lineup.drawing)}
    if lineup.plan is None:
        assert not segments
        return
    found = {}
    for s, arena_row in enumerate(lineup.plan.seg_row.tolist()):
        piece = slice(lineup.plan.seg_start[s], lineup.plan.seg_start[s + 1])
        found.setdefault(arena_row, set()).update(lineup.plan.tokens[piece].tolist())
    assert found == segments


@pytest.mark.parametrize("seed", range(20))
def test_steps_one_after_the_other(seed: int) -> None:
    """Sequences come, decode, have pages exchanged, are preempted, come back with other pages and rows, and end."""
    rng = random.Random(seed)
    inputs, pages, number = StepInputs(SIZE), iter(range(1, 10**6)), 0
    running: list[Sequence] = []
    drawn: dict[Sequence, int] = {}
    for _ in range(120):
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            running.append(sequence(rng, number))
            number += 1
        rng.shuffle(running) if rng.random() < 0.05 else None
        steady = rng.random() < 0.7
        items = []
        for seq in running:
            decodes = len(seq.tokens) - seq.num_computed == 1
            if not steady and not decodes and rng.random() < 0.3:
                continue
            count = min(len(seq.tokens) - seq.num_computed, 1 if decodes else rng.choice([1, 3, 50]))
            end = seq.num_computed + count
            seq.pages.extend(next(pages) for _ in range(-(-end // SIZE) - len(seq.pages)))
            items.append(Scheduled(seq, count, samples=end == len(seq.tokens)))
        if not items:
            continue
        check(inputs, items, drawn)
        drawn = {item.seq: row for row, item in enumerate(item for item in items if item.samples)}
        for item in items:
            seq = item.seq
            if seq.tokens[-1] == PENDING:
                seq.tokens[-1] = rng.randrange(100)
            if seq.prompt_logprobs is not None:
                known = min(seq.num_computed + item.count + 1, seq.num_prompt)
                seq.prompt_logprobs += [TokenLogprob(0, 0.0, [])] * (known - len(seq.prompt_logprobs))
            seq.num_computed += item.count
            if item.samples:
                seq.tokens.append(PENDING if rng.random() < 0.5 else rng.randrange(100))
                seq.prompt_logprobs = None
            if rng.random() < 0.05:
                seq.pages = [*seq.pages[:-1], next(pages)]
            elif rng.random() < 0.03:
                if seq.tokens[-1] == PENDING:
                    seq.tokens[-1] = 7
                seq.pages, seq.num_computed, seq.rows = [], 0, rng.choice(MIXES)
            elif len(seq.tokens) > 60 or rng.random() < 0.01:
                running.remove(seq)
