"""Where a base model may come from. The .gguf file is a real one, written here, tiny."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from adapters.checkpoint_layout import SOURCE_FILE
from service.gguf_model import CONVERTER, ModelError
from service.model_source import resolve_model

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 32, 2, 2, 64


def write_tiny_gguf(path: Path) -> None:
    """A llama of two layers with random float32 weights and a byte-level vocabulary without merges but one."""
    rng = np.random.default_rng(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<unk>", "<s>", "</s>", *letters, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3, *[1] * (len(vocabulary) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    tensor("token_embd.weight", len(vocabulary), HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        tensor(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        tensor(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        tensor(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        tensor(f"blk.{layer}.attn_norm.weight", HIDDEN)
        tensor(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    source = tmp_path / "tiny model.gguf"
    write_tiny_gguf(source)
    steps: list[str] = []

    def report(step: str, fraction: float | None = None) -> None:
        steps.append(step)

    folder = resolve_model(str(source), tmp_path / "data", report)
    assert folder.name == "tiny-model"
    assert any("writing the weights" in step for step in steps)
    assert json.loads((folder / SOURCE_FILE).read_bytes())["converter"] == CONVERTER
    config = json.loads((folder / "config.json").read_bytes())
    assert (config["hidden_size"], config["num_hidden_layers"], config["dtype"]) == (HIDDEN, LAYERS, "bfloat16")
    assert config["tie_word_embeddings"] is True
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("cab 12").ids) == "cab 12"

    written = (folder / "model.safetensors").stat().st_mtime_ns
    steps.clear()
    assert resolve_model(str(source), tmp_path / "data", report) == folder
    assert not any("writing" in step for step in steps)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    # A folder that says so, but is not what was written then.
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert resolve_model(str(source), tmp_path / "data") == folder
    assert weights.read_bytes() == whole


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be converted: ") as refused:
        resolve_model(str(source), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_local_folder_is_taken_as_it_is(base_model_dir: Path, tmp_path: Path) -> None:
    assert resolve_model(str(base_model_dir), tmp_path) == base_model_dir
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no readable config.json"),
        ("tokenizer.json", "lacks a tokenizer.json"),
        ("model.safetensors", r"lacks \*\.safetensors weights"),
    ],
)
def test_an_incomplete_folder(base_model_dir: Path, tmp_path: Path, missing: str, said: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base_model_dir / name, tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path), tmp_path) == tmp_path
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=said):
        resolve_model(str(tmp_path), tmp_path)


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"LORAPLEX_MODEL=no-such-org/no-such-model: neither in the local") as refused:
        resolve_model("no-such-org/no-such-model", tmp_path)
    assert "local folder" in refused.value.hint


@pytest.mark.parametrize("model", ["/no/such/folder", "plain-name", "a/b/c", "../x/y"])
def test_what_is_nothing_of_all_this(tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelError, match="no such folder, and it is not a hub id"):
        resolve_model(model, tmp_path)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        resolve_model(str(tmp_path / "missing.gguf"), tmp_path)
