"""Which graph a step gets, and where its inputs lie (the graphs themselves: tests/gpu)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from service.engine.attention import StepLayout
from service.engine.attention_triton import TILE, tiles
from service.engine.graphs import LARGE_VARIANTS, MIXED_TOKENS, VARIANTS, Shape, _Places, decode_sizes, shapes


def layout(*counts: int) -> StepLayout:
    lens = np.array(counts, dtype=np.int32)
    return StepLayout(
        slots=np.arange(lens.sum()),
        query_lens=lens,
        context_lens=lens + 100,
        page_table=np.zeros((len(lens), 1), dtype=np.int32),
        num_decode=int((lens == 1).sum()),
    )


@pytest.mark.parametrize("most", [1, 3, 64, 100, 256, 300, 1000])
def test_every_number_of_decoding_sequences_has_a_graph_little_larger(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < max(16, size / 4)


def test_steps_of_prompts_have_shapes_up_to_the_budget() -> None:
    mixed = [shape for shape in shapes(64, 1000) if shape.tiles]
    assert [shape.tokens for shape in mixed] == [size for size in MIXED_TOKENS if size <= 1000]
    assert all(shape.sequences == 64 for shape in mixed)
    assert max(shape.sequences for shape in shapes(1000, 2048) if shape.tiles) == 256


@pytest.mark.parametrize("counts", [(1,) * 63 + (512,), (300, 212), (17,) * 16, (2048,)])
def test_usual_steps_fit_with_their_tiles(counts: tuple[int, ...]) -> None:
    step, tokens = layout(*counts), sum(counts)
    found = next(shape for shape in shapes(256, 2048) if shape.tiles and shape.fits(tokens, step))
    assert len(tiles(step, TILE)[0]) <= found.tiles
    assert found.tokens - tokens < max(64, tokens / 2)


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(48, 48), Shape(576, 256, 36)])
def test_inputs_do_not_overlap_and_the_page_table_is_last(shape: Shape) -> None:
    places = _Places(shape, 17, large=True)
    parts = sorted(places.of.items(), key=lambda item: item[1].start)
    assert parts[-1][0] == "table"
    for (_, one), (_, other) in pairwise(parts):
        assert one.stop <= other.start
        assert other.start % 16 == 0
    assert places.of["table"].stop <= places.size
    room = places.of["plan"].stop - places.of["plan"].start
    assert all(plan.size <= room for plan in places.plans.values())
    assert set(places.variants) == set(VARIANTS) | (set(LARGE_VARIANTS) if shape.tiles else set())
    assert all(plan.entries >= shape.tokens for plan in places.plans.values())
