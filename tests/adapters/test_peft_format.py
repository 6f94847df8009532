from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from adapters import patterns
from adapters.errors import AdapterRefused
from adapters.manifest import Manifest, Module
from adapters.patterns import Budget
from adapters.peft_config import FIELDS, read_config
from adapters.peft_format import AdapterSpec, parse_adapter
from adapters.safetensors_header import Header, TensorRef, read_header
from adapters.targets import PatternMap, TargetMatcher

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def parse(folder: Path, manifest: Manifest, **changes: Any) -> AdapterSpec:
    config = json.loads((folder / "adapter_config.json").read_bytes())
    config.update(changes)
    headers = {path.name: read_header(path) for path in folder.glob("*.safetensors")}
    return parse_adapter(json.dumps(config).encode(), headers, manifest)


def reasons(folder: Path, manifest: Manifest, **changes: Any) -> list[str]:
    with pytest.raises(AdapterRefused) as caught:
        parse(folder, manifest, **changes)
    return caught.value.reasons


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# ---------------------------------------------------------------- what PEFT makes of the same files

# Keys of patterns are sorted here since save_pretrained sorts them, while the first that matches counts.
CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "one name as in a path": {"r": 1, "lora_alpha": 3, "target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "full names": {"r": 2, "target_modules": [Q0, "model.layers.2.mlp.down_proj"]},
    "some names match nothing": {"r": 2, "target_modules": ["q_proj", "c_attn", "j"]},
    "regex": {"r": 3, "lora_alpha": 7, "target_modules": r".*\.(?:0|2)\.(self_attn\.[qk]_proj|mlp\.\w+_proj)"},
    "regex with look-ahead": {"r": 3, "target_modules": r"(?!.*layers\.1).*\.(?:q|o)_proj"},
    "regex with flags": {"r": 3, "target_modules": r"(?i).*\.Q_PROJ"},
    "regex with counts and sets": {"r": 3, "target_modules": r"[^s]{1,6}layers\.[02]\..*[]kq]_proj"},
    "all-linear": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "All-Linear without": {"r": 4, "target_modules": "All-Linear", "exclude_modules": ["mlp.gate_proj", Q0]},
    "exclude regex": {"r": 4, "target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers and a full name": {"r": 4, "target_modules": ["v_proj", Q0], "layers_to_transform": [1]},
    "no layers": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": []},
    "layers_pattern": {
        "r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "layers_pattern list": {
        "r": 4, "target_modules": ["v_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "lay[a-z]+"],
    },
    "rank above the features": {"r": 65, "lora_alpha": 1, "target_modules": ["k_proj"]},
    "rslora": {"r": 33, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear",
        "rank_pattern": {"^model.layers.0.mlp.down_proj": 9, r"layers\.1\..*": 6, "mlp.up_proj": 7, "q_proj": 2},
        "alpha_pattern": {"0.self_attn.k_proj": 20, "down_proj|o_proj": 3, "proj": 99, "self.attn.v_proj": 11},
    },
    "patterns in order": {
        "r": 4, "target_modules": ["q_proj", "k_proj"], "use_rslora": True,
        "rank_pattern": {"(?:q|k)_proj": 5, "[q]_proj": 6, "layers.0.self_attn.q_proj": 7},
        "alpha_pattern": {"k_proj": 2, "k_proj$": 1, "q.*": 3},
    },
    "patterns that are parts of names": {
        "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"_proj": 9, "proj": 9, "attn.q_proj": 9, "q_proj ": 9},
    },
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "eva": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "no init": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False},
    "fan_in_fan_out": {"r": 4, "target_modules": ["q_proj"], "fan_in_fan_out": True},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.3, "revision": "main"},
    "tying": {"r": 4, "target_modules": ["q_proj"], "ensure_weight_tying": True},
    "negative and zero alpha": {"r": 4, "lora_alpha": -3, "target_modules": ["q_proj"], "alpha_pattern": {Q0: 0}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_ranks_and_scales_are_those_of_peft(
    name: str, make_adapter: Any, reloaded: Any, manifest: Manifest
) -> None:
    folder = make_adapter(**CONFIGS[name])
    spec = parse(folder, manifest)
    live = {
        module_name.removeprefix(PREFIX): (module.r["default"], module.scaling["default"])
        for module_name, module in reloaded(folder).named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {target.module: (target.rank, target.scale) for target in spec.targets} == live
    assert [t.module for t in spec.targets] == [manifest.linears[t.index].name for t in spec.targets]
    assert [target.index for target in spec.targets] == sorted(target.index for target in spec.targets)
    assert spec.max_rank == max(rank for rank, _ in live.values())
    assert spec.target_modules == tuple(sorted({module.rpartition(".")[2] for module in live}))
    state = load_file(folder / WEIGHTS)
    assert spec.parameters == sum(tensor.numel() for tensor in state.values())
    assert spec.tensor_bytes == 4 * spec.parameters


def test_random_name_rules_agree_with_peft(manifest: Manifest) -> None:
    """Targets alone, against PEFT's own matching function, on many random configurations."""
    rng = random.Random(0)
    names = [module.name for module in manifest.modules]
    parts = [
        "q_proj",
        "self_attn",
        "layers",
        "model",
        "0",
        "1",
        "proj",
        "_proj",
        r"\.",
        ".*",
        ".",
        "mlp",
        "up",
        "(k|v)",
    ]
    for _ in range(300):

        def word() -> str:
            chosen = rng.choice(names)
            cut = rng.randrange(len(chosen))
            return rng.choice([chosen, chosen[cut:], chosen.split(".", 2)[-1], "".join(rng.sample(parts, 3))])

        config: dict[str, Any] = {"r": 8, "lora_alpha": 1, "peft_type": "LORA"}
        config["target_modules"] = [word() for _ in range(4)] if rng.random() < 0.6 else ".*" + word()
        if rng.random() < 0.5:
            config["exclude_modules"] = [word(), word()] if rng.random() < 0.5 else word()
        if isinstance(config["target_modules"], list) and rng.random() < 0.5:
            config["layers_to_transform"] = rng.sample([0, 1, 2, 3], rng.randrange(3))
            if rng.random() < 0.5:
                config["layers_pattern"] = rng.choice(["layers", ["h", "layers"], "model.layers", "l.*s", ""])
        config["rank_pattern"] = {word(): rng.randrange(1, 9) for _ in range(4)}
        settings, faults = read_config(json.dumps(config).encode())
        assert settings is not None, faults
        matched = [module.name for module in TargetMatcher(settings, Budget()).targets(manifest)]
        ranks = PatternMap("rank_pattern", settings.rank_pattern, Budget())
        live = LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
        # An excluded module is reported by an object that is false.
        assert matched == [name for name in names if check_target_module_exists(live, name)], config
        for name in names:
            assert ranks.get(name, 8) == live.rank_pattern.get(get_pattern_key(live.rank_pattern.keys(), name), 8)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_dtypes(make_adapter: Any, manifest: Manifest, dtype: torch.dtype, name: str) -> None:
    spec = parse(make_adapter(r=4, target_modules=["q_proj"], dtype=dtype), manifest)
    assert {target.a.dtype for target in spec.targets} == {name}
    assert spec.tensor_bytes == spec.parameters * dtype.itemsize


def test_an_adapter_name_inside_tensor_names(make_adapter: Any, manifest: Manifest) -> None:
    folder = make_adapter(r=4, target_modules=["q_proj"])
    plain = parse(folder, manifest)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    rewrite(folder, rename)
    assert [t.module for t in parse(folder, manifest).targets] == [t.module for t in plain.targets]
    rewrite(folder, lambda tensors: tensors.update({f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4, 32)}))
    assert any("second lora_A" in reason and Q0 in reason for reason in reasons(folder, manifest))


# ---------------------------------------------------------------- the table of fields


def test_every_field_of_peft_is_in_the_table() -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known - FIELDS.keys() == set()
    legacy = {"enable_lora", "merge_weights"}
    assert FIELDS.keys() - known == legacy


def test_what_peft_writes_by_default_is_served(make_adapter: Any, manifest: Manifest) -> None:
    folder = make_adapter(target_modules=["q_proj"])
    written = json.loads((folder / "adapter_config.json").read_bytes())
    assert written["peft_version"] == peft.__version__
    assert written.keys() <= FIELDS.keys()
    parse(folder, manifest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"), ("peft_type", None), ("task_type", "SEQ_CLS"), ("bias", "all"), ("bias", "lora_only"),
        ("lora_bias", True), ("use_dora", True), ("use_qalora", True), ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]), ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["experts.w"]), ("layer_replication", [[0, 2], [1, 3]]), ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1, 2]), ("arrow_config", {}), ("kasa_config", {}), ("monteclora_config", {}),
        ("velora_config", {}), ("use_bdlora", {"nblocks": 2}), ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"),
        ("init_lora_weights", "OLoRA"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"), ("init_lora_weights", "unheard of"), ("init_lora_weights", 1),
        ("r", 0), ("r", 513), ("r", 4.0), ("r", True), ("r", "4"), ("r", None), ("r", -1),
        ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", True), ("lora_alpha", "16"),
        ("lora_alpha", 1e39), ("lora_alpha", 10**400), ("lora_alpha", None), ("use_rslora", "yes"), ("use_rslora", 1),
        ("target_modules", None), ("target_modules", []), ("target_modules", ""), ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}), ("target_modules", "q_proj"), ("target_modules", ["c_attn"]),
        ("target_modules", "("), ("target_modules", r".*(?R)"), ("target_modules", "(?i"),
        ("exclude_modules", 5), ("exclude_modules", [None]), ("exclude_modules", "*"),
        ("layers_to_transform", "0"), ("layers_to_transform", [True]), ("layers_to_transform", [0.5]),
        ("layers_pattern", "layers"), ("layers_pattern", 5),
        ("rank_pattern", []), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 600}),
        ("rank_pattern", {"q_proj": 2.5}), ("rank_pattern", {"(": 4}), ("rank_pattern", {"(?i)q_proj": 4}),
        ("alpha_pattern", {"q_proj": float("nan")}), ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", 3),
        ("enable_lora", [True, False]), ("a_field_of_the_future", None), ("a_field_of_the_future", {"x": 1}),
    ],
)  # fmt: skip
def test_refused_by_name(adapter: Path, manifest: Manifest, field: str, value: Any) -> None:
    named = [reason for reason in reasons(adapter, manifest, **{field: value}) if field in reason]
    assert named
    assert named[0].startswith("adapter_config.json: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_type", None), ("lora_dropout", 0.5), ("inference_mode", False), ("revision", "abc"),
        ("base_model_name_or_path", None), ("auto_mapping", {"base_model_class": "X", "parent_library": "y"}),
        ("peft_version", "0.99"), ("fan_in_fan_out", True), ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("megatron_core", "other"), ("qalora_group_size", 32), ("eva_config", {"rho": 1.0}),
        ("corda_config", {"corda_method": "kpm"}), ("lora_ga_config", {"scale": "unit"}), ("modules_to_save", []),
        ("layer_replication", []), ("target_parameters", []), ("rank_pattern", None), ("alpha_pattern", {}),
        ("exclude_modules", []), ("exclude_modules", ""), ("layers_pattern", None), ("layers_to_transform", None),
        ("loftq_config", None), ("megatron_config", {}), ("lora_alpha", 0.25), ("merge_weights", False),
        ("layers_to_transform", [0, 1, 2]),
    ],
)  # fmt: skip
def test_accepted_values(adapter: Path, manifest: Manifest, field: str, value: Any) -> None:
    spec = parse(adapter, manifest, **{field: value})
    assert len(spec.targets) == 6


