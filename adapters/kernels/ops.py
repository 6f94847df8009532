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

from adapters.kernels import one_row, triton_lora, triton_tail
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.opaque import opaque
from adapters.kernels.side import Side
from adapters.kernels.tail_plan import TailPlan
from adapters.kernels.triton_lora import Tables


@dataclass(slots=True)
class Step:
    """What the operators of one step need. No plan at all: no token has an adapter, nothing is launched."""

    plan: DevicePlan | None = None
    tail_plan: TailPlan | None = None
    """Of the adapters that stand in the tails of the base weights, if there are tails that the step uses. Then `plan`
    is of the others."""
    tables: Tables | None = None
    side: Side | None = None
    """Where LoRA runs beside the base product; None: one after the other."""
    tails: triton_tail.Tails | None = None
    """Of the model's weights."""


STEP = Step()
"""The current step of this process's only engine thread."""


def _empty(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@opaque(_empty)
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Sequence[int], widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(x W0^T + bias, the step's deltas), both [T, d]; the caller adds them, for instance in the compiled kernel that
    reads y anyway. With STEP.side everything of LoRA runs beside the base product."""
    plan = STEP.plan
    if plan is None or STEP.tables is None:
        return functional.linear(x, weight, bias), x.new_zeros(x.shape[0], weight.shape[0])
    if plan.covers:
        delta = x.new_empty(x.shape[0], weight.shape[0])
    else:
        delta = x.new_zeros(x.shape[0], weight.shape[0])
    return _beside(x, weight, bias, delta, targets, offsets, widths, add=not plan.covers), delta


def _beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    targets: Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
    *,
    add: bool = False,
) -> Tensor:
    """x W0^T + bias; meanwhile the deltas of STEP.plan are written, or added, to delta."""
    plan, tables, side = STEP.plan, STEP.tables, STEP.side

    def product() -> Tensor:
        return functional.linear(x, weight, bias)

    def deltas() -> None:
        if plan is not None and tables is not None:
            triton_lora.deltas(delta, x, targets, tuple(offsets), tuple(widths), plan, tables, add=add)

    if side is not None:
        return side.beside(x, weight.shape[0], product, deltas)
    deltas()
    return product()


def _one(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _whole(x: Tensor, whole: Tensor, *rest: object) -> Tensor:
    residual = rest[6] if len(rest) > 6 else None
    return torch.empty_like(residual) if isinstance(residual, Tensor) else x.new_empty(x.shape[0], whole.shape[0])


def _tail_plan() -> TailPlan:
    if STEP.tail_plan is None:
        raise ValueError("tail_plan: the step has none")
    return STEP.tail_plan


def _both(
    x: Tensor,
    whole: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """x [W0 ; A]^T, and the deltas of the tokens that have theirs beside it, if there are any."""
    if STEP.plan is None:
        return functional.linear(x, whole, bias), None
    delta = x.new_empty(x.shape[0], sum(widths))
    return _beside(x, whole, bias, delta, targets, offsets, widths), delta


@opaque(_whole)
def tail_linear(
    x: Tensor,
    whole: Tensor,
    bias: Tensor | None,
    b: Tensor,
    scales: Tensor,
    targets: Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """x W0^T + bias + the step's deltas, in the first d columns of [T, d + spare]; with residual [T, d] their sum with
    it, [T, d]. whole, bias, b, scales: of a Tail, in which the adapters of STEP.tail_plan have been staged; those of
    STEP.plan are computed beside the product. Raises ValueError in a step without a tail_plan."""
    plan = _tail_plan()
    y, delta = _both(x, whole, bias, targets, offsets, widths)
    read = triton_tail.expand(y, b, scales, tuple(offsets), tuple(widths), plan, delta, residual=residual)
    return y if residual is None else read


def _nothing(*_: object) -> None:
    pass


@opaque(_nothing, mutates=["residual"])
def add_product(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual [T, d] += x W0^T, by the product's own kernel."""
    residual.addmm_(x, weight.t())


def _half(x: Tensor, whole: Tensor, bias: Tensor | None, b: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1] // 2)


@opaque(_half)
def tail_gated(
    x: Tensor,
    whole: Tensor,
    bias: Tensor | None,
    b: Tensor,
    scales: Tensor,
    targets: Tensor,
    gate: str,
) -> Tensor:
    """activation(gate) · up, [T, width], of the two halves of the same product. Raises as `tail_linear`."""
    plan, width = _tail_plan(), b.shape[1] // 2
    y, delta = _both(x, whole, bias, targets, (0, width), (width, width))
    return triton_tail.gated(y, b, scales, gate, plan, delta)


@opaque(_one)
def one_row_product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x W0^T + bias of one row, [1, d], and residual [1, d]."""
    return one_row.product(x, weight, bias, residual=residual)


@opaque(_one)
def one_row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """The same, and the deltas of the step's plan."""
    plan, tables = STEP.plan, STEP.tables
    if plan is None or tables is None:
        return one_row.product(x, weight, bias, residual=residual)
    s = one_row.shrink(x, targets, plan, tables)
    deltas = one_row.Deltas(s, targets, tuple(offsets), tuple(widths), plan, tables)
    return one_row.product(x, weight, bias, deltas, residual)
