"""Merging into the base: the folder that results, loaded by transformers, against PEFT on the unmerged model."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedModel

from adapters import checkpoint
from adapters.checkpoint import MergedFile, merge_checkpoint
from adapters.checkpoint_layout import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, SOURCE_FILE
from adapters.errors import AdapterRefused, BlobDamaged
from adapters.manifest import Manifest
from adapters.merge_request import MergeOptions, check_merge
from tests.adapters.conftest import build_manifest
from tests.adapters.merging import layers_of, merged_by_peft, source_of, with_sources
from tests.engine.oracle import ARCHITECTURES, Recipe, make_adapter, make_base, recipes

TOKENS = torch.tensor([[5, 17, 200, 3, 44, 9, 301, 250]])
SMALL_SHARDS = MergeOptions(max_shard_bytes=65_536)
FEW_SHARDS = MergeOptions(max_shard_bytes=400_000)
"""Two or three: every file is synced, which takes its time on a busy disk."""


class Base:
    """A base's folder, its manifest, and adapters made for it."""

    def __init__(self, folder: Path, root: Path, made: Sequence[Path] = ()) -> None:
        self.folder, self.root = folder, root
        self.manifest = build_manifest(self.load())
        self.adapters = list(made)

    def load(self, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder or self.folder, dtype=dtype).eval()

    def merge(self, out: Path, weights: Sequence[float], **named: Any) -> list[MergedFile]:
        sources = [source_of(f, w) for f, w in zip(self.adapters, weights, strict=False)]
        return merge_checkpoint(
            sources, named.get("model", self.folder), self.manifest, out, named.get("options", FEW_SHARDS)
        )


def with_adapters(folder: Path, root: Path, architecture: str) -> Base:
    chosen = recipes(architecture)
    made = [make_adapter(folder, root / name, chosen[name], seed) for seed, name in enumerate(("rank8-rs", "rank4"))]
    made.append(make_adapter(folder, root / "rank64-patterns", chosen["rank64-patterns"], 5))
    return Base(folder, root, made)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """By architecture, with three adapters: stabilised rank 8, rank 4 in bfloat16, rank and alpha patterns."""
    made: dict[str, Base] = {}

    def base(architecture: str) -> Base:
        if architecture not in made:
            root = tmp_path_factory.mktemp(architecture)
            made[architecture] = with_adapters(make_base(architecture, root / "base"), root, architecture)
        return made[architecture]

    return base


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits[0]


def unmerged(base: Base, weights: Sequence[float]) -> torch.nn.Module:
    """PEFT's model with the weighted mix as adapter "merged", unmerged: cat is the exact sum."""
    peft = with_sources(base.load(), base.adapters[: len(weights)])
    if len(weights) > 1 or weights[0] != 1.0:
        merged_by_peft(peft, weights, "cat")
        if base.adapters[0].name == "rank8-rs":
            # PEFT copies use_rslora from the first source, and so multiplies the sum by √r once more.
            for layer in layers_of(peft).values():
                layer.set_scale("merged", 1.0 / layer.scaling.get("merged", 1.0))
        peft.set_adapter("merged")
    return peft.eval()


