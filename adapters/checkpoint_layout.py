"""Where a base model's Hugging Face folder holds each tensor, or every reason why adapters cannot be merged into it.

Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import AdapterRefused, shown
from adapters.manifest import Manifest, Module
from adapters.safetensors_header import Header, TensorRef, load_json, read_header
from adapters.safetensors_writer import TensorPlan, aligned_order, head_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
SOURCE_FILE = "loraplex-source.json"
"""Beside weights that loraplex has converted: it says of that very folder what it was made from."""
MERGED_DTYPES = ("F32", "F16", "BF16")

_COMPANIONS = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Configuration, generation configuration, tokenizer, chat templates, the model's own code and its terms."""
_NO_COMPANIONS = ("adapter_config.json", CONFIG_FILE, SOURCE_FILE)
_BIN = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Layout:
    """Every tensor of a checkpoint by its own name, in the order of its files; `names`: module -> its weight's name."""

    folder: Path
    tensors: dict[str, TensorRef]
    names: dict[str, str]

    @property
    def tensor_bytes(self) -> int:
        return sum(ref.end - ref.begin for ref in self.tensors.values())

    def companions(self) -> list[Path]:
        """The files beside the weights that belong to the model, but for config.json, sorted. All lie in `folder`
        itself but additional chat templates."""
        found = {path for pattern in _COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(
            path
            for path in found
            if path.name not in _NO_COMPANIONS and not path.name.startswith(".") and ".index.json" not in path.name
        )


def check_base(folder: Path, manifest: Manifest, needed: Sequence[Module]) -> list[str]:
    """Every reason why the `needed` modules cannot be changed in this checkpoint."""
    return _examine(folder, manifest, needed)[1]


def read_layout(folder: Path, manifest: Manifest, needed: Sequence[Module]) -> Layout:
    """AdapterRefused with every reason; only configuration, index and headers are read."""
    layout, reasons = _examine(folder, manifest, needed)
    if reasons:
        raise AdapterRefused(reasons)
    return layout


def plan_shards(layout: Layout, limit: int) -> dict[str, list[TensorPlan]]:
    """File name -> its tensors: as many as fit, in the base's own order. A tensor beyond the limit has a file alone."""
    groups: list[list[TensorPlan]] = []
    size = 0
    for name, ref in layout.tensors.items():
        plan = TensorPlan(name, ref.dtype, ref.shape)
        if not groups or size + plan.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(plan)
        size += plan.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: aligned_order(groups[0])}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": aligned_order(g) for i, g in enumerate(groups, 1)}


