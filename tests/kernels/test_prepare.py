"""What is compiled and captured before an engine on a GPU is ready, and what becomes of a model that does not allow it.

On a CPU, with the kernels in Triton's interpreter; graphs are captured in tests/gpu alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.exc

from adapters.kernels import ops
from adapters.kernels.backend import TritonKernels
from service.engine import attention_triton, build, compiled, draw, prepare
from service.engine.attention_triton import TritonPagedAttention
from service.engine.errors import CannotStart
from tests.engine.oracle import recipes
from tests.engine.test_parity import World, ask_all, check_all

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there graphs are captured for real, in tests/gpu")


class Graphs:
    """In place of StepGraphs: captures as `capture` does."""

    def __init__(self, capture: Callable[[], None]) -> None:
        self.capture = capture
        self.times = 0

    def __call__(self, *_: Any, **__: Any) -> Graphs:
        return self


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """(captures as, **configuration) -> the engine, its layers compiled as traced, and what it was built of."""
    made: list[Any] = []
    parts: list[tuple[Any, ...]] = []

    def kernels(config, loaded, pages, arena):
        size = (loaded.shapes, pages, config.page_size, loaded.dtype, loaded.device)
        # uniform: the kernels of one token take the interpreter longest, and are no matter of these tests.
        attention, lora = TritonPagedAttention(*size), TritonKernels(arena, overlap=False, tails=True, uniform=True)
        parts.append((loaded, attention, lora, arena))
        return attention, lora, draw.draw

    monkeypatch.setattr(build, "_kernels", kernels)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 30))
    compile_layers = compiled.compile_layers
    monkeypatch.setattr(compiled, "compile_layers", lambda model, **options: compile_layers(model, "eager", **options))
    world = World("llama", tmp_path, {name: recipes("llama")[name] for name in ("rank4", "rank16")}, [])

    def start(capture: Callable[[], None], *, deterministic: bool = False, warm: bool = True) -> tuple[Any, World]:
        if not warm:
            monkeypatch.setattr(prepare, "warm_up", lambda *_, **__: None)
        monkeypatch.setattr(prepare, "StepGraphs", Graphs(capture))
        engine = world.engine(tmp_path, max_tokens_per_step=48, prefix_caching=False)
        made.append(engine)
        loaded, attention, lora, arena = parts[-1]
        config = build.EngineConfig(model_path="", blobs_dir="", cache_dir="", socket="", deterministic=deterministic)
        prepare.prepare(config, loaded, engine.engine.runner, attention, lora, arena, 12, 512)
        return engine, world

    yield start
    for engine in made:
        compiled.undo(engine.engine.runner._model)
        engine.close()
    ops.STEP.plan = ops.STEP.tail_plan = ops.STEP.tables = ops.STEP.side = ops.STEP.tails = None


def test_a_model_whose_steps_cannot_be_captured_is_served_without_graphs(
    prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        engine, world = prepared(fail)
    assert "cannot be captured as CUDA graphs, they run without" in caplog.text
    assert engine.engine.runner.graphs is None
    ask_all(engine, world, ["rank16", "base"], max_tokens=2)
    engine.run()
    check_all(engine, world, ["rank16", "base"])


def test_the_deterministic_engine_does_not_do_without(prepared: Any) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")

    with pytest.raises(CannotStart, match=r"LlamaForCausalLM cannot be captured .*is capturing\)$") as caught:
        prepared(fail, deterministic=True, warm=False)
    assert "without LORAPLEX_DETERMINISTIC" in caught.value.hint


def test_a_device_without_room_for_graphs_ends_the_start(prepared: Any) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        prepared(fail, warm=False)


def test_a_model_whose_layers_do_not_compile_is_captured_as_it_is(
    prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [torch._dynamo.exc.Unsupported("as if the compiler did not know an operation")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    with caplog.at_level(logging.WARNING):
        engine, _ = prepared(fail_once, warm=False)
    assert "layers do not compile" in caplog.text
    assert engine.engine.runner.graphs is not None
    assert not [module for module in engine.engine.runner._model.modules() if module._compiled_call_impl is not None]
    engine.engine.runner.graphs = None


def test_attention_meets_no_other_code_in_steps_without_graphs(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs have compiled the rest: decoding sequences in one part and in several, whose keys they write."""
    met: set[tuple[bool, bool]] = set()
    kernel = attention_triton.decode_kernel

    class Noting:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **constants: Any) -> None:
                if not constants["COUNTED"] and not constants["WRITES"]:
                    met.add((constants["DIRECT"], constants["CAPPED"]))
                kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(attention_triton, "decode_kernel", Noting())
    engine, world = prepared(lambda: None)
    warm = set(met)
    met.clear()
    engine.engine.runner.graphs = None
    ask_all(engine, world, ["rank4", "rank16-long"], max_tokens=3, prompt_logprobs=1)
    engine.run()
    assert met, "no prompt came beside a sequence that decodes"
    assert met <= warm
    assert warm == {(True, False), (False, False)}