@pytest.mark.parametrize("weights", [[1.0], [0.6, -0.4], [1.0, 0.5, -1.5]], ids=["one", "two", "three"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "tied"])
def test_the_checkpoint_gives_the_unmerged_adapters_outputs(
    architecture: str, weights: list[float], bases: Callable[[str], Base], tied: Base, tmp_path: Path
) -> None:
    base = tied if architecture == "tied" else bases(architecture)
    base.merge(tmp_path / "out", weights)
    merged = base.load(tmp_path / "out")
    peft = unmerged(base, weights)
    expected, plain = logits_of(peft), logits_of(base.load())
    # The mix must change the outputs for the comparison to mean anything.
    assert float((expected - plain).abs().max()) > 0.1
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    by_peft = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(by_peft), rtol=1e-4, atol=1e-4)
    for name, parameter in by_peft.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name).data, parameter.data, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The output layer is the embedding: the checkpoint stores one tensor for both."""
    root = tmp_path_factory.mktemp("tied")
    torch.manual_seed(3)
    values = {**ARCHITECTURES["llama"].to_dict(), "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values))
    for name, parameter in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(root / "base")
    return with_adapters(root / "base", root, "llama")


def test_tied_weights_stay_tied(tied: Base, tmp_path: Path) -> None:
    tied.merge(tmp_path / "out", [1.0])
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_bytes())
    assert "lm_head.weight" not in index["weight_map"]
    merged = tied.load(tmp_path / "out")
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, tied.load().get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once_to_the_checkpoints_dtype(
    dtype: torch.dtype, bases: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of a few rows give what the whole gives; tensors without an adapter are copied bit for bit."""
    monkeypatch.setattr(checkpoint, "SUM_VALUES", 5 * 64)
    monkeypatch.setattr(checkpoint, "COPY_BYTES", 1000)
    base = bases("llama")
    half = tmp_path / "half"
    base.load(dtype=dtype).save_pretrained(half)
    weights = [0.75, -1.0]
    base.merge(tmp_path / "out", weights, model=half, options=MergeOptions())
    before, after = load_file(half / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    peft = with_sources(base.load(), base.adapters[:2])
    changed = 0
    for name, tensor in before.items():
        layer = peft.base_model.model
        for part in name.removesuffix(".weight").split("."):
            layer = getattr(layer, part)
        if "s0" not in getattr(layer, "lora_A", {}):
            assert torch.equal(after[name], tensor), name
            continue
        exact = tensor.double()
        for source, weight in zip(("s0", "s1"), weights, strict=True):
            if source in layer.lora_A:
                a, b = layer.lora_A[source].weight.data.double(), layer.lora_B[source].weight.data.double()
                exact = exact + weight * layer.scaling[source] * (b @ a)
        # One rounding: within half a unit in the last place of the exact sum, but for what float32 itself is off.
        ulp = 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=2**-14))) * torch.finfo(dtype).eps
        assert bool(((after[name].double() - exact).abs() <= 0.501 * ulp + 1e-6).all()), name
        changed += 1
    assert changed == 3 * 7


def test_the_folder(bases: Callable[[str], Base], tmp_path: Path) -> None:
    """All that belongs to the model, shards as small as was asked for, hashes, progress; the base is untouched."""
    model = shutil.copytree(bases("llama").folder, tmp_path / "model")
    (model / "generation_config.json").unlink(missing_ok=True)
    GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True).save_pretrained(model)
    tokenizer = _tokenizer(model)
    (model / "LICENSE").write_text("free")
    tools = model / "additional_chat_templates" / "tool_use.jinja"
    tools.parent.mkdir()
    tools.write_text("{{ tools | length }} tools")
    (model / ".cache").mkdir()
    for other in ("README.md", "pytorch_model.bin", "optimizer.pt", ".hidden.json", "adapter_config.json", SOURCE_FILE):
        (model / other).write_text("{}")
    untouched = {path: (_sha(path), path.stat().st_mtime_ns) for path in model.rglob("*") if path.is_file()}
    for path in untouched:
        path.chmod(0o400)

    out = tmp_path / "out"
    (out / "shard").mkdir(parents=True)
    (out / CONFIG_FILE).write_text("of an interrupted job")
    shares: list[float] = []
    base = bases("llama")
    files = merge_checkpoint([source_of(base.adapters[0])], model, base.manifest, out, SMALL_SHARDS, shares.append)

    assert {path: (_sha(path), path.stat().st_mtime_ns) for path in model.rglob("*") if path.is_file()} == untouched
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len(set(shares)) > 10
    written = sorted((path.relative_to(out).as_posix(), path) for path in out.rglob("*") if path.is_file())
    assert [MergedFile(name, path.stat().st_size, _sha(path)) for name, path in written] == files
    shards = sorted(out.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert {file.name for file in files} - {path.name for path in shards} == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE",
    }  # fmt: skip
    index = json.loads((out / INDEX_FILE).read_bytes())
    originals = load_file(model / SINGLE_FILE)
    assert index["weight_map"].keys() == originals.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in originals.values())
    for path in shards:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
            assert all(index["weight_map"][name] == path.name for name in names)
            size = sum(opened.get_tensor(name).nbytes for name in names)
        assert size <= 65_536 or len(names) == 1
    loaded = AutoTokenizer.from_pretrained(out)
    message = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(message, tokenize=False) == tokenizer.apply_chat_template(message, tokenize=False)
    assert loaded.apply_chat_template(message, tools=[_tool], chat_template="tool_use", tokenize=False) == "1 tools"
    generation = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (generation.max_new_tokens, generation.temperature) == (7, 0.5)


