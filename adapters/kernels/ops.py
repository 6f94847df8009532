"""The LoRA kernels as opaque operators, so that torch.compile traces a model around them without looking inside.

An operator reads the step's plan from `STEP` when it runs, not when it is traced: a compiled layer, or a captured CUDA
graph, serves every plan. Target indices come as a tensor (a buffer of the layer), not as integers, so that one compiled
graph serves all layers of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapters.kernels import triton_lora
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.triton_lora import Tables


@dataclass(slots=True)
class Step:
    """What the operators of one step need. plan None: no token has an adapter, nothing is launched."""

    plan: DevicePlan | None = None
    tables: Tables | None = None
    side: torch.cuda.Stream | None = None
    """Where shrink runs beside the base product; None: one after the other."""


STEP = Step()
"""The current step of this process's only engine thread."""


def _fork(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """(current stream, side stream), the second waiting for all that the first was given; nothing without STEP.side."""
    if STEP.side is None:
        return None, None
    main = torch.cuda.current_stream(device)
    STEP.side.wait_stream(main)
    return main, STEP.side


def _join(main: torch.cuda.Stream | None, side: torch.cuda.Stream | None) -> None:
    if main is not None and side is not None:
        main.wait_stream(side)


@torch.library.custom_op("loraplex::lora_add", mutates_args=("y",))
def lora_add(y: Tensor, x: Tensor, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]) -> None:
    """y [T, d] += the step's deltas of x [T, k], in place; targets int32 [n], and the columns of each in y."""
    if STEP.plan is None or STEP.tables is None:
        return
    partials = triton_lora.shrink(x, targets, STEP.plan, STEP.tables)
    triton_lora.expand(y, partials, targets, tuple(offsets), tuple(widths), STEP.plan, STEP.tables)


@lora_add.register_fake
def _(y: Tensor, x: Tensor, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]) -> None:
    return None


@torch.library.custom_op("loraplex::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]
) -> Tensor:
    """x W0^T + bias + the step's deltas: [T, d]. With STEP.side, shrink runs beside the base product."""
    plan, tables = STEP.plan, STEP.tables
    if plan is None or tables is None:
        return functional.linear(x, weight, bias)
    main, side = _fork(x.device)
    partials = triton_lora.shrink(x, targets, plan, tables, side=side)
    y = functional.linear(x, weight, bias)
    _join(main, side)
    triton_lora.expand(y, partials, targets, tuple(offsets), tuple(widths), plan, tables)
    return y


@lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("loraplex::lora_linear_delta", mutates_args=())
def lora_linear_delta(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(x W0^T + bias, the step's deltas), both [T, d]; the caller adds them, for instance in the compiled kernel that
    reads y anyway. With STEP.side everything of LoRA runs beside the base product. The delta is rounded to x's dtype
    once more than lora_linear's."""
    plan, tables = STEP.plan, STEP.tables
    delta = x.new_empty(x.shape[0], weight.shape[0])
    if plan is None or tables is None:
        return functional.linear(x, weight, bias), delta.zero_()
    main, side = _fork(x.device)
    with torch.cuda.stream(side):
        if not plan.covers:
            delta.zero_()
        partials = triton_lora.shrink(x, targets, plan, tables)
        triton_lora.expand(delta, partials, targets, tuple(offsets), tuple(widths), plan, tables, add=not plan.covers)
    y = functional.linear(x, weight, bias)
    _join(main, side)
    return y, delta


@lora_linear_delta.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)
