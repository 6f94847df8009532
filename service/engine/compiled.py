"""Compiled layers: every decoder layer through torch.compile, all of them by the same code.

One compiled layer serves all layers, batches and adapters (and others the small steps that start early, see `_either`),
because nothing that differs between them is seen while tracing: KV caches and LoRA targets are buffers, the step's
metadata is read inside opaque operators. The caches of Inductor and Triton live in the engine's cache folder, so only
the first start compiles.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

VARIANTS = 64
"""Most versions of a layer that are compiled: (one token or many) x (without LoRA, with it, or in the tails of base
weights) x (started early or not) x kinds of layers, with room."""


def use_cache_folder(folder: Path) -> None:
    """Before anything is compiled: where compiled code is kept."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def compile_layers(
    model: PreTrainedModel, backend: str = "inductor", *, starts_early: Callable[[], bool] | None = None
) -> None:
    """Makes the decoder's layers and its final norm compile at their next call. starts_early: asked at each call
    whether the compiler's kernels are to start before those before them have ended (adapters/kernels/early.py); None:
    they never are."""
    import torch._dynamo
    import torch.fx.experimental._config as shapes

    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * VARIANTS
    # Otherwise a norm's epsilon travels as a tensor on the CPU, and sizes that happen to be equal (tokens and
    # hidden size) are taken to be the same.
    torch._dynamo.config.specialize_float = True
    shapes.use_duck_shape = False
    decoder = model.get_decoder()
    layers = _layers(model, decoder)
    if not layers:
        log.warning("%s: no list of layers was found; they run uncompiled", type(decoder).__name__)
    norm = getattr(decoder, "norm", None)
    for module in (*layers, norm) if isinstance(norm, nn.Module) else layers:
        module.compile(dynamic=True, backend=backend)
        if starts_early is not None:
            module._compiled_call_impl = _either(module, backend, starts_early)


def _either(module: nn.Module, backend: str, starts_early: Callable[[], bool]) -> Callable[..., Any]:
    """Calls the module as it is compiled, or as it is compiled with programmatic dependent launch."""
    usual = cast(Callable[..., Any], module._compiled_call_impl)
    early = torch.compile(module._call_impl, dynamic=True, backend=backend, options={"triton.enable_pdl": True})

    def call(*args: Any, **kwargs: Any) -> Any:
        return (early if starts_early() else usual)(*args, **kwargs)

    return call


def _layers(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """The decoder's own list of as many modules as the model has layers; most call it `layers`, some `h`."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return list(lists[0]) if lists else []


def undo(model: PreTrainedModel) -> None:
    """Back to eager execution."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()
