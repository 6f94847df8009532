"""Parity with PEFT where adapters stand in the tails of base weights: the real engine with the Triton kernels, on a
CPU in Triton's interpreter (tests/gpu/test_parity_cuda.py: in half precision and in CUDA graphs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels import backend, ops
from adapters.kernels.backend import TritonKernels
from service.engine import build, draw
from service.engine.attention import PagedAttention
from tests.engine.oracle import HIGH_RANKS, VOCABULARY, recipes
from tests.engine.test_parity import MIXES, World, ask_all, check_all

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run for real, in tests/gpu")

INTERPRETED_S = 600.0
"""An engine's steps in Triton's interpreter take seconds each, on a busy machine more."""
NAMES = ("rank1", "rank8-rs", "rank16", "rank33-regex", "rank64-patterns", "one-layer")


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch):
    """Engines get the Triton kernels, and use the tails as often as they can; how many adapters each step staged. Steps
    of one token have the library's products: their own kernels take the interpreter longest, and are met in
    test_compiled_parity.py."""
    counts: list[int] = []

    def kernels(config, loaded, pages, arena):
        size = (loaded.shapes, pages, config.page_size, loaded.dtype, loaded.device)
        return PagedAttention(*size), TritonKernels(arena, overlap=False, tails=True, uniform=True), draw.draw

    stage = TritonKernels.stage

    def counting(self: TritonKernels) -> None:
        plan = ops.STEP.tail_plan
        assert plan is not None
        counts.append(int(plan.staged[0]))
        stage(self)

    monkeypatch.setattr(build, "_kernels", kernels)
    monkeypatch.setattr(backend, "TAIL_TOKENS", 2)
    monkeypatch.setattr(backend, "LARGE_SEGMENTS", 1)
    monkeypatch.setattr(TritonKernels, "stage", counting)
    yield counts
    ops.STEP.plan = ops.STEP.tail_plan = ops.STEP.tables = ops.STEP.side = ops.STEP.tails = None


def test_tokens_and_distributions_are_peft_s(staged: list[int], tmp_path: Path) -> None:
    """Few requests at a time, so that their adapters fit, and each of them twice, with others in between."""
    world = World("llama", tmp_path, {name: recipes("llama")[name] for name in NAMES}, MIXES[2:])
    engine = world.engine(tmp_path, max_tokens_per_step=64, prefix_caching=False)
    groups = [
        ["rank16", "rank8-rs-long", "base"],
        ["rank33-regex-long", "rank1"],
        ["rank64-patterns-long"],
        ["rank16-long", "one-layer", "mix0"],
        ["rank8-rs", "rank33-regex"],
    ]
    for names in groups:
        ask_all(engine, world, names, max_tokens=5, prompt_logprobs=VOCABULARY)
        engine.run(INTERPRETED_S)
        check_all(engine, world, names)
    assert len(staged) > 20, "the tails were hardly used"
    assert sum(staged) > 6, "no adapter was staged again"
    assert staged.count(0) > len(staged) / 2, "adapters were staged in steps that had them"
    engine.close()


def test_prompts_stand_in_the_tails_beside_sequences_that_decode(
    staged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests at once, so that adapters of a few tokens, mixes, and ranks that no tail has meet long prompts."""
    monkeypatch.setattr(backend, "LARGE_SEGMENTS", 12)
    both: list[bool] = []
    begin = TritonKernels.begin_step

    def noting(self: TritonKernels, *step: Any) -> None:
        begin(self, *step)
        both.append(ops.STEP.plan is not None and ops.STEP.tail_plan is not None)

    monkeypatch.setattr(TritonKernels, "begin_step", noting)
    names = ("rank8-rs", "rank16", "rank33-regex", "one-layer")
    every = {name: recipes("llama")[name] for name in names} | {"rank128": HIGH_RANKS["rank128"]}
    world = World("llama", tmp_path, every, MIXES[:1])
    engine = world.engine(tmp_path, max_tokens_per_step=64, prefix_caching=False, arena_bytes=64 << 20)
    ask_all(engine, world, max_tokens=4)
    engine.run(INTERPRETED_S)
    check_all(engine, world)
    assert sum(both) > 3, "no step had adapters of both kinds"
    engine.close()


def test_what_a_failed_step_did_not_stage_the_next_one_does(
    staged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World("llama", tmp_path, {name: recipes("llama")[name] for name in ("rank16", "rank8-rs")}, [])
    engine = world.engine(tmp_path, max_tokens_per_step=64, prefix_caching=False)
    stage = TritonKernels.stage

    def failing(self: TritonKernels) -> None:
        monkeypatch.setattr(TritonKernels, "stage", stage)
        raise torch.OutOfMemoryError("as if the device had none left")

    ask_all(engine, world, ["rank8-rs"], max_tokens=2)
    engine.run(INTERPRETED_S)
    monkeypatch.setattr(TritonKernels, "stage", failing)
    ask_all(engine, world, ["rank16"], max_tokens=2)
    engine.run(INTERPRETED_S)
    assert engine.refused
    engine.refused.clear()
    ask_all(engine, world, ["rank16", "rank8-rs"], max_tokens=2)
    engine.run(INTERPRETED_S)
    check_all(engine, world, ["rank16", "rank8-rs"])
    engine.close()
