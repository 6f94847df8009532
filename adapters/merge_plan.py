"""What a merge will give, known before it is done: from configurations and headers alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.checkpoint_layout import planned_bytes, read_layout
from adapters.manifest import Manifest, Module
from adapters.merge_request import (
    DEFAULT_SHARD_BYTES,
    METHODS,
    Into,
    MergeOptions,
    MergeSource,
    OpenedSource,
    needed_modules,
    open_checked,
)
from adapters.safetensors_writer import TensorPlan, head_of


@dataclass(frozen=True)
class PlannedModule:
    """One module of the result; `sources` are numbers of those that adapt it, in their order."""

    module: Module
    sources: tuple[int, ...]
    rank: int

    def tensors(self) -> tuple[TensorPlan, TensorPlan]:
        prefix = f"base_model.model.{self.module.name}"
        return (
            TensorPlan(f"{prefix}.lora_A.weight", "F32", (self.rank, self.module.in_features)),
            TensorPlan(f"{prefix}.lora_B.weight", "F32", (self.module.out_features, self.rank)),
        )


@dataclass(frozen=True)
class Forecast:
    """`reasons`: why the merge is impossible; with any of them the rest is 0. `bytes`: of a checkpoint's files exactly,
    of an adapter's weights. `rank`: of an adapter, the largest."""

    reasons: tuple[str, ...]
    bytes: int = 0
    rank: int = 0


def forecast_merge(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    options: MergeOptions,
    into: Into,
    model: Path,
    memory: int | None = None,
) -> Forecast:
    """`model`: the base's Hugging Face folder. `memory`: the bytes that the merge's process may take."""
    opened, reasons = open_checked(sources, manifest, options, into, model, memory)
    if reasons:
        return Forecast(tuple(reasons))
    if into == "checkpoint":
        layout = read_layout(model, manifest, needed_modules(opened, manifest))
        return Forecast((), planned_bytes(layout, options.max_shard_bytes or DEFAULT_SHARD_BYTES))
    plan = plan_modules(opened, manifest, options)
    head, nbytes = head_of([tensor for planned in plan for tensor in planned.tensors()])
    return Forecast((), len(head) + nbytes, max(planned.rank for planned in plan))


def plan_modules(opened: Sequence[OpenedSource], manifest: Manifest, options: MergeOptions) -> list[PlannedModule]:
    """In the manifest's order."""
    svd_rank = options.svd_rank or max(one.config_rank for one in opened)
    plan = []
    for module in manifest.linears:
        numbers = tuple(i for i, one in enumerate(opened) if module.name in one.targets)
        if numbers:
            ranks = [opened[i].targets[module.name].rank for i in numbers]
            rank = merged_rank(ranks, options, svd_rank, module.out_features, module.in_features)
            plan.append(PlannedModule(module, numbers, rank))
    return plan


def merged_rank(ranks: Sequence[int], options: MergeOptions, svd_rank: int, out_features: int, in_features: int) -> int:
    """The rank of a merged module from its sources' ranks. `svd_rank`: the one asked for, or PEFT's default."""
    if options.method == "cat":
        return sum(ranks)
    if not METHODS[options.method].svd:
        return ranks[0]
    # A sum of products has no higher rank than its factors together; pruning a product makes it of any rank.
    limit = sum(ranks) if options.method == "svd" else svd_rank
    return min(svd_rank, limit, out_features, in_features)
