"""Adapters made by PEFT itself on tiny random models, and the manifest of those models."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.manifest import Manifest, Module
from adapters.safetensors_header import Header, read_header

WEIGHTS = "adapter_model.safetensors"


def build_llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def build_manifest(model: torch.nn.Module, dtype: str = "float32") -> Manifest:
    modules = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = "output" if module is model.get_output_embeddings() else "linear"
            modules.append(Module(name, kind, module.in_features, module.out_features))
        elif isinstance(module, torch.nn.Embedding):
            modules.append(Module(name, "embedding", module.num_embeddings, module.embedding_dim))
    return Manifest(
        fingerprint="tiny",
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype=dtype,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
        modules=tuple(modules),
    )


def build_adapter(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Saves an adapter as PEFT saves it, all its values random; its weights file is rewritten in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' own
        model = get_peft_model(build_llama(), LoraConfig(task_type="CAUSAL_LM", **config))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    if dtype != torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def read_headers(folder: Path) -> dict[str, Header]:
    return {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A fresh model at each call (PEFT changes the model it is given), always the same weights."""
    return build_llama


@pytest.fixture(scope="session")
def manifest_of() -> Callable[..., Manifest]:
    return build_manifest


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Of `tiny_llama`, in float32."""
    return build_manifest(build_llama())


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """make_adapter(seed=0, dtype=torch.float32, **LoraConfig fields) -> folder written by PEFT."""
    count = 0

    def make(**options: Any) -> Path:
        nonlocal count
        count += 1
        return build_adapter(tmp_path / f"adapter{count}", **options)

    return make


@pytest.fixture(scope="session")
def _simple_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(tmp_path_factory.mktemp("adapter") / "simple", r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def adapter(_simple_adapter: Path, tmp_path: Path) -> Path:
    """A folder written by PEFT for the test to change: rank 4 on q_proj and v_proj, float32."""
    return Path(shutil.copytree(_simple_adapter, tmp_path / "simple"))


@pytest.fixture(scope="session")
def headers_of() -> Callable[[Path], dict[str, Header]]:
    return read_headers


@pytest.fixture(scope="session")
def reloaded() -> Callable[[Path], PeftModel]:
    """The saved adapter on a fresh base, loaded by PEFT: the authority on what the files mean."""

    def reload(folder: Path) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(build_llama(), folder)

    return reload
