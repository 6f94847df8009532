"""A base model is data: neither Python beside it nor a pickle is ever run (SECURITY.md)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.engine.config import EngineConfig
from service.engine.errors import CannotStart
from service.engine.model import load_model
from tests.engine.oracle import ARCHITECTURES


class Touch:
    """Unpickled, it would make this file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def hostile(folder: Path, ran: Path, model_type: str) -> Path:
    """A checkpoint whose configuration names classes of a file that lies beside it and, imported, makes `ran`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).save_pretrained(folder)
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass C: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Any:
    return load_model(EngineConfig(model_path=str(folder), blobs_dir="", cache_dir="", socket="", device="cpu"))


def test_code_beside_a_model_of_a_known_kind_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    loaded = load(hostile(tmp_path / "model", ran, "llama"))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with pytest.raises(CannotStart, match="code"):
        load(hostile(tmp_path / "model", ran, "of-its-own"))
    assert not ran.exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = hostile(tmp_path / "model", ran, "llama")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Touch(ran)}))
    with pytest.raises(CannotStart, match="safetensors"):
        load(folder)
    assert not ran.exists()