def _tool() -> None:
    """Does nothing."""


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"hi": 0, "<unk>": 1}, "<unk>")), unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_base_in_shards(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("qwen3")
    sharded = tmp_path / "sharded"
    base.load().save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    base.merge(tmp_path / "one", [1.0], model=base.folder, options=MergeOptions())
    base.merge(tmp_path / "two", [1.0], model=sharded, options=MergeOptions())
    # Without a limit below its size, the result is one file.
    assert not (tmp_path / "two" / INDEX_FILE).exists()
    one, two = load_file(tmp_path / "one" / SINGLE_FILE), load_file(tmp_path / "two" / SINGLE_FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_dtypes_of_every_width_stay_aligned(bases: Callable[[str], Base], tmp_path: Path) -> None:
    """Odd sizes and narrow dtypes from several shards in one file: every tensor begins at a multiple of its width."""
    base = bases("llama")
    model = tmp_path / "mixed"
    model.mkdir()
    shutil.copy(base.folder / CONFIG_FILE, model)
    tensors = load_file(base.folder / SINGLE_FILE)
    extra = {"a.odd": torch.ones(3, dtype=torch.uint8), "b.empty": torch.ones(0, 4), "c.scalar": torch.tensor(2.5)}
    save_file(extra | {"d.half": torch.ones(5, dtype=torch.bfloat16)}, model / "1.safetensors", {"format": "pt"})
    save_file(tensors, model / "2.safetensors", {"format": "pt"})
    parts = {"1.safetensors": [*extra, "d.half"], "2.safetensors": list(tensors)}
    weight_map = {name: file for file, names in parts.items() for name in names}
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    base.merge(tmp_path / "out", [1.0], model=model, options=MergeOptions())
    path = tmp_path / "out" / SINGLE_FILE
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    assert length % 8 == 0
    widths = {"U8": 1, "BF16": 2, "F32": 4}
    assert all(e["data_offsets"][0] % widths[e["dtype"]] == 0 for n, e in header.items() if n != "__metadata__")
    after = load_file(path)
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("rename", [("model.", ""), ("", "language_model."), ("model.", "language_model.model.")])
def test_a_checkpoint_with_another_prefix(
    rename: tuple[str, str], bases: Callable[[str], Base], tmp_path: Path
) -> None:
    """Saved from the class without the head, or inside a larger model: its own names stay."""
    base = bases("llama")
    model = tmp_path / "renamed"
    model.mkdir()
    shutil.copy(base.folder / CONFIG_FILE, model)

    def renamed(name: str) -> str:
        return rename[1] + name.removeprefix(rename[0])

    tensors = load_file(base.folder / SINGLE_FILE)
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, model / SINGLE_FILE, {"format": "pt"})
    base.merge(tmp_path / "out", [0.5, 0.5], model=model, options=MergeOptions())
    base.merge(tmp_path / "plain", [0.5, 0.5], options=MergeOptions())
    after, plain = load_file(tmp_path / "out" / SINGLE_FILE), load_file(tmp_path / "plain" / SINGLE_FILE)
    assert after.keys() == {renamed(name) for name in tensors}
    assert all(torch.equal(after[renamed(name)], tensor) for name, tensor in plain.items())
    if rename == ("model.", ""):
        # transformers adds the prefix that such checkpoints lack.
        assert torch.equal(
            base.load(tmp_path / "out").model.layers[1].mlp.up_proj.weight, plain["model.layers.1.mlp.up_proj.weight"]
        )


def _remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _config(**values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / CONFIG_FILE).read_bytes()) | values
        (model / CONFIG_FILE).write_text(json.dumps(config))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(model: Path) -> None:
        tensors = load_file(model / SINGLE_FILE)
        change(tensors)
        save_file(tensors, model / SINGLE_FILE, {"format": "pt"})

    return rewrite


