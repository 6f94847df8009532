"""The bound of prompts that ride with decoding sequences follows the model's size and the device."""

from __future__ import annotations

import pytest

from adapters.manifest import Manifest, Module
from service.engine import budgets
from service.engine.budgets import CPU_PREFILL, prefill_tokens_per_step, riding_tokens


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