def plan_index(shards: dict[str, list[TensorPlan]], layout: Layout) -> bytes:
    """model.safetensors.index.json of several shards."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    content = {"metadata": {"total_size": layout.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2).encode()


def planned_bytes(layout: Layout, limit: int) -> int:
    """Of all files of the checkpoint that is made of this one, in shards of that size."""
    shards = plan_shards(layout, limit)
    total = layout.tensor_bytes + sum(len(head_of(tensors)[0]) for tensors in shards.values())
    if len(shards) > 1:
        total += len(plan_index(shards, layout))
    return total + sum(path.stat().st_size for path in [*layout.companions(), layout.folder / CONFIG_FILE])


def _examine(folder: Path, manifest: Manifest, needed: Sequence[Module]) -> tuple[Layout, list[str]]:
    reasons = _config_faults(folder)
    headers, faults = _headers(folder)
    reasons += faults
    tensors: dict[str, TensorRef] = {}
    for header in headers:
        for name, ref in header.tensors.items():
            if name in tensors:
                reasons.append(f"base: tensor {shown(name)} is in {tensors[name].file} and again in {ref.file}")
            tensors[name] = ref
    names: dict[str, str] = {}
    if not faults:
        names = _names(tensors, manifest, needed)
        reasons += _weight_faults(tensors, names, needed)
    return Layout(folder, tensors, names), reasons


def _config_faults(folder: Path) -> list[str]:
    path = folder / CONFIG_FILE
    try:
        config = load_json(path.read_bytes())
    except FileNotFoundError:
        return [f"base: {CONFIG_FILE} is missing"]
    except ValueError as error:
        return [f"base: {CONFIG_FILE}: not valid JSON: {shown(str(error), 200)}"]
    parts = [config, *config.values()] if isinstance(config, dict) else []
    for part in parts:
        quantised: Any = part.get("quantization_config") if isinstance(part, dict) else None
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            return [
                f"base: {CONFIG_FILE}: quantization_config ({shown(method)}): a quantised base cannot take the sum"
                " without being rounded again; merge into the checkpoint that it was quantised from"
            ]
    return []


def _headers(folder: Path) -> tuple[list[Header], list[str]]:
    """Of the files that transformers would load: model.safetensors, else the shards that the index names."""
    index: dict[str, str] = {}
    if (folder / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        try:
            index = load_json((folder / INDEX_FILE).read_bytes())["weight_map"]
            files = sorted(set(index.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [], [f"base: {INDEX_FILE}: must be an object whose weight_map maps tensor names to file names"]
    else:
        others = sorted(path.name for pattern in ("*.safetensors", *_BIN) for path in folder.glob(pattern))
        found = f"; found {', '.join(others[:5])}" if others else ""
        return [], [
            f"base: neither {SINGLE_FILE} nor {INDEX_FILE}{found}: only safetensors checkpoints can be merged into"
            " (load it and save it again with save_pretrained)"
        ]
    headers: list[Header] = []
    reasons: list[str] = []
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            reasons.append(f"base: {INDEX_FILE} names {shown(file)}, which is no plain file name")
            continue
        try:
            headers.append(read_header(folder / file, file))
        except FileNotFoundError:
            reasons.append(f"base: {INDEX_FILE} names {shown(file)}, which is missing")
        except AdapterRefused as error:
            reasons += [f"base: {reason}" for reason in error.reasons]
    present = {header.file: header.tensors for header in headers}
    for name, file in index.items():
        if file in present and name not in present[file]:
            reasons.append(f"base: {INDEX_FILE} says that {shown(name)} is in {file}, where it is not")
    return headers, reasons


def _names(tensors: dict[str, TensorRef], manifest: Manifest, needed: Sequence[Module]) -> dict[str, str]:
    """The weight of each module: under the module's own name, or with one other prefix for all of them.

    Checkpoints saved from another class than the one that is served lack a prefix (`layers.0...` for
    `model.layers.0...`) or have one more. Such a prefix is taken only if it is the only one under which every linear
    of the base is found, each with its own shape."""
    own = {module.name: f"{module.name}.weight" for module in needed}
    if all(name in tensors for name in own.values()) or not manifest.linears:
        return own
    first = manifest.linears[0].name
    candidates = set()
    for start in (0, *(i + 1 for i, char in enumerate(first) if char == ".")):
        tail = f"{first[start:]}.weight"
        candidates |= {
            (first[:start], name[: -len(tail)]) for name in tensors if name == tail or name.endswith(f".{tail}")
        }
    found: list[dict[str, str]] = []
    for old, new in sorted(candidates):
        names = {m.name: f"{new}{m.name[len(old) :]}.weight" for m in manifest.linears if m.name.startswith(old)}
        fits = all(
            m.name in names and (ref := tensors.get(names[m.name])) and ref.shape == (m.out_features, m.in_features)
            for m in manifest.linears
        )
        if fits and names not in found:
            found.append(names)
    return found[0] if len(found) == 1 else own


def _weight_faults(tensors: dict[str, TensorRef], names: dict[str, str], needed: Sequence[Module]) -> list[str]:
    reasons = []
    for module in needed:
        name = names[module.name]
        ref = tensors.get(name)
        if ref is None:
            reasons.append(
                f"base: its checkpoint has no tensor {name}; a weight that is stored fused, tied or under another name"
                " cannot be merged into"
            )
        elif ref.dtype not in MERGED_DTYPES:
            reasons.append(
                f"base: {name} is stored as {ref.dtype}; only {', '.join(MERGED_DTYPES)} can be merged into, not"
                " quantised weights"
            )
        elif ref.shape != (module.out_features, module.in_features):
            reasons.append(
                f"base: {name} has shape {list(ref.shape)}, but the served module has"
                f" {[module.out_features, module.in_features]}: is this the checkpoint that is served?"
            )
    return reasons