def test_all_reasons_come_together(adapter: Path, manifest: Manifest) -> None:
    rewrite(adapter, lambda tensors: tensors.__delitem__(f"{PREFIX}{Q0}.lora_B.weight"))
    found = reasons(adapter, manifest, use_dora=True, bias="all", frobnicate=7)
    for word in ("use_dora", "bias", "frobnicate", f"lora_B of {Q0} is missing"):
        assert any(word in reason for reason in found), word


def test_defaults_are_peft_s(make_adapter: Any, manifest: Manifest) -> None:
    folder = make_adapter(r=8, lora_alpha=8, target_modules=["q_proj"])
    headers = {WEIGHTS: read_header(folder / WEIGHTS)}
    spec = parse_adapter(b'{"peft_type": "LORA", "target_modules": ["q_proj"]}', headers, manifest)
    assert {(target.rank, target.scale) for target in spec.targets} == {(8, 1.0)}
    for missing in (b'{"peft_type": "LORA"}', b'{"target_modules": ["q_proj"]}', b"{}", b"[]", b"", b"{", b"\xff"):
        with pytest.raises(AdapterRefused):
            parse_adapter(missing, headers, manifest)
    with pytest.raises(AdapterRefused, match="appears twice"):
        parse_adapter(b'{"peft_type": "LORA", "r": 8, "r": 9, "target_modules": ["q_proj"]}', headers, manifest)


