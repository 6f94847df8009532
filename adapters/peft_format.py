"""A PEFT adapter (adapter_config.json and safetensors headers) on a base model: AdapterSpec, or every reason why not.

The format is PEFT 0.21's. Nothing is guessed: every tensor must bind to a module of the base that the configuration
adapts, and every module that the configuration adapts must have both its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from adapters.blobs import INDEX_SUFFIX, AdapterRecord, Blobs
from adapters.errors import MAX_REASONS, AdapterRefused, BlobDamaged, capped, shown
from adapters.manifest import Manifest, Module
from adapters.patterns import Budget, PatternError
from adapters.peft_config import CONFIG_NAME, LoraSettings, read_config, scale_of
from adapters.safetensors_header import Header, TensorRef, load_json, read_header_from
from adapters.targets import PatternMap, TargetMatcher

SERVED_DTYPES = ("BF16", "F16", "F32")
MAX_INDEX_BYTES = 8 << 20
MAX_RECORD_BYTES = 1 << 20

_PREFIX = "base_model.model."
# PEFT leaves the adapter's name out when it saves; other trainers save the state dict as it is.
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_UNSERVED = (
    ("lora_magnitude_vector", "DoRA's magnitudes are not served"),
    ("lora_embedding_", "LoRA of an embedding is not served"),
    ("lora_diag", "KaSA is not served"),
    ("lora_velora", "VeLoRA is not served"),
    ("modules_to_save", "fully trained modules (modules_to_save) are not served"),
    ("original_module", "fully trained modules (modules_to_save) are not served"),
    ("token_adapter", "trained tokens are not served"),
    ("trainable_tokens", "trained tokens are not served"),
    (".bias", "trained biases are not served"),
)


class TargetSpec(msgspec.Struct, frozen=True):
    """One adapted linear: y += scale · (x Aᵀ) Bᵀ with a: [rank, in_features] and b: [out_features, rank].

    `index` is its target index in the manifest, `scale` alpha/rank or alpha/sqrt(rank)."""

    index: int
    module: str
    rank: int
    alpha: float
    scale: float
    a: TensorRef
    b: TensorRef


class AdapterSpec(msgspec.Struct, frozen=True):
    """An adapter that fits its base. `rank` and `alpha` are the configuration's defaults, `max_rank` the largest of any
    target; `target_modules` the distinct last names of its targets, sorted; `targets` are sorted by index."""

    rank: int
    alpha: float
    max_rank: int
    use_rslora: bool
    target_modules: tuple[str, ...]
    targets: tuple[TargetSpec, ...]
    parameters: int
    tensor_bytes: int


def parse_adapter(
    config: bytes, headers: Mapping[str, Header], manifest: Manifest, index: bytes | None = None
) -> AdapterSpec:
    """`headers` by file name; `index`: the shards' index JSON. AdapterRefused with every reason (50, then a count)."""
    spec, reasons = examine(config, headers, manifest, index)
    if spec is None:
        raise AdapterRefused(capped(reasons))
    return spec


def examine(
    config: bytes, headers: Mapping[str, Header] | None, manifest: Manifest, index: bytes | None = None
) -> tuple[AdapterSpec | None, list[str]]:
    """The specification, or None and all reasons. `headers` None: they could not be read, check the rest."""
    settings, reasons = read_config(config)
    wanted: dict[str, _Wanted] | None = None
    if settings is not None:
        wanted, faults = _wanted(settings, manifest)
        reasons += faults
    if headers is None:
        return None, reasons
    reasons += _check_shards(headers, index)
    found, faults = _found(headers, manifest)
    reasons += faults
    if settings is None or wanted is None:
        return None, reasons
    targets, faults = _bind(wanted, found, manifest)
    reasons += faults
    if reasons:
        return None, reasons
    return _summary(settings, targets), []


def load_spec(digest: str, store: Blobs, manifest: Manifest) -> AdapterSpec:
    """The specification of a stored adapter version, from its record, configuration and headers alone.

    AdapterMissing, BlobDamaged if sizes are not the record's, AdapterRefused if it does not fit this base."""
    return load_record(digest, store, manifest)[1]


