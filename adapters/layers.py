"""LoRA on a frozen model: every nn.Linear is replaced by a layer that adds the step's plan to its product.

Projections that read the same input (q/k/v, gate/up) become one product (one site). This needs no patched
attention or MLP code: the projections' places are taken by `SharedProduct` slices, and whichever is called first
computes the whole product; its siblings, called with the very same tensor, take their columns of it.

Where the code of an MLP, or of a layer, is known to the byte (known_code.py), a module of ours takes its place that
says the same with fewer kernels (`GatedMlp`, `PreNormLayer`).
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adapters.kernels.dense import PackedWeight, can_pack
from adapters.kernels.tail import Tail, with_tail
from adapters.known_code import gated_forward, is_known, pre_norm_forward
from adapters.manifest import Manifest
from adapters.site import Site

SHARED_INPUT: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling projections that known architectures call with one input, in call order. A wrong guess costs
nothing but speed: a sibling called with another tensor computes its own columns."""


class LoraProducts(Protocol):
    """Products with the current step's deltas."""

    fused: bool
    """Base product and deltas are computed together (`linear`), where that is faster than one after the other."""

    @property
    def tailed(self) -> bool:
        """The step's adapters stand in the tails, so that `gated` may be called."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x [T, in] W0ᵀ + bias -> [T, out]; traceable by torch.compile. residual [T, out]: is added, and may be
        overwritten."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        tail: Tail | None,
        bias: Tensor | None,
        targets: Tensor,
        site: Site,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x [T, in] W0ᵀ + bias + deltas -> [T, out]; traceable by torch.compile. tail: the weight's, if it has one.
        `targets`: int32, the site's. residual: as for `product`."""

    def gated(self, x: Tensor, tail: Tail, targets: Tensor, gate: str) -> Tensor:
        """x [T, in] -> activation(gate) · up, [T, width], of a site of these two with their deltas. gate: of GATES."""


class LoraHook(LoraProducts, Protocol):
    """Adds the current step's LoRA deltas of a site; installed once, its plan changes every step."""

    active: bool
    """False while the step has no adapter at all: then layers launch nothing."""

    def __call__(self, y: Tensor, x: Tensor, site: Site) -> None:
        """y [T, out_features] += deltas of x [T, in_features], in place."""


class LoraLinear(nn.Module):
    """y = x W0ᵀ + b, plus the plan's deltas. W0 [out, in] is the model's own frozen parameter, never written (its
    tail, if it has one, is no part of it)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, site: Site, hook: LoraHook, tail: Tail | None = None
    ) -> None:
        """tail: whose first rows are the weight, and the bias."""
        super().__init__()
        self.packed = PackedWeight(weight) if can_pack(weight) and tail is None else None
        self.weight = None if self.packed else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.site = site
        self.hook = hook
        self.gate: str | None = None
        """The site is gate and up of a GatedMlp with this activation."""
        self.onto = False
        """It is called with a residual."""
        # Buffers: compiled code takes them as inputs, so layers that differ in nothing else share their code.
        for name, tensor in zip(Tail._fields, tail or (None,) * len(Tail._fields), strict=True):
            self.register_buffer(f"tail_{name}", tensor, persistent=False)
        self.register_buffer(
            "targets", torch.tensor(site.targets, dtype=torch.int32, device=weight.device), persistent=False
        )

    @property
    def tail(self) -> Tail | None:
        if self.tail_whole is None:
            return None
        whole, b, scales = (cast(Tensor, part) for part in (self.tail_whole, self.tail_b, self.tail_scales))
        return Tail(whole, cast(Tensor | None, self.tail_bias), b, scales)

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual [..., out]: is added, and may be overwritten."""
        rows = x.reshape(-1, x.shape[-1])
        onto = None if residual is None else residual.view(-1, residual.shape[-1])
        if self.packed is not None:
            y = self.packed.product(rows, self.bias)
            y = y if onto is None else onto + y
        elif self.hook.active and self.hook.fused:
            weight, targets = cast(Tensor, self.weight), cast(Tensor, self.targets)
            y = self.hook.linear(rows, weight, self.tail, self.bias, targets, self.site, onto)
        else:
            y = self.hook.product(rows, cast(Tensor, self.weight), self.bias, onto)
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


