"""What a GPU is to run is compiled and captured before the engine says that it is ready: no request pays for it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch._dynamo.exc
import torch._inductor.compile_fx  # some seconds, which the first step that compiles would spend
import torch._inductor.exc

from adapters.arena import Arena
from adapters.kernels import early
from service.engine import compiled
from service.engine.attention import Attention
from service.engine.config import EngineConfig
from service.engine.core import is_out_of_memory
from service.engine.errors import CannotStart
from service.engine.graphs import StepGraphs
from service.engine.invariance import check_products
from service.engine.model import LoadedModel
from service.engine.runner import LoraKernels, Runner
from service.engine.warmup import warm_up

log = logging.getLogger(__name__)

UNCOMPILED = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
"""What the compiler raises for code that it does not take."""


def prepare(
    config: EngineConfig,
    loaded: LoadedModel,
    runner: Runner,
    backend: Attention,
    kernels: LoraKernels,
    arena: Arena,
    budget: int,
    max_positions: int,
) -> None:
    """Compiles and captures all that the GPU path uses. A model whose layers do not compile is served uncompiled, one
    whose steps cannot be captured without CUDA graphs. Raises CannotStart where the deterministic engine needs them."""

    def set_active(active: bool) -> None:
        runner.hook.active = active

    graphs = StepGraphs(
        runner.logits,
        backend,  # type: ignore[arg-type]
        kernels,  # type: ignore[arg-type]
        set_active,
        max_sequences=min(config.max_sequences, budget),
        max_tokens=budget,
        max_positions=max_positions,
        page_size=config.page_size,
        vocabulary=loaded.manifest.vocab_size,
        dtype=loaded.dtype,
        device=loaded.device,
        deterministic=config.deterministic,
        folder=Path(config.cache_dir) / "compiled",
    )

    def wanted() -> bool:
        return kernels.starts_early

    starts_early = wanted if early.can_start_early(loaded.device) else None

    def capture() -> bool:
        warm_up(runner, arena, loaded.manifest, budget, deterministic=config.deterministic)
        try:
            graphs.capture()
        except RuntimeError as error:  # code that waits for the device, or copies to it, cannot be captured
            if is_out_of_memory(error) or isinstance(error, UNCOMPILED):
                raise
            if config.deterministic:
                raise CannotStart(
                    f"LORAPLEX_DETERMINISTIC=true: steps of {loaded.manifest.architecture} cannot be captured as CUDA "
                    f"graphs ({_first_line(error)})",
                    "serve this model without LORAPLEX_DETERMINISTIC",
                ) from error
            log.warning("this model's steps cannot be captured as CUDA graphs, they run without", exc_info=True)
            return False
        return True

    with torch.inference_mode():
        compiled.compile_layers(loaded.model, starts_early=starts_early)
        try:
            captured = capture()
        except UNCOMPILED:
            log.warning("this model's layers do not compile; they run uncompiled", exc_info=True)
            compiled.undo(loaded.model)
            captured = capture()
    runner.graphs = graphs if captured else None
    if config.deterministic:
        check_products(loaded.model, budget)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    log.info("%.1f of %.1f GiB of the device are left for the steps that have no graph", free / 2**30, total / 2**30)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