def load_record(digest: str, store: Blobs, manifest: Manifest) -> tuple[AdapterRecord, AdapterSpec]:
    """As `load_spec`, with the record that names the blobs. Every file is read and hashed: what follows trusts them."""
    if store.size(digest) > MAX_RECORD_BYTES:
        raise BlobDamaged(digest, "too large for an adapter record")
    with store.open(digest) as stream:
        record = AdapterRecord.from_json(stream.read(), digest)
    config, index, headers = b"", None, {}
    for name, sha, size in record.files:
        if store.size(sha) != size:
            raise BlobDamaged(sha, f"{name} has {store.size(sha)} bytes, its record says {size}")
        store.verify(sha)
        with store.open(sha) as stream:
            if name == CONFIG_NAME:
                config = stream.read()
            elif name.endswith(INDEX_SUFFIX):
                index = stream.read()
            else:
                headers[name] = read_header_from(stream, size, name)
    return record, parse_adapter(config, headers, manifest, index)


class _Wanted(msgspec.Struct, frozen=True):
    """What the configuration says of one module."""

    module: Module
    rank: int
    alpha: float
    scale: float


def _wanted(settings: LoraSettings, manifest: Manifest) -> tuple[dict[str, _Wanted] | None, list[str]]:
    budget = Budget()
    reasons: list[str] = []
    try:
        modules = TargetMatcher(settings, budget).targets(manifest)
        ranks = PatternMap("rank_pattern", settings.rank_pattern, budget)
        alphas = PatternMap("alpha_pattern", settings.alpha_pattern, budget)
        wanted = {}
        for module in modules:
            if module.kind != "linear":
                reasons.append(f"{CONFIG_NAME}: target_modules adapts {module.name}: {_UNSERVED_KIND[module.kind]}")
                continue
            rank = ranks.get(module.name, settings.r)
            alpha = alphas.get(module.name, settings.lora_alpha)
            wanted[module.name] = _Wanted(module, rank, alpha, scale_of(alpha, rank, settings.use_rslora))
    except PatternError as error:
        return None, [f"{CONFIG_NAME}: {error}"]
    if not wanted and not reasons:
        kinds = sorted({module.name.rpartition(".")[2] for module in manifest.linears})
        reasons.append(
            f"{CONFIG_NAME}: {_choice(settings)} adapts no module of this"
            f" {manifest.architecture}; its linear modules are called {', '.join(kinds[:20])}"
        )
    return wanted, reasons