# ---------------------------------------------------------------- hostile regular expressions


@pytest.mark.parametrize("pattern", [r"(?:(?:\w|\.|[a-z])+)+[!-+]", r"(.|.)*\1\1x|(?:.|[a-z.])*[!-+]"])
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_slow_expressions_end_and_are_named(
    adapter: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, field: str, pattern: str
) -> None:
    monkeypatch.setattr(patterns, "BUDGET_SECONDS", 0.2)
    changes: dict[str, Any] = {field: {pattern: 4} if field in ("rank_pattern", "alpha_pattern") else pattern}
    if field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    started = time.process_time()
    (reason,) = reasons(adapter, manifest, **changes)
    assert field in reason
    assert "too long" in reason
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "pattern", ["(?:a{50000}){50000}", "(?:(?:q{99}){99}){99}", "q" * 20_000, "(" * 5000 + ")" * 5000]
)
def test_expressions_that_take_too_much_memory(adapter: Path, manifest: Manifest, pattern: str) -> None:
    assert "target_modules" in reasons(adapter, manifest, target_modules=pattern)[0]
    assert "rank_pattern" in reasons(adapter, manifest, rank_pattern={pattern + "(": 4})[0]


@pytest.mark.parametrize("pattern", ["(?:q_praj){e<=1}", "[[:alpha:]]*", "[a-z--q]*", "q{", "q{}", "[[]q"])
def test_expressions_that_the_two_engines_read_differently(adapter: Path, manifest: Manifest, pattern: str) -> None:
    assert "escape" in reasons(adapter, manifest, target_modules=pattern)[0]


