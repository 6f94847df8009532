"""What the merge tests share: sources out of folders, PEFT's own merge as the oracle, deltas of both results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from adapters.manifest import Manifest
from adapters.merge import WEIGHTS_NAME, merge_adapters
from adapters.merge_request import MergeOptions, MergeSource
from adapters.peft_config import CONFIG_NAME

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Module -> (A, B)."""

NAME = "merged"


def source_of(folder: Path, weight: float = 1.0, name: str | None = None) -> MergeSource:
    return MergeSource(name or folder.name, folder / CONFIG_NAME, {WEIGHTS_NAME: folder / WEIGHTS_NAME}, None, weight)


def merged_by_us(
    folders: Sequence[Path], weights: Sequence[float], manifest: Manifest, out: Path, options: MergeOptions
) -> Path:
    merge_adapters([source_of(f, w) for f, w in zip(folders, weights, strict=True)], manifest, out, options)
    return out


def with_sources(model: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """`model` with the adapters loaded by PEFT as "s0", "s1", ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, folders[0], adapter_name="s0")
        for i, folder in enumerate(folders[1:], 1):
            peft.load_adapter(folder, adapter_name=f"s{i}")
    return peft


def merged_by_peft(peft: PeftModel, weights: Sequence[float], method: str, seed: int = 0, **options: Any) -> Pairs:
    """add_weighted_adapter, its random numbers seeded as merge_adapters says: after the new layers are made."""
    with warnings.catch_warnings(), _seeded_after_injection(peft, seed):
        warnings.simplefilter("ignore")
        names = [f"s{i}" for i in range(len(weights))]
        peft.add_weighted_adapter(names, list(weights), NAME, combination_type=method, **options)
    return pairs_of(peft, NAME)


@contextmanager
def _seeded_after_injection(peft: PeftModel, seed: int) -> Iterator[None]:
    tuner = peft.base_model
    inject = tuner.inject_adapter

    def inject_and_seed(*arguments: Any, **named: Any) -> Any:
        result = inject(*arguments, **named)
        torch.manual_seed(seed)
        return result

    tuner.inject_adapter = inject_and_seed
    try:
        yield
    finally:
        del tuner.inject_adapter


def layers_of(peft: PeftModel) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in peft.named_modules() if isinstance(m, LoraLayer)}


def pairs_of(peft: PeftModel, adapter: str) -> Pairs:
    return {
        name: (layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data)
        for name, layer in layers_of(peft).items()
        if adapter in layer.lora_A
    }


def loaded_pairs(model: PreTrainedModel, folder: Path) -> Pairs:
    """A and B as PEFT loads our folder, which must have scale 1 everywhere."""
    peft = with_sources(model, [folder])
    scales = {layer.scaling["s0"] for layer in layers_of(peft).values()}
    if scales != {1.0}:
        raise AssertionError(f"scales of a merged adapter: {scales}")
    return pairs_of(peft, "s0")


def deltas(pairs: Pairs) -> dict[str, Tensor]:
    return {name: b.double() @ a.double() for name, (a, b) in pairs.items()}


def source_deltas(peft: PeftModel, source: str) -> dict[str, Tensor]:
    """scale · B A in float64, out of PEFT's layers."""
    return {
        name: layer.scaling[source] * (b.double() @ a.double())
        for name, layer in layers_of(peft).items()
        if source in layer.lora_A
        for a, b in [(layer.lora_A[source].weight.data, layer.lora_B[source].weight.data)]
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Of the same modules, and each delta within `tolerance` of the other, relative to its norm."""
    assert ours.keys() == theirs.keys()
    for name, theirs_of in theirs.items():
        error = float((ours[name] - theirs_of).norm())
        assert math.isfinite(error), name
        assert error <= tolerance * float(theirs_of.norm()) + 1e-12, (name, error, float(theirs_of.norm()))