def _choice(settings: LoraSettings) -> str:
    """The fields that choose modules, as far as they are given."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    given = [(name, value) for name in fields if (value := getattr(settings, name))]
    return ", ".join(f"{name} = {shown(list(value) if isinstance(value, tuple) else value)}" for name, value in given)


_UNSERVED_KIND = {
    "embedding": "LoRA of an embedding is not served, only of linear modules",
    "output": "LoRA of the LM head is not served, only of the other linear modules",
}


def _check_shards(headers: Mapping[str, Header], index: bytes | None) -> list[str]:
    if not headers:
        return ["no weights: at least one .safetensors file is needed"]
    if index is None:
        if len(headers) == 1:
            return []
        return [f"{len(headers)} weights files but no index: add the .safetensors.index.json that was saved with them"]
    if len(index) > MAX_INDEX_BYTES:
        return [f"index: {len(index)} bytes; at most {MAX_INDEX_BYTES} are accepted"]
    try:
        content = load_json(index)
    except ValueError as error:
        return [f"index: not valid JSON: {shown(str(error), 200)}"]
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        return ["index: must be an object whose weight_map maps tensor names to file names"]
    reasons = []
    for file in sorted(set(shards.values()) - headers.keys()):
        reasons.append(f"index: names file {shown(file)}, which was not uploaded")
    for tensor, file in shards.items():
        if file in headers and tensor not in headers[file].tensors:
            reasons.append(f"index: says that {shown(tensor)} is in {file}, where it is not")
    for file, header in headers.items():
        reasons += [
            f"{file}: tensor {shown(tensor)} is not in the index for this file"
            for tensor in header.tensors
            if shards.get(tensor) != file
        ]
    return reasons


def _found(headers: Mapping[str, Header], manifest: Manifest) -> tuple[dict[tuple[str, str], TensorRef], list[str]]:
    """(module, "A" or "B") -> tensor, for modules of the base; a reason for every other tensor."""
    kinds = {module.name: module.kind for module in manifest.modules}
    found: dict[tuple[str, str], TensorRef] = {}
    reasons = []
    for header in headers.values():
        for name, ref in header.tensors.items():
            label = f"{ref.file}: tensor {shown(name, 200)}"
            match = _TENSOR.fullmatch(name)
            if match is None:
                reasons.append(f"{label}: {_why_unknown(name)}")
                continue
            key = (match["module"], match["side"])
            kind = kinds.get(key[0])
            if kind is None:
                hint = _hint(key[0], manifest) if len(reasons) < MAX_REASONS else ""
                reasons.append(f"{label}: this {manifest.architecture} has no such module{hint}")
            elif kind != "linear":
                reasons.append(f"{label}: {_UNSERVED_KIND[kind]}")
            elif key in found:
                reasons.append(f"{label}: a second lora_{key[1]} for {key[0]}; upload one adapter at a time")
            else:
                if ref.dtype not in SERVED_DTYPES:
                    reasons.append(f"{label}: dtype {ref.dtype}; {', '.join(SERVED_DTYPES)} are accepted")
                found[key] = ref
    return found, reasons


def _why_unknown(name: str) -> str:
    for part, reason in _UNSERVED:
        if part in name:
            return reason
    if ".lora_A" in name or ".lora_B" in name:
        if not name.startswith(_PREFIX):
            return f"its name must begin with {_PREFIX}, as PEFT writes it"
        return f"its name must be {_PREFIX}<module>.lora_A.weight or .lora_B.weight"
    return "not a LoRA tensor; only lora_A and lora_B weights are served (was the embedding or the whole model saved?)"


def _hint(module: str, manifest: Manifest) -> str:
    """What the base has instead: the same module under another prefix, or its neighbours."""
    layer = module.find("layers.")
    if layer < 0:
        return f"; its modules are named like {manifest.linears[0].name}" if manifest.linears else ""
    tail = module[layer:]
    same = next((m.name for m in manifest.linears if m.name == tail or m.name.endswith(f".{tail}")), None)
    if same is not None:
        return f"; it has {same}: the adapter was made for a model that is wrapped differently"
    parent = tail.rpartition(".")[0]
    parts = (m.name.rpartition(".") for m in manifest.linears)
    near = dict.fromkeys(last for folder, _, last in parts if folder.endswith(parent))
    return f"; beside it stand {', '.join(near)}" if near else ""


def _bind(
    wanted: dict[str, _Wanted], found: dict[tuple[str, str], TensorRef], manifest: Manifest
) -> tuple[list[TargetSpec], list[str]]:
    reasons = [
        f"{ref.file}: lora_{side} of {module}: {CONFIG_NAME} does not adapt this module"
        " (target_modules, exclude_modules, layers_to_transform)"
        for (module, side), ref in found.items()
        if module not in wanted
    ]
    targets = []
    for index, module in enumerate(manifest.linears):
        want = wanted.get(module.name)
        if want is None:
            continue
        a, b = found.get((module.name, "A")), found.get((module.name, "B"))
        for side, ref, shape in (
            ("A", a, (want.rank, module.in_features)),
            ("B", b, (module.out_features, want.rank)),
        ):
            if ref is None:
                reasons.append(f"lora_{side} of {module.name} is missing; {CONFIG_NAME} adapts this module")
            elif ref.shape != shape:
                reasons.append(
                    f"{ref.file}: lora_{side} of {module.name} has shape {list(ref.shape)}, expected {list(shape)}"
                    f" (rank {want.rank}, the base's linear maps {module.in_features} to {module.out_features})"
                )
        if a is not None and b is not None:
            targets.append(TargetSpec(index, module.name, want.rank, float(want.alpha), want.scale, a, b))
    return targets, reasons


def _summary(settings: LoraSettings, targets: list[TargetSpec]) -> AdapterSpec:
    return AdapterSpec(
        rank=settings.r,
        alpha=float(settings.lora_alpha),
        max_rank=max(target.rank for target in targets),
        use_rslora=settings.use_rslora,
        target_modules=tuple(sorted({target.module.rpartition(".")[2] for target in targets})),
        targets=tuple(targets),
        parameters=sum(t.rank * (t.a.shape[1] + t.b.shape[0]) for t in targets),
        tensor_bytes=sum(ref.end - ref.begin for t in targets for ref in (t.a, t.b)),
    )