class GatedMlp(nn.Module):
    """Stands where an MLP stood whose code is `gated_forward`. In steps with adapters in the tails, what reads the
    product of gate and up, the activation, adds their deltas by the way."""

    def __init__(self, into: LoraLinear, activation: nn.Module, gate: str, back: nn.Module) -> None:
        super().__init__()
        into.gate = gate
        self.into, self.activation, self.back = into, activation, back
        self.gate = gate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: of the last product, if that is a LoraLinear."""
        hook, tail = self.into.hook, self.into.tail
        if hook.tailed and tail is not None:
            h = hook.gated(x.reshape(-1, x.shape[-1]), tail, cast(Tensor, self.into.targets), self.gate)
            h = h.view(*x.shape[:-1], h.shape[-1])
        else:
            gate, up = self.into(x).split(self.into.site.widths, dim=-1)
            h = self.activation(gate) * up
        return self.back(h) if residual is None else self.back(h, residual)


GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
"""Activations, by the names of their classes in torch and transformers, that the kernel of a gate knows."""


def gated_mlp(module: nn.Module) -> GatedMlp | None:
    """What takes the module's place, if its code and its activation are known."""
    if not is_known(module, gated_forward):
        return None
    gate = GATES.get(type(module.act_fn).__name__)
    first, second = module.gate_proj, module.up_proj
    if gate is None or not (isinstance(first, SharedSlice) and isinstance(second, SharedSlice)):
        return None
    if (first.index, second.index) != (0, 1) or len(first.linear.site.widths) != 2:
        return None
    return GatedMlp(first.linear, cast(nn.Module, module.act_fn), gate, cast(nn.Module, module.down_proj))


class PreNormLayer(nn.Module):
    """Stands where a decoder layer stood whose code is `pre_norm_forward`. The last product adds to the residual by
    itself, where the compiler would have a kernel for it."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, layer: nn.Module, mlp: GatedMlp, back: LoraLinear) -> None:
        super().__init__()
        back.onto = True
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.mlp = mlp
        for name, value in vars(layer).items():  # whatever a model's code may ask its layers for
            if name not in vars(self):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        residual = hidden_states + attended
        return self.mlp(self.post_attention_layernorm(residual), residual)


def pre_norm_layer(module: nn.Module) -> PreNormLayer | None:
    """What takes the module's place, if its code is known and its MLP is a GatedMlp that ends in a LoraLinear."""
    if not is_known(module, pre_norm_forward) or module._parameters or module._buffers:
        return None
    mlp = cast(nn.Module, module.mlp)
    if not isinstance(mlp, GatedMlp) or not isinstance(mlp.back, LoraLinear):
        return None
    return PreNormLayer(module, mlp, mlp.back)


def sites(model: nn.Module, manifest: Manifest, *, fuse: bool = True) -> list[tuple[tuple[str, ...], Site]]:
    """The sites that `install` will make of a model's linears, in model order, each with the names of its linears.
    fuse: projections that can share a product do."""
    index = {module.name: i for i, module in enumerate(manifest.linears)}
    found: list[tuple[tuple[str, ...], Site]] = []
    done: set[str] = set()
    for name in index:
        if name in done:
            continue
        parent, leaf = _place(model, name)
        group = _siblings(parent, leaf) if fuse else (leaf,)
        linears = [_linear(parent, leaf) for leaf in group]
        names = tuple(name.removesuffix(leaf) + sibling for sibling in group)
        widths = tuple(linear.out_features for linear in linears)
        site = Site(
            targets=tuple(index[name] for name in names),
            offsets=tuple(sum(widths[:j]) for j in range(len(widths))),
            widths=widths,
            in_features=linears[0].in_features,
            out_features=sum(widths),
        )
        found.append((names, site))
        done.update(names)
    return found


def install(
    model: nn.Module,
    manifest: Manifest,
    hook: LoraHook,
    *,
    fuse: bool = True,
    tails: bool = False,
) -> list[LoraLinear]:
    """Replaces every linear of the manifest in place and returns what stands there, in model order. tails: weights have
    spare rows (adapters/kernels/tail.py), and MLPs and layers whose code is known are replaced."""
    installed: list[LoraLinear] = []
    for names, site in sites(model, manifest, fuse=fuse):
        linears = [_linear(*_place(model, name)) for name in names]
        weight = linears[0].weight.data
        bias = None if linears[0].bias is None else linears[0].bias.data
        if len(linears) > 1 and bias is not None:
            bias = torch.cat([linear.bias.data for linear in linears])
        tail = None
        if tails:
            tail = with_tail([linear.weight.data for linear in linears], bias)
            weight = tail.whole[: site.out_features]
        elif len(linears) > 1:
            weight = torch.cat([linear.weight.data for linear in linears])
        layer = LoraLinear(weight, bias, site, hook, tail)
        product = SharedProduct(layer)
        for j, name in enumerate(names):
            model.set_submodule(name, layer if len(names) == 1 else SharedSlice(product, j))
        installed.append(layer)
    if tails:
        for name, module in list(model.named_modules()):
            if (mlp := gated_mlp(module)) is not None:
                model.set_submodule(name, mlp)
        for name, module in list(model.named_modules()):
            if (pre_norm := pre_norm_layer(module)) is not None:
                model.set_submodule(name, pre_norm)
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
