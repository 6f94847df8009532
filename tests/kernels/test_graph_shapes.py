"""Which graph a step gets, and where its inputs lie (the graphs themselves: tests/gpu)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from adapters.kernels import backend
from service.engine.attention import StepLayout
from service.engine.budgets import STEP_SIZES
from service.engine.build import MAX_ADAPTERS_PER_REQUEST, MAX_RANK
from service.engine.graph_shapes import (
    BOTH_VARIANTS,
    DECODE_VARIANTS,
    LARGE_VARIANT,
    SAME_VARIANTS,
    TAIL_VARIANTS,
    VARIANTS,
    Need,
    Shape,
    candidates,
    decode_sizes,
    one_shape,
    shapes,
    variants_of_shapes,
)
from service.engine.graphs import _Places
from service.engine.step_arrays import SMALL_TILE, TILE, tiles


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


def test_a_small_shape_s_first_graph_with_adapters_is_one_that_starts_early() -> None:
    """Whose whole step runs before it is captured: attention that starts early is compiled then."""
    every = variants_of_shapes(256, 2048, tails=True)
    small = [variants for shape, variants in every.items() if shape.tokens <= backend.EARLY_TOKENS and not shape.tiles]
    assert len(small) >= 6
    for nothing, first, *_ in small:
        assert nothing is None
        assert first is not None
        assert first.rank
        assert not first.slots


def test_steps_of_prompts_have_shapes_up_to_the_budget() -> None:
    mixed = [shape for shape in shapes(64, 1000) if shape.tiles]
    assert [shape.tokens for shape in mixed] == [*(size for size in STEP_SIZES if size <= 1000), 1000]
    assert all(shape.sequences == 64 for shape in mixed)
    assert max(shape.sequences for shape in shapes(1000, 2048) if shape.tiles) == 256
    for budget, wanted in ((2048, 2048), (8192, 2048), (2000, 2000), (700, 700), (16, 16)):
        mixed = [shape for shape in shapes(16, budget) if shape.tiles]
        assert max(shape.tokens for shape in mixed) == wanted
        assert all(len(tiles(layout(shape.tokens), SMALL_TILE)[0]) <= shape.tiles for shape in mixed)


@pytest.mark.parametrize("counts", [(1,) * 63 + (512,), (300, 212), (17,) * 16, (2048,)])
def test_usual_steps_fit_with_their_tiles(counts: tuple[int, ...]) -> None:
    step, tokens = layout(*counts), sum(counts)
    found = next(shape for shape in shapes(256, 2048) if shape.tiles and shape.fits(tokens, step))
    assert len(tiles(step, TILE)[0]) <= found.tiles
    assert found.tokens - tokens < max(64, tokens / 2)


@pytest.mark.parametrize("shape", [Shape(1, 1), Shape(48, 48), Shape(576, 256, 36, 256), one_shape(64, 256)])
def test_inputs_do_not_overlap_and_the_page_table_is_last(shape: Shape) -> None:
    variants = {None, *DECODE_VARIANTS, LARGE_VARIANT, *SAME_VARIANTS, *TAIL_VARIANTS, *BOTH_VARIANTS}
    places = _Places(shape, 17, tuple(variants))
    parts = sorted(places.of.items(), key=lambda item: item[1].start)
    assert parts[-1][0] == "table"
    for (_, one), (_, other) in pairwise(parts):
        assert one.stop <= other.start
        assert other.start % 16 == 0
    assert places.of["table"].stop <= places.size
    length = places.of["plan"].stop - places.of["plan"].start
    assert all(plan.size <= length for plan in places.plans.values())
    assert set(places.plans) == variants - {None}
    for variant, plans in places.plans.items():
        assert (plans.tail is not None) == (variant.slots > 0)
        assert (plans.beside is not None) == (variant.rank > 0)
        assert plans.tail is None or plans.tail.tokens == shape.tokens
        assert plans.beside is None or plans.beside.entries >= shape.tokens


@pytest.mark.parametrize("counts", [(1,), (1,) * 256, (256,), (17,) * 15, (1,) * 200 + (56,), (2,) * 128, (129, 127)])
def test_every_step_fits_the_one_shape_of_the_deterministic_engine(counts: tuple[int, ...]) -> None:
    shape = one_shape(256, 256)
    step = replace(layout(*counts), num_decode=0)
    assert shape.fits(sum(counts), step)
    assert len(tiles(step, SMALL_TILE)[0]) <= shape.tiles
    assert shape.wanted == shape.tokens


@pytest.mark.parametrize(
    ("rank", "waves", "wanted"), [(16, 1, (16, 1)), (17, 1, (64, 1)), (100, 1, (512, 1)), (8, 2, (512, 4))]
)
def test_a_decode_step_launches_nothing_for_mixes_that_it_has_not(
    rank: int, waves: int, wanted: tuple[int, int]
) -> None:
    need = Need(rank, waves, 64)
    found = candidates((*TAIL_VARIANTS, *DECODE_VARIANTS), need, need)[0]
    assert (found.rank, found.waves) == wanted


def served(whole: Need, rest: Need | None) -> list[tuple[int, int, int, int]]:
    found = candidates((LARGE_VARIANT, *VARIANTS, *BOTH_VARIANTS, *TAIL_VARIANTS), whole, rest)
    return [(v.slots, v.rank, v.waves, v.block_m) for v in found]


def test_a_step_whose_adapters_all_stand_in_the_tails_needs_nothing_beside() -> None:
    assert served(Need(16, 1, 64), None)[:4] == [(1, 0, 0, 0), (4, 0, 0, 0), (4, 16, 1, 16), (4, 64, 1, 16)]


@pytest.mark.parametrize(
    ("rest", "wanted"),
    [
        (Need(8, 1, 16), [(4, 16, 1, 16), (4, 64, 1, 16), (4, 512, 4, 16)]),
        (Need(16, 1, 64), [(4, 16, 1, 16), (4, 64, 1, 16), (4, 512, 4, 16)]),
        (Need(40, 1, 16), [(4, 64, 1, 16), (4, 512, 4, 16)]),
        (Need(8, 2, 16), [(4, 512, 4, 16)]),
        (Need(40, 1, 64), [(4, 64, 1, 16), (4, 512, 4, 16)]),
        (Need(128, 1, 64), []),
        (Need(16, 5, 16), []),
    ],
)
def test_the_others_are_computed_beside_the_product(rest: Need, wanted: list[tuple[int, int, int, int]]) -> None:
    found = served(Need(max(16, rest.rank), rest.waves, 64), rest)
    assert found[: len(wanted)] == wanted
    assert not any(slots for slots, *_ in found[len(wanted) :])


@pytest.mark.parametrize(
    ("rank", "waves", "block_m", "wanted"),
    [
        (16, 1, 16, [(16, 16), (64, 16), (512, 16), (512, 64)]),
        (30, 1, 64, [(64, 16), (512, 64), (512, 16)]),
        (65, 1, 64, [(512, 64), (512, 16)]),
        (16, 2, 64, [(512, 64), (512, 16)]),
        (16, 5, 64, []),
    ],
)
def test_without_tails_the_least_class_of_ranks_comes_first(
    rank: int, waves: int, block_m: int, wanted: list[tuple[int, int]]
) -> None:
    need = Need(rank, waves, block_m)
    found = candidates((LARGE_VARIANT, *VARIANTS), need, need)
    assert [(v.rank, v.block_m) for v in found] == wanted


@pytest.mark.parametrize(("most", "budget"), [(1, 768), (48, 2048), (64, 1000), (256, 2048), (300, 2048)])
@pytest.mark.parametrize("tails", [False, True])
def test_every_mix_has_a_graph_not_much_larger_than_its_step(most: int, budget: int, *, tails: bool) -> None:
    every = variants_of_shapes(most, budget, tails=tails)
    assert list(every) == shapes(most, budget)
    for kind in (False, True):
        alike = [shape for shape in every if bool(shape.tiles) == kind]
        for shape in alike:
            for rank in (1, 64, MAX_RANK):
                for waves in range(1, MAX_ADAPTERS_PER_REQUEST + 1):
                    need = Need(rank, waves, 64)
                    serving = next(
                        other
                        for other in alike
                        if other.tokens >= shape.tokens
                        and candidates([v for v in every[other] if v is not None], need, need)
                    )
                    assert waves > 4 or serving == shape
    many = [shape for shape, those in every.items() if any(v is not None and v.waves > 4 for v in those)]
    assert len(many) <= 4, "each costs a start twice what others do"


def test_its_variants_hold_whatever_a_request_may_name() -> None:
    assert max(variant.waves for variant in SAME_VARIANTS) == MAX_ADAPTERS_PER_REQUEST
    assert {variant.rank for variant in SAME_VARIANTS} == {MAX_RANK}
    assert len({variant.block_m for variant in SAME_VARIANTS}) == 1
