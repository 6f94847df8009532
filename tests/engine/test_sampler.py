"""Sampling against transformers' own logits processors, and its independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine import draw, sampler
from service.engine.messages import SamplingParams
from service.engine.request import PENDING, Sampled, Sequence, State

VOCABULARY = 97


def sequence(seed: int = 0, prompt: tuple[int, ...] = (5, 6, 7), generated: tuple[int, ...] = (), **params) -> Sequence:
    tokens = [*prompt, *generated]
    return Sequence("r", 0, b"", tokens, len(prompt), SamplingParams(**params), seed)


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(rows: torch.Tensor, seqs: list[Sequence], **options) -> list[Sampled]:
    asked = sampler.Sampling(seqs)
    return sampler.sample(rows, asked, asked.rules(), draw.draw, **options).read()


def draws(row: torch.Tensor, count: int, **params) -> np.ndarray:
    """Token counts of `count` draws from one row."""
    seqs = [sequence(seed=i, **params) for i in range(count)]
    tokens = [s.token_id for s in drawn(row.expand(count, -1), seqs)]
    return np.bincount(tokens, minlength=VOCABULARY)


def test_greedy_takes_the_most_probable_token():
    rows = logits(4)
    assert [s.token_id for s in drawn(rows, [sequence(temperature=0.0)] * 4)] == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(12), TopPLogitsWarper(0.8)],
        ),
        ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    ],
)
def test_draws_follow_the_distribution_that_transformers_computes(params, warpers):
    row = logits(seed=3)
    expected = row
    for warper in warpers:
        expected = warper(torch.tensor([[5, 6, 7]]), expected)
    probs = expected.double().softmax(-1)[0].numpy()
    count = 4000
    seen = draws(row[0], count, **params)
    assert not seen[probs == 0].any(), "a token that the filters exclude was drawn"
    frequent = probs * count >= 5
    observed = [*seen[frequent], seen[~frequent].sum()]
    wanted = np.array([*probs[frequent], probs[~frequent].sum()]) * count
    keep = wanted > 0
    wanted *= count / wanted.sum()
    assert stats.chisquare(np.array(observed)[keep], wanted[keep]).pvalue > 1e-4


def test_a_draw_depends_on_seed_and_position_alone():
    rows = logits(8, seed=5)
    mix = [
        sequence(seed=9, temperature=0.9, top_p=0.9),
        sequence(temperature=0.0),
        sequence(seed=3, top_k=4, presence_penalty=1.0, generated=(1, 2)),
        sequence(seed=4, temperature=2.0),
        sequence(seed=5, min_p=0.05),
        sequence(seed=6, logit_bias={3: 2.0}),
        sequence(seed=7, repetition_penalty=1.3),
        sequence(seed=8, frequency_penalty=0.5, generated=(4, 4, 9)),
    ]
    together = [s.token_id for s in drawn(rows, mix)]
    alone = [drawn(rows[i : i + 1], [seq])[0].token_id for i, seq in enumerate(mix)]
    assert together == alone


def test_uniform_numbers_are_uniform_and_uncorrelated_over_positions_and_seeds():
    seeds, positions = np.meshgrid(np.arange(50), np.arange(200), indexing="ij")
    grid = (
        draw.uniform_bits(seeds.ravel().astype(np.uint64), positions.ravel().astype(np.uint64)).reshape(50, 200)
        * 2.0**-53
    )
    assert grid.min() >= 0.0
    assert grid.max() < 1.0
    assert stats.kstest(grid.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    row = torch.zeros(1, VOCABULARY)
    row[0, 5], row[0, 8] = 3.0, 2.0  # 5 stands in the prompt, which these penalties do not look at
    plain = sequence(temperature=0.0, presence_penalty=2.0)
    assert drawn(row, [plain])[0].token_id == 5
    once = sequence(temperature=0.0, presence_penalty=2.0, generated=(5,))
    assert drawn(row, [once])[0].token_id == 8
    twice = sequence(temperature=0.0, frequency_penalty=0.6, generated=(5, 5))
    assert drawn(row, [twice])[0].token_id == 8


def test_logit_bias_and_min_tokens():
    row = logits(seed=1)
    best, second = row[0].topk(2).indices.tolist()
    assert drawn(row, [sequence(temperature=0.0, logit_bias={best: -100.0})])[0].token_id == second
    banned = sequence(temperature=0.0, min_tokens=2, stop_token_ids=(best,), generated=(1,))
    assert drawn(row, [banned])[0].token_id == second
    free = sequence(temperature=0.0, min_tokens=2, stop_token_ids=(best,), generated=(1, 1))
    assert drawn(row, [free])[0].token_id == best


def test_logprobs_are_of_the_raw_logits_and_sorted():
    row = logits(seed=2)
    expected = row[0].log_softmax(-1)
    result = drawn(row, [sequence(seed=1, temperature=0.5, logprobs=3, logit_bias={0: 5.0})])[0]
    assert result.logprob is not None
    assert result.logprob.logprob == pytest.approx(float(expected[result.token_id]), abs=1e-6)
    values, ids = expected.topk(3)
    assert result.logprob.top == [
        (i, pytest.approx(v, abs=1e-6)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    none = drawn(row, [sequence(temperature=0.0, logprobs=0)])[0]
    assert none.logprob is not None
    assert none.logprob.top == []


def test_the_rows_of_different_requests_keep_their_own_number_of_alternatives():
    rows = logits(3, seed=6)
    seqs = [sequence(temperature=0.0, logprobs=n) for n in (1, 5)] + [sequence(temperature=0.0)]
    results = drawn(rows, seqs)
    assert [r.logprob and len(r.logprob.top) for r in results] == [1, 5, None]


def test_prompt_logprobs_span_more_rows_than_one_piece():
    rows = logits(sampler.LOGPROB_ROWS + 10, seed=4)
    following = torch.randint(VOCABULARY, (len(rows),), generator=torch.Generator().manual_seed(1)).tolist()
    entries = [entry for part in sampler.prompt_logprobs(rows, following, 2) for entry in part.read()]
    expected = rows.log_softmax(-1)[range(len(rows)), following]
    assert [e.token_id for e in entries] == following
    np.testing.assert_allclose([e.logprob for e in entries], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-46, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float):
    rows = logits(4, seed=11) * 10
    assert [s.token_id for s in drawn(rows, [sequence(seed=3, temperature=temperature)] * 4)] == rows.argmax(
        -1
    ).tolist()


def test_a_bias_is_applied_before_penalties():
    """As vLLM does, whose parameters these are: a seen token's -1 + 10 is then divided by 2."""
    row = torch.full((1, VOCABULARY), -50.0)
    row[0, 5], row[0, 6], row[0, 9] = -1.0, -50.0, 6.0
    seq = sequence(temperature=0.0, repetition_penalty=2.0, logit_bias={5: 10.0})
    assert drawn(row, [seq])[0].token_id == 9, "4.5 is less than 6; penalised first it would be 8"


