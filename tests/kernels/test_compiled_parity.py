"""Compiled layers with the Triton kernels give PEFT's answers: what a GPU runs, but for the code that is generated.

On a CPU, with the kernels in Triton's interpreter; what was traced is run as it is. One architecture for each kind of
thing that layers do otherwise: norms, windows and soft caps; products that add to the residual; joint projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adapters.kernels import backend, ops, triton_tail
from adapters.kernels.backend import TritonKernels
from adapters.layers import GatedMlp, PreNormLayer
from service.engine import build, compiled, draw
from service.engine.attention_triton import TritonPagedAttention
from tests.engine.oracle import recipes
from tests.engine.test_parity import World, ask_all, check_all

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs for real, in tests/gpu")

NAMES = ("rank4", "rank16", "one-layer")
VERSIONS = 5
"""Of a layer, at most: one token or many, with LoRA or without, and many in the tails of base weights."""


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch):
    """Engines get what they have on a GPU; a list with an element for each step that used the tails."""
    steps: list[int] = []

    def kernels(config, loaded, pages, arena):
        size = (loaded.shapes, pages, config.page_size, loaded.dtype, loaded.device)
        return TritonPagedAttention(*size), TritonKernels(arena, overlap=False, tails=True), draw.draw

    stage = TritonKernels.stage

    def counting(self: TritonKernels) -> None:
        steps.append(1)
        stage(self)

    monkeypatch.setattr(build, "_kernels", kernels)
    monkeypatch.setattr(TritonKernels, "stage", counting)
    monkeypatch.setattr(backend, "TAIL_TOKENS", 20)
    monkeypatch.setattr(backend, "LARGE_SEGMENTS", 8)
    yield steps
    ops.STEP.plan = ops.STEP.tail_plan = ops.STEP.tables = ops.STEP.side = ops.STEP.tails = None


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "phi3"])
def test_tokens_and_distributions_are_peft_s(
    architecture: str, staged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no layer breaks into pieces, or is compiled more often than it has versions."""
    every = recipes(architecture)
    mixes = [(("rank4", 0.5), ("rank16", 1.0))]
    world = World(architecture, tmp_path, {name: every[name] for name in NAMES}, mixes)
    engine = world.engine(tmp_path, max_tokens_per_step=48, prefix_caching=False)
    runner: Any = engine.engine.runner
    gates: list[int] = []
    gated = triton_tail.gated
    monkeypatch.setattr(triton_tail, "gated", lambda y, *rest: gates.append(len(y)) or gated(y, *rest))
    model = runner._model
    traces = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(model, traces)
    try:
        for names in (["base"], ["rank4"], ["rank16", "one-layer", "mix0"]):
            ask_all(engine, world, names, max_tokens=2)
            engine.run()
            check_all(engine, world, names)
    finally:
        compiled.undo(model)
        engine.close()
    assert staged
    known = sum(isinstance(module, GatedMlp) for module in model.modules())
    assert known == (0 if architecture == "phi3" else model.config.num_hidden_layers)
    # Gemma 2 has norms behind its products, Phi 3 dropouts: neither is the layer whose code is known.
    layers = sum(isinstance(module, PreNormLayer) for module in model.modules())
    assert layers == (model.config.num_hidden_layers if architecture == "llama" else 0)
    assert len(gates) == known * len(staged)
    kinds = len({module.loraplex_window for module in model.modules() if hasattr(module, "loraplex_window")})
    assert traces.frame_count <= kinds * VERSIONS + 2, "the last norm: one token or many"