# ---------------------------------------------------------------- tensors


def test_missing_and_extra_tensors(adapter: Path, manifest: Manifest) -> None:
    v1 = "model.layers.1.self_attn.v_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{PREFIX}{Q0}.lora_A.weight"]
        del tensors[f"{PREFIX}{v1}.lora_A.weight"], tensors[f"{PREFIX}{v1}.lora_B.weight"]
        for name in (
            f"{PREFIX}{Q0}.lora_magnitude_vector", f"{PREFIX}model.embed_tokens.lora_embedding_A",
            f"{PREFIX}{Q0}.lora_B.bias", f"{PREFIX}lm_head.modules_to_save.weight", f"{PREFIX}lm_head.lora_A.weight",
            f"{PREFIX}model.embed_tokens.weight", f"{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_C.weight",
            f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight", f"{PREFIX}{Q0}.lora_A.a.b.weight",
            f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight",
        ):  # fmt: skip
            tensors[name] = torch.zeros(4, 4)

    rewrite(adapter, change)
    found = "\n".join(reasons(adapter, manifest))
    for said in (
        f"lora_A of {Q0} is missing", f"lora_A of {v1} is missing", f"lora_B of {v1} is missing", "DoRA", "embedding",
        "biases", "modules_to_save", "LM head", "was the embedding", f"must begin with {PREFIX}", "lora_C",
        "lora_A of model.layers.0.mlp.up_proj: adapter_config.json does not adapt", "model.layers.9", "lora_A.a.b",
    ):  # fmt: skip
        assert said in found, said


@pytest.mark.parametrize(
    ("side", "shape"),
    [("A", (4, 33)), ("A", (3, 32)), ("A", (32, 4)), ("B", (4, 32)), ("B", (32, 4, 1)), ("B", (128,))],
)
def test_wrong_shapes(adapter: Path, manifest: Manifest, side: str, shape: tuple[int, ...]) -> None:
    rewrite(adapter, lambda tensors: tensors.update({f"{PREFIX}{Q0}.lora_{side}.weight": torch.zeros(shape)}))
    (reason,) = reasons(adapter, manifest)
    assert f"lora_{side} of {Q0}" in reason
    assert str(list(shape)) in reason


def test_wrong_dtype(adapter: Path, manifest: Manifest) -> None:
    rewrite(adapter, lambda tensors: tensors.update({f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4, 32).double()}))
    (reason,) = reasons(adapter, manifest)
    assert "F64" in reason
    assert "BF16" in reason


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_and_the_head_are_refused(adapter: Path, manifest: Manifest, target: str) -> None:
    found = reasons(adapter, manifest, target_modules=["q_proj", "v_proj", target])
    assert any("target_modules" in reason and target in reason and "not served" in reason for reason in found)