@pytest.mark.parametrize("generated", [(9,), (9, 9, 4), (4, 11), (5,)])
@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 1.3}, {"frequency_penalty": 0.7}, {"presence_penalty": -0.4, "frequency_penalty": 1.1},
     {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6, "frequency_penalty": 0.2, "logit_bias": {9: 1.0}}],
)  # fmt: skip
def test_a_token_that_is_still_on_the_device_counts_like_a_known_one(generated, params):
    row = logits(seed=21)
    for temperature in (0.0, 1.0):
        known = [sequence(seed=seed, generated=generated, temperature=temperature, **params) for seed in range(40)]
        waiting = [
            sequence(seed=seed, generated=(*generated[:-1], PENDING), temperature=temperature, **params)
            for seed in range(40)
        ]
        rows = row.expand(40, -1)
        found = drawn(rows, waiting, pending=lambda _: torch.tensor([generated[-1]]))
        assert found == drawn(rows, known)


def test_a_known_number_of_splitmix64():
    """Two rounds of it, computed with Python's integers."""
    mask = (1 << 64) - 1
    for seed, position in ((0, 0), (2**63 - 1, 131071), (12345, 678)):
        state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & mask
        for _ in range(2):
            state = (state + 0x9E3779B97F4A7C15) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        assert draw.uniform_bits(np.array([seed], np.uint64), np.array([position], np.uint64)).tolist() == [state >> 11]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 2}])
def test_logits_that_are_no_numbers_give_no_token(params):
    rows = logits(3, seed=31)
    rows[1, 40] = torch.nan
    found = [s.token_id for s in drawn(rows, [sequence(seed=i, **params) for i in range(3)])]
    assert found[1] == draw.NOT_FINITE
    assert min(found[0], found[2]) >= 0


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.8}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.7}]
)
def test_what_is_known_of_a_context_is_not_looked_at_again(penalty: dict[str, float]) -> None:
    row = logits(seed=4)
    seq = sequence(prompt=(5, 6, 7) * 40, generated=(8, 9, 8), temperature=0.0, logprobs=3, **penalty)
    asked = sampler.Sampling([seq])
    sampler.sample(row, asked, asked.rules(), draw.draw)
    seq.tokens += [10, 9]
    whole = sampler._moved(row, sampler.Sampling([seq]), None)
    known = len(seq.tokens) - 2
    seq.tokens[:known] = [50] * known  # nobody would see it
    # Also where it has sat out a step in between.
    for again in (asked, sampler.Sampling([seq], sampler.Sampling([sequence()], asked))):
        torch.testing.assert_close(sampler._moved(row, again, None), whole, rtol=0, atol=0)


def test_what_is_known_of_a_sequence_goes_when_it_has_ended() -> None:
    seq = sequence(repetition_penalty=1.8, presence_penalty=0.5)
    asked = sampler.Sampling([seq])
    assert list(asked.everything) == list(asked.generated) == [seq]
    seq.state = State.FINISHED
    after = sampler.Sampling([], asked)
    assert not after.everything
    assert not after.generated
