"""The bound of prompts that ride with decoding sequences follows the model's size and the device."""

from __future__ import annotations

import pytest

from adapters.manifest import Manifest, Module
from service.engine import budgets
from service.engine.budgets import CPU_PREFILL, FULL_FROM, Filling, prefill_tokens_per_step, riding_tokens


def manifest(parameters: int, dtype: str = "bfloat16") -> Manifest:
    modules = (Module("a", "linear", 1000, parameters // 1000), Module("head", "output", 4096, 128_000))
    return Manifest("f", "A", "a", dtype, 128_000, 64, modules)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "tokens"), [(973_000_000, 3648), (6_980_000_000, 512), (13_200_000_000, 256), (400_000_000_000, 64)]
)
def test_a_larger_model_gets_fewer_tokens(parameters: int, tokens: int) -> None:
    assert prefill_tokens_per_step("cuda", manifest(parameters)) == tokens


def test_slower_devices_and_dtypes_get_fewer() -> None:
    small = manifest(973_000_000)
    assert prefill_tokens_per_step("cuda", small, multiprocessors=66) == 1792
    assert prefill_tokens_per_step("cuda", manifest(973_000_000, "float32")) < 512
    assert prefill_tokens_per_step("cpu", small) == CPU_PREFILL


@pytest.mark.parametrize("bound", [64, 128, 512])
def test_steps_of_a_crowd_fill_a_size_and_few_sequences_keep_the_bound(bound: int) -> None:
    assert {riding_tokens(decoding, bound) for decoding in range(budgets.CROWD + 1)} == {bound}
    for decoding in range(budgets.CROWD + 1, 1500):
        prompts = riding_tokens(decoding, bound)
        assert prompts >= bound
        assert prompts == bound or decoding + prompts in budgets.STEP_SIZES
        assert prompts <= max(bound, budgets.CROWD_TOKENS - decoding)


def test_prompts_four_times_as_long_as_answers_find_room_for_256() -> None:
    """As many prompts come in as the sequences need while they last, up to those that fill a step's largest size."""
    assert all(riding_tokens(decoding, 512) >= 4 * decoding for decoding in range(1, 257))
    assert all(riding_tokens(decoding, 512) < 4 * decoding for decoding in range(257, 400))


H100 = {
    64: 6.8,
    128: 7.3,
    192: 8.0,
    256: 8.4,
    320: 10.0,
    384: 10.7,
    512: 13.0,
    576: 15.4,
    640: 16.3,
    768: 19.0,
    1024: 25.5,
}
"""ms of a step of an 8B model, by the tokens to which it is padded."""


def test_prompts_are_cut_where_a_token_of_them_costs_least() -> None:
    filling = Filling(H100)
    assert [filling.tokens(decoding, 512) for decoding in (16, 31, 63)] == [496, 481, 449]
    assert filling.tokens(63, 192) == 192, "by 193 + 63 tokens a size is full, and none before it is cheaper"
    assert filling.tokens(63, 300) == 300, "in a size of 384 they are cheaper than 257 in one of 320 that is full"
    assert filling.tokens(64, 64) == 64


def test_where_those_that_decode_fill_the_budget_nothing_rides() -> None:
    assert Filling({64: 6.8}).tokens(64, 0) == 0
    assert Filling({64: 6.8}).tokens(63, 1) == 1


def test_few_sequences_unknown_sizes_and_steps_that_are_not_padded_keep_the_bound() -> None:
    assert {Filling(H100).tokens(decoding, 512) for decoding in range(FULL_FROM)} == {512}
    assert Filling({}).tokens(63, 512) == 512
    assert Filling(H100).tokens(63, 1000) == 1000


@pytest.mark.parametrize("bound", [64, 200, 512])
def test_what_rides_fills_a_size_or_is_all_of_the_bound(bound: int) -> None:
    filling = Filling(H100)
    for decoding in range(FULL_FROM, 400):
        tokens = filling.tokens(decoding, bound)
        assert 0 < tokens <= bound
        assert tokens == bound or decoding + tokens in H100


def test_of_sizes_alike_the_smallest_is_taken() -> None:
    """So that streams wait less for their next token, and the noise of one measurement decides nothing."""
    flat = Filling({128: 10.0, 256: 20.4, 384: 30.0})
    assert flat.tokens(28, 356) == 356, "100 for 10.0, 228 for 20.4: the fixed part weighs more in small ones"
    assert Filling({228: 20.0, 428: 39.8}).tokens(28, 400) == 200