def _only_bin(model: Path) -> None:
    (model / SINGLE_FILE).rename(model / "pytorch_model.bin")


def _index(weight_map: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / SINGLE_FILE).rename(model / "part.safetensors")
        (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    return change


def _cut(model: Path) -> None:
    data = (model / SINGLE_FILE).read_bytes()
    (model / SINGLE_FILE).write_bytes(data[:-10])


Q0 = "model.layers.0.self_attn.q_proj.weight"
TAKEN_BACK: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "quantised": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["base: config.json: quantization_config ('gptq'): a quantised base cannot take the sum without being rounded"
         " again; merge into the checkpoint that it was quantised from"],
    ),
    "quantised inside": (
        _config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        ["base: config.json: quantization_config ('fp8'): a quantised base"],
    ),
    "no config": (_remove(CONFIG_FILE), ["base: config.json is missing"]),
    "no weights": (_remove(SINGLE_FILE), ["base: neither model.safetensors nor model.safetensors.index.json: only"]),
    "only .bin": (
        _only_bin,
        ["base: neither model.safetensors nor model.safetensors.index.json; found pytorch_model.bin: only safetensors"
         " checkpoints can be merged into (load it and save it again with save_pretrained)"],
    ),
    "fused": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.qkv.weight": t.pop(Q0)})),
        [f"base: its checkpoint has no tensor {Q0}; a weight that is stored fused, tied or under another name cannot be"
         " merged into"],
    ),
    "8-bit": (
        _tensors(lambda t: t.update({Q0: t[Q0].to(torch.float8_e4m3fn)})),
        [f"base: {Q0} is stored as F8_E4M3; only F32, F16, BF16 can be merged into, not quantised weights"],
    ),
    "another model": (
        _tensors(lambda t: t.update({Q0: torch.zeros(3, 64)})),
        [f"base: {Q0} has shape [3, 64], but the served module has [64, 64]: is this the checkpoint that is served?"],
    ),
    "cut off": (_cut, ["base: model.safetensors: its tensors end at byte"]),
    "index without its files": (
        _index({Q0: "gone.safetensors"}),
        ["base: model.safetensors.index.json names 'gone.safetensors', which is missing"],
    ),
    "index outside": (
        _index({Q0: "../part.safetensors"}),
        ["base: model.safetensors.index.json names '../part.safetensors', which is no plain file name"],
    ),
    "index of others": (
        _index({"x": "part.safetensors"}),
        ["base: model.safetensors.index.json says that 'x' is in part.safetensors, where it is not"],
    ),
    "no index": (
        _index([]),
        ["base: model.safetensors.index.json: must be an object whose weight_map maps tensor names to file names"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN_BACK)
def test_bases_that_cannot_be_merged_into(case: str, bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    change, expected = TAKEN_BACK[case]
    model = shutil.copytree(base.folder, tmp_path / "model")
    change(model)
    sources = [source_of(base.adapters[0])]
    reasons = check_merge(sources, base.manifest, MergeOptions(), "checkpoint", model)
    assert len(reasons) == len(expected), reasons
    for reason, start in zip(reasons, expected, strict=True):
        assert reason.startswith(start), reason
    out = tmp_path / "out"
    with pytest.raises(AdapterRefused) as refused:
        merge_checkpoint(sources, model, base.manifest, out, MergeOptions())
    assert refused.value.reasons == reasons
    assert not out.exists()


def test_only_modules_that_are_adapted_need_a_weight_of_their_own(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = make_adapter(base.folder, tmp_path / "o", Recipe(2, {"target_modules": ["o_proj"]}), 1)
    model = shutil.copytree(base.folder, tmp_path / "model")
    _tensors(lambda t: t.update({"model.layers.0.self_attn.qkv.weight": t.pop(Q0)}))(model)
    assert check_merge([source_of(adapter)], base.manifest, MergeOptions(), "checkpoint", model) == []


def test_a_prefix_that_is_not_the_only_one_is_refused(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = shutil.copytree(base.folder, tmp_path / "model")

    def doubled(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensor = tensors.pop(name)
            tensors[f"a.{name}"], tensors[f"b.{name}"] = tensor, tensor.clone()

    _tensors(doubled)(model)
    reasons = check_merge([source_of(base.adapters[0])], base.manifest, MergeOptions(), "checkpoint", model)
    assert len(reasons) == 3 * 7
    assert all("has no tensor model.layers." in reason for reason in reasons)


def test_a_sum_beyond_the_dtype_leaves_nothing_that_loads(bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    half = tmp_path / "half"
    base.load(dtype=torch.float16).save_pretrained(half)
    with pytest.raises(AdapterRefused) as refused:
        base.merge(tmp_path / "out", [1e9], model=half)
    assert len(refused.value.reasons) == 1
    assert refused.value.reasons[0].endswith("_proj.weight: the sum is not finite in F16, the checkpoint's dtype")
    assert not (tmp_path / "out" / CONFIG_FILE).exists()
    with pytest.raises((OSError, ValueError)):
        base.load(tmp_path / "out")
    # Begun again with a sound weight, the same folder becomes whole.
    base.merge(tmp_path / "out", [0.5], model=half)
    assert logits_of(base.load(tmp_path / "out")).isfinite().all()


def test_a_base_that_is_cut_short_while_it_is_read(
    bases: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases("llama")
    model = shutil.copytree(base.folder, tmp_path / "model")
    read = checkpoint.read_layout

    def cut_after_reading(*arguments: Any) -> Any:
        layout = read(*arguments)
        _cut(model)
        return layout

    monkeypatch.setattr(checkpoint, "read_layout", cut_after_reading)
    with pytest.raises(BlobDamaged, match="ends inside a tensor"):
        base.merge(tmp_path / "out", [1.0], model=model)
    assert not (tmp_path / "out" / CONFIG_FILE).exists()


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_base_is_never_written(where: str, bases: Callable[[str], Base], tmp_path: Path) -> None:
    base = bases("llama")
    model = shutil.copytree(base.folder, tmp_path / "parent" / "model")
    before = {path.name: _sha(path) for path in model.iterdir()}
    with pytest.raises(ValueError, match="must be apart"):
        base.merge(model / where, [1.0], model=model)
    assert {path.name: _sha(path) for path in model.iterdir()} == before


def test_a_manifest_of_fused_projections(bases: Callable[[str], Base], tmp_path: Path) -> None:
    """Phi3's qkv_proj is one module and one tensor: nothing to translate."""
    base = bases("phi3")
    assert any(module.name.endswith("qkv_proj") for module in base.manifest.linears)
    assert (
        check_merge([source_of(f) for f in base.adapters], base.manifest, MergeOptions(), "checkpoint", base.folder)
        == []
    )


def test_biases_and_weights_of_other_modules_are_untouched(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    manifest: Manifest = build_manifest(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
        peft.save_pretrained(tmp_path / "adapter")
    merge_checkpoint([source_of(tmp_path / "adapter")], tmp_path / "base", manifest, tmp_path / "out", MergeOptions())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(peft.eval()), rtol=1e-4, atol=1e-5)
