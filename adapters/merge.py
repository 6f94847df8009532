"""Adapters into one adapter, module by module: memory does not grow with the number of modules.

The result is in float32, scale 1 in every module (lora_alpha = r). It takes its place in PEFT's
add_weighted_adapter, with these differences, all of them where PEFT's own result is not what its factors say:
- use_rslora is false, since the factors contain the scales (PEFT copies it from the first source and then multiplies
  by √r once more);
- ranks that differ between modules are written down in rank_pattern (PEFT drops it, and its folder cannot be loaded);
  cat keeps each module's true rank (PEFT pads with zeros);
- exactly the modules that some source adapts are adapted (PEFT takes layers_to_transform and exclude_modules from the
  first source, and fails where only the union of the names matches), whatever form target_modules has.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import AdapterRefused, capped
from adapters.folders import emptied, write_synced
from adapters.manifest import Manifest, Module
from adapters.merge_methods import merge_module
from adapters.merge_plan import PlannedModule, plan_modules
from adapters.merge_request import MergeOptions, MergeSource, OpenedSource, open_sources
from adapters.peft_config import CONFIG_NAME
from adapters.peft_format import TargetSpec, parse_adapter
from adapters.safetensors_header import load_json, read_header
from adapters.safetensors_writer import SafetensorsWriter
from adapters.tensor_reader import TensorReader, bytes_of

WEIGHTS_NAME = "adapter_model.safetensors"


def merge_adapters(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    out: Path,
    options: MergeOptions,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes adapter_model.safetensors and then adapter_config.json into `out`, which is emptied first.

    AdapterRefused with every reason that `check_merge` gives, or when merged values are not finite in the base's dtype.
    `progress` is called with shares from 0 to 1, which never fall.

    Random numbers (dare_*): one generator, torch.Generator().manual_seed(seed), drawn from module by module in the
    manifest's order, which is PEFT's. So PEFT on CPU gives the same adapter when torch.manual_seed(seed) is called
    after it has added the new adapter's layers (whose initialisation draws numbers too) and before it merges.

    Memory: what adapters/merge_memory.py says, of one module at a time. The *_svd methods that prune cost a dense SVD
    per module."""
    opened = open_sources(sources, manifest, options, "adapter")
    plan = plan_modules(opened, manifest, options)
    generator = torch.Generator().manual_seed(options.seed or 0)
    reasons: list[str] = []
    progress(0.0)
    emptied(out)
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(one.source.weights)) for one in opened]
        writer = stack.enter_context(
            SafetensorsWriter(out / WEIGHTS_NAME, [tensor for planned in plan for tensor in planned.tensors()])
        )
        costs = [planned.module.in_features * planned.module.out_features for planned in plan]
        done = 0
        for planned, cost in zip(plan, costs, strict=True):
            stored = [_stored(opened[i], readers[i], planned.module) for i in planned.sources]
            with torch.no_grad():
                merged = merge_module(stored, options, planned.rank, generator)
            for side, tensor in zip("AB", merged, strict=True):
                reasons += _value_faults(tensor, f"lora_{side} of {planned.module.name}", manifest)
                writer.write(bytes_of(tensor))
            done += cost
            progress(done / sum(costs))
    if reasons:
        raise AdapterRefused(capped(reasons))
    config = json.dumps(_config(opened, plan, manifest), indent=2).encode()
    # What was planned must be what the configuration says of the tensors, to PEFT's rules.
    parse_adapter(config, {WEIGHTS_NAME: read_header(out / WEIGHTS_NAME)}, manifest)
    write_synced(out / CONFIG_NAME, config)


@dataclass(frozen=True)
class _Stored:
    """adapters.merge_methods.Source: A and B are read each time they are asked for, and nothing of them is kept."""

    reader: TensorReader
    target: TargetSpec
    weight: float

    @property
    def a(self) -> Tensor:
        return self.reader.tensor(self.target.a)

    @property
    def b(self) -> Tensor:
        return self.reader.tensor(self.target.b)

    @property
    def rank(self) -> int:
        return self.target.rank

    @property
    def scale(self) -> float:
        return self.target.scale


def _stored(one: OpenedSource, reader: TensorReader, module: Module) -> _Stored:
    return _Stored(reader, one.targets[module.name], one.source.weight)


def _value_faults(tensor: Tensor, label: str, manifest: Manifest) -> list[str]:
    if torch.isfinite(tensor.to(getattr(torch, manifest.dtype))).all():
        return []
    return [f"{label}: merged values are not finite in {manifest.dtype}, in which this base runs; use smaller weights"]


def _config(opened: Sequence[OpenedSource], plan: Sequence[PlannedModule], manifest: Manifest) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults for what is not there."""
    by_kind: dict[str, list[PlannedModule]] = defaultdict(list)
    for planned in plan:
        by_kind[_last(planned.module)].append(planned)
    in_base = Counter(_last(module) for module in manifest.modules)
    default = Counter(planned.rank for planned in plan).most_common(1)[0][0]
    targets: list[str] = []
    ranks: dict[str, int] = {}
    for kind, group in by_kind.items():
        # The last name alone where it says the same, else whole names: longer first, since PEFT takes the first match.
        names = sorted((planned.module.name for planned in group), key=len, reverse=True)
        targets += [kind] if len(group) == in_base[kind] else names
        if len({planned.rank for planned in group}) > 1:
            rank_of = {planned.module.name: planned.rank for planned in group}
            ranks |= {name: rank_of[name] for name in names}
        elif group[0].rank != default:
            ranks[kind] = group[0].rank
    bases = {str(load_json(one.source.config.read_bytes()).get("base_model_name_or_path") or "") for one in opened}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": (bases.pop() or None) if len(bases) == 1 else None,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "use_rslora": False,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _last(module: Module) -> str:
    return module.name.rpartition(".")[2]
