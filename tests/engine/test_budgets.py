"""The bound of prompts that ride with decoding sequences follows the model's size and the device."""

from __future__ import annotations

import pytest

from adapters.manifest import Manifest, Module
from service.engine.budgets import CPU_PREFILL, prefill_tokens_per_step


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