def test_an_adapter_of_a_wrapped_or_fused_model(adapter: Path, manifest: Manifest) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers", "model.language_model.layers")] = tensors.pop(name)

    rewrite(adapter, wrap)
    found = reasons(adapter, manifest)
    assert any("model.language_model" in reason and f"it has {Q0}" in reason for reason in found)

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors[f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_A.weight"] = torch.zeros(4, 32)

    rewrite(adapter, fuse)
    assert any("beside it stand q_proj, k_proj, v_proj, o_proj" in reason for reason in reasons(adapter, manifest))


def test_reasons_are_capped(adapter: Path, manifest: Manifest) -> None:
    rewrite(adapter, lambda tensors: tensors.update({f"junk.{number}": torch.zeros(1) for number in range(200)}))
    found = reasons(adapter, manifest)
    assert len(found) == 51
    assert found[-1] == "and 150 more"


def test_no_weights(manifest: Manifest) -> None:
    with pytest.raises(AdapterRefused, match="no weights"):
        parse_adapter(b'{"peft_type": "LORA", "target_modules": ["q_proj"]}', {}, manifest)


# ---------------------------------------------------------------- shards


def shard(folder: Path) -> tuple[bytes, dict[str, Any], bytes]:
    """Splits the weights in two; gives the configuration, the index and its bytes."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {
        "adapter_model-00001-of-00002.safetensors": names[::2],
        "adapter_model-00002-of-00002.safetensors": names[1::2],
    }
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    return (folder / "adapter_config.json").read_bytes(), index, json.dumps(index).encode()


def test_shards(adapter: Path, manifest: Manifest, headers_of: Callable[[Path], dict[str, Header]]) -> None:
    whole = parse(adapter, manifest)
    config, index, encoded = shard(adapter)
    headers = headers_of(adapter)
    spec = parse_adapter(config, headers, manifest, encoded)
    assert [t.module for t in spec.targets] == [t.module for t in whole.targets]
    assert {t.a.file for t in spec.targets} | {t.b.file for t in spec.targets} == headers.keys()

    def refused(said: str, headers: dict[str, Header], index: bytes | None) -> None:
        with pytest.raises(AdapterRefused, match=said):
            parse_adapter(config, headers, manifest, index)

    first, second = sorted(headers)
    refused("no index", headers, None)
    refused("was not uploaded", {first: headers[first]}, encoded)
    refused("not valid JSON", headers, b"{")
    refused("weight_map", headers, b"[]")
    refused("weight_map", headers, b'{"weight_map": {"a": 1}}')
    moved = dict(index["weight_map"])
    name = next(iter(moved))
    moved[name] = second if moved[name] == first else first
    refused("where it is not", headers, json.dumps({"weight_map": moved}).encode())
    del moved[name]
    refused("is not in the index", headers, json.dumps({"weight_map": moved}).encode())
    refused("second lora", {**headers, "x.safetensors": headers[first]}, encoded)


# ---------------------------------------------------------------- size


def test_a_large_model_with_a_pattern_for_every_module() -> None:
    """126 layers, and a rank and an alpha for each module by its full name, as EVA writes them."""
    modules = tuple(
        Module(f"model.layers.{layer}.{name}", "linear", 64, 64)
        for layer in range(126)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    )  # fmt: skip
    manifest = Manifest("f", "X", "x", "bfloat16", 10, 10, modules)
    ranks = {module.name: 1 + number % 5 for number, module in enumerate(modules)}
    config = {
        "peft_type": "LORA",
        "target_modules": [module.name for module in modules],
        "rank_pattern": ranks,
        "alpha_pattern": {name: 2 * rank for name, rank in ranks.items()},
    }
    tensors, position = {}, 0
    for module in modules:
        for side, shape in (("A", (ranks[module.name], 64)), ("B", (64, ranks[module.name]))):
            size = 2 * shape[0] * shape[1]
            tensors[f"{PREFIX}{module.name}.lora_{side}.weight"] = TensorRef(
                WEIGHTS, "BF16", shape, position, position + size
            )
            position += size
    header = Header(WEIGHTS, tensors, {}, position)
    spec = parse_adapter(json.dumps(config).encode(), {WEIGHTS: header}, manifest)
    assert {target.module: target.rank for target in spec.targets} == ranks
    assert {target.scale for target in spec.targets} == {2.0}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=AdapterSpec) == spec


def test_an_error_of_the_regular_expression_engine_is_printable(adapter: Path, manifest: Manifest) -> None:
    """It quotes what was uploaded."""
    (reason,) = reasons(adapter, manifest, rank_pattern={"(?\x1f": 4})
    assert reason.isprintable()
    assert "unknown extension ?\\x1f" in reason
