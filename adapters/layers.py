"""LoRA on a frozen model: every nn.Linear is replaced by a layer that adds the step's plan to its product.

Projections that read the same input (q/k/v, gate/up) become one product (one site). This needs no patched
attention or MLP code: the projections' places are taken by `SharedProduct` slices, and whichever is called first
computes the whole product; its siblings, called with the very same tensor, take their columns of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from adapters.kernels import tail
from adapters.kernels.dense import PackedWeight, can_pack
from adapters.manifest import Manifest
from adapters.site import Site

SHARED_INPUT: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling projections that known architectures call with one input, in call order. A wrong guess costs
nothing but speed: a sibling called with another tensor computes its own columns."""


class LoraHook(Protocol):
    """Adds the current step's LoRA deltas of a site; installed once, its plan changes every step."""

    active: bool
    """False while the step has no adapter at all: then layers launch nothing."""
    fused: bool
    """The hook computes base product and deltas together (`linear`), where that is faster than one after the other."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] W0ᵀ + bias -> [T, out]; traceable by torch.compile."""

    def linear(
        self, x: Tensor, weight: Tensor, whole: Tensor | None, bias: Tensor | None, targets: Tensor, site: Site
    ) -> Tensor:
        """x [T, in] W0ᵀ + bias + deltas -> [T, out]; traceable by torch.compile. whole: the weight with its tail, if
        it has one. `targets`: int32, the site's."""

    def __call__(self, y: Tensor, x: Tensor, site: Site) -> None:
        """y [T, out_features] += deltas of x [T, in_features], in place."""


class LoraLinear(nn.Module):
    """y = x W0ᵀ + b, plus the plan's deltas. W0 [out, in] is the model's own frozen parameter, never written (its
    tail, if it has one, is no part of it)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, site: Site, hook: LoraHook, *, tails: bool = False) -> None:
        """tails: the weight is one that tail.with_tail gave."""
        super().__init__()
        self.packed = PackedWeight(weight) if can_pack(weight) and not tails else None
        self.weight = None if self.packed else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.site = site
        self.hook = hook
        self.whole: Tensor | None
        self.register_buffer("whole", tail.whole(weight, len(site.targets)) if tails else None, persistent=False)
        # A buffer: compiled code takes it as an input, so layers that differ in nothing else share their code.
        self.register_buffer(
            "targets", torch.tensor(site.targets, dtype=torch.int32, device=weight.device), persistent=False
        )

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.packed is not None:
            y = self.packed.product(rows, self.bias)
        elif self.hook.active and self.hook.fused:
            weight, targets = cast(Tensor, self.weight), cast(Tensor, self.targets)
            y = self.hook.linear(rows, weight, self.whole, self.bias, targets, self.site)
        else:
            y = self.hook.product(rows, cast(Tensor, self.weight), self.bias)
        if self.hook.active and not self.hook.fused:
            self.hook(y, rows, self.site)
        return y.view(*x.shape[:-1], y.shape[-1])


class PackedOutput(nn.Module):
    """The output layer (LM head) on CPU: the plain product, packed. `weight` stays the model's, it may be tied."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.packed = PackedWeight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.product(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], self.weight.shape[0])


class OutputProduct(nn.Module):
    """The output layer (LM head) on a GPU: the hook's product, whose kernel for a single row reads it sooner. `weight`
    stays the model's, it may be tied."""

    def __init__(self, linear: nn.Linear, hook: LoraHook) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = self.hook.product(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class SharedProduct:
    """The product that sibling projections share, and its result until the last sibling has taken its part."""

    def __init__(self, linear: LoraLinear) -> None:
        self.linear = linear
        self._input: Tensor | None = None
        self._parts: list[Tensor] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        if self._input is not x:
            self._input = x
            self._parts = list(self.linear(x).split(self.linear.site.widths, dim=-1))
        result = self._parts[index]
        if index == len(self._parts) - 1:
            self._input, self._parts = None, []
        return result


class SharedSlice(nn.Module):
    """Stands where a projection stood; its output columns are a part of a shared product.

    The first slice owns the product's parameters, so that each weight is registered once."""

    def __init__(self, product: SharedProduct, index: int) -> None:
        super().__init__()
        if index == 0:
            self.linear = product.linear
        self._product = [product]
        self.index = index
        self.in_features = product.linear.in_features
        self.out_features = product.linear.site.widths[index]

    def forward(self, x: Tensor) -> Tensor:
        return self._product[0].part(x, self.index)


def install(
    model: nn.Module,
    manifest: Manifest,
    hook: LoraHook,
    *,
    fuse: bool = True,
    tails: bool = False,
    after_attention: Collection[str] = (),
) -> list[LoraLinear]:
    """Replaces every linear of the manifest in place and returns what stands there, in model order. tails: weights have
    spare columns (adapters/kernels/tail.py). after_attention: names of linears whose input is what attention gave."""
    index = {module.name: i for i, module in enumerate(manifest.linears)}
    installed: list[LoraLinear] = []
    done: set[str] = set()
    for name in index:
        if name in done:
            continue
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        group = _siblings(parent, leaf) if fuse else (leaf,)
        linears = [_linear(parent, leaf) for leaf in group]
        widths = tuple(linear.out_features for linear in linears)
        site = Site(
            targets=tuple(index[f"{parent_name}.{leaf}" if parent_name else leaf] for leaf in group),
            offsets=tuple(sum(widths[:j]) for j in range(len(widths))),
            widths=widths,
            in_features=linears[0].in_features,
            out_features=sum(widths),
            after_attention=name in after_attention,
        )
        weight = linears[0].weight.data
        bias = None if linears[0].bias is None else linears[0].bias.data
        if tails:
            weight = tail.with_tail([linear.weight.data for linear in linears])
        elif len(linears) > 1:
            weight = torch.cat([linear.weight.data for linear in linears])
        if len(linears) > 1 and bias is not None:
            bias = torch.cat([linear.bias.data for linear in linears])
        layer = LoraLinear(weight, bias, site, hook, tails=tails)
        if len(linears) == 1:
            setattr(parent, leaf, layer)
        else:
            product = SharedProduct(layer)
            for j, sibling in enumerate(group):
                setattr(parent, sibling, SharedSlice(product, j))
        installed.append(layer)
        done.update(f"{parent_name}.{leaf}" if parent_name else leaf for leaf in group)
    for module in manifest.modules:
        if module.kind == "output":
            weight = model.get_parameter(f"{module.name}.weight")
            if can_pack(weight):
                model.set_submodule(module.name, PackedOutput(_linear(*_place(model, module.name))))
            elif weight.is_cuda:
                model.set_submodule(module.name, OutputProduct(_linear(*_place(model, module.name)), hook))
    return installed


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _linear(parent: nn.Module, leaf: str) -> nn.Linear:
    layer = getattr(parent, leaf)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{leaf}: expected nn.Linear, found {type(layer).__name__}")
    return layer


def _siblings(parent: nn.Module, leaf: str) -> tuple[str, ...]:
    """The group of `leaf` if all its members are linears here that can be stacked, else `leaf` alone."""
    for group in SHARED_INPUT:
        if leaf not in group:
            continue
        members = [getattr(parent, name, None) for name in group]
        linears = [m for m in members if isinstance(m, nn.Linear)]
        if (
            len(linears) == len(group)
            and len({m.in_features for m in linears}) == 1
            and len({m.bias is None for m in linears}) == 1
        ):
            return group
    return (leaf,)
