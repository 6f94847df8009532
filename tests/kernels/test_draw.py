"""The drawing kernel against the torch one, rule by rule and all in one batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from service.engine import draw, draw_triton
from service.engine.messages import SamplingParams
from service.engine.request import Sequence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULES = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.0, 0.3, 1.0, 2.5), (0, 1, 7, 2**63 - 1), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.05)
    )
][:: 1 if DEVICE.type == "cuda" else 7]
"""In the interpreter, which takes a tenth of a second for a row, some of them."""


def sequences(rules: list[dict], seed: int = 0) -> list[Sequence]:
    return [Sequence("r", 0, b"", [1, 2, 3], 3, SamplingParams(**rule), seed + i) for i, rule in enumerate(rules)]


def rows(count: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * scale
    return logits.to(dtype).to(DEVICE)


def both(logits: torch.Tensor, seqs: list[Sequence]) -> tuple[list[int], list[int]]:
    rules = draw.Rules(seqs).now()
    return draw_triton.draw(logits, rules).tolist(), draw.draw(logits, rules).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_the_same_tokens_as_without_a_kernel(dtype: torch.dtype, vocabulary: int) -> None:
    """Logits of 16 bits are full of equal values, so ties are cut as well."""
    ours, plain = both(rows(len(RULES), vocabulary, dtype), sequences(RULES))
    assert ours == plain
    assert len(set(ours)) > len(RULES) // 4


def test_ties_at_the_cut_are_kept_in_the_order_of_the_vocabulary() -> None:
    logits = torch.zeros(40, 50, device=DEVICE)
    logits[:, 10] = 1.0
    seqs = sequences([{"temperature": 1.0, "top_k": 4}] * 20 + [{"temperature": 1.0, "top_p": 0.1}] * 20)
    ours, plain = both(logits, seqs)
    assert ours == plain
    assert set(ours[:20]) == {10, 0, 1, 2}
    # 2.72 of 51.72 lie at place 10; 2.45 more are wanted.
    assert set(ours[20:]) == {10, 0, 1, 2}


def test_a_row_gives_the_same_token_in_any_batch() -> None:
    logits = rows(len(RULES), 3000, torch.bfloat16)
    seqs = sequences(RULES)
    together, _ = both(logits, seqs)
    for i in range(0, len(RULES), 4):
        alone, _ = both(logits[i : i + 1], seqs[i : i + 1])
        assert alone == [together[i]]


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_maximum_are_told(strange: float, temperature: float) -> None:
    logits = rows(3, 5000, torch.float32)
    logits[1, 3000] = strange
    ours, plain = both(logits, sequences([{"temperature": temperature}] * 3))
    assert ours == plain
    assert ours[1] == draw.NOT_FINITE
    assert min(ours[0], ours[2]) >= 0


def test_a_row_of_bans_alone_is_told() -> None:
    ours, plain = both(torch.full((1, 40), float("-inf"), device=DEVICE), sequences([{"temperature": 1.0}]))
    assert ours == plain == [draw.NOT_FINITE]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((12, 3000), float("-inf"), device=DEVICE)
    logits[:, 7] = -1000.0
    logits[:, 2999] = -1000.5
    ours, plain = both(logits, sequences([{"temperature": 1.0, "top_k": 50, "top_p": 0.99}] * 12))
    assert ours == plain
    assert set(ours) == {7, 2999}


def test_rules_of_greedy_rows_are_zeros() -> None:
    assert not draw.Rules(sequences([{"temperature": 0.0}, {"temperature": 1e-6, "top_p": 0.5}])).now().any()
