"""Base models beyond those of test_parity.py: each gives PEFT's answers, or is refused for what it is.

One of every kind of thing that an architecture can do otherwise, as tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from service.engine.build import build_engine
from service.engine.config import EngineConfig
from service.engine.errors import CannotStart, UnsupportedModel
from tests.engine import oracle
from tests.engine.oracle import SMALL, Recipe
from tests.engine.test_parity import World, ask_all, check_all

SERVED: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 16},  # attention and MLP side by side, layers without positions
    "gemma": {"head_dim": 16},
    "glm4": {"head_dim": 16},  # half of each head is rotated, in pairs
    "gpt_bigcode": {},  # learned positions, one KV head, q, k and v in one linear
    "gpt_neox": {},  # the same, head by head
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "nemotron": {},
    "olmo2": {},  # norms behind attention and MLP, and over all heads of q and k
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "phi": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "starcoder2": {"sliding_window": 16},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "bidirectional attention is not served"),
    "falcon": ({}, "attention does not go through transformers' common interface"),
    "gptj": ({}, "16 tokens do not go through it"),
    "minicpm3": ({}, "value heads of 16 and query heads of"),
    "mixtral": ({}, "a mixture of experts .*mlp.experts.gate_up_proj"),
    "modernbert-decoder": ({}, "lm_head.dense is called with .* for 16 tokens"),
    "qwen3_5_text": ({}, r"layer_types: \['linear_attention'\]"),
}


@pytest.mark.parametrize("kind", SERVED)
def test_answers_are_peft_s(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(oracle.ARCHITECTURES, kind, CONFIG_MAPPING[kind](**SMALL | SERVED[kind]))
    world = World(kind, tmp_path, {"all": Recipe(8), "other": Recipe(5)}, [(("all", 0.7), ("other", 0.3))])
    engine = world.engine(tmp_path, max_tokens_per_step=48)
    ask_all(engine, world, max_tokens=5)
    engine.run()
    check_all(engine, world)
    engine.close()


def start(folder: Path, cache: Path) -> None:
    paths = {"blobs_dir": str(cache / "blobs"), "cache_dir": str(cache / "cache")}
    build_engine(EngineConfig(model_path=str(folder), socket="", kv_pages=64, arena_bytes=1 << 20, **paths), print)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_refused_for_what_it_is(kind: str, tmp_path: Path) -> None:
    options, reason = REFUSED[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | options)).save_pretrained(tmp_path / kind)
    with pytest.raises(UnsupportedModel, match=reason):
        start(tmp_path / kind, tmp_path)


def test_code_that_wants_more_of_a_linear_than_its_product_is_found_out_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of some models does, to compute in the dtype of its weight."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x.to(self.down_proj.weight.dtype)))
    AutoModelForCausalLM.from_config(oracle.ARCHITECTURES["llama"]).save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM: a step fails with LoRA layers in it .*dtype"):
        start(tmp_path / "llama", tmp_path)


def test_what_transformers_does_not_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "of-its-own"}')
    (tmp_path / "odd" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CannotStart, match=r"^odd: transformers does not load it: ") as caught:
        start(tmp_path / "odd", tmp_path)
    assert "\n" not in str(caught.value)
    assert "config.json" in caught.value.hint


def tiny_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(oracle.ARCHITECTURES["llama"]).save_pretrained(folder)
    return folder


def with_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_checkpoint_that_lacks_weights_is_not_served_with_random_ones(tmp_path: Path) -> None:
    with_config(tiny_llama(tmp_path / "cut"), num_hidden_layers=SMALL["num_hidden_layers"] + 1)
    reason = r"^cut: its files lack 9 tensors, the first is model\.layers\.3\.input_layernorm\.weight$"
    with pytest.raises(CannotStart, match=reason):
        start(tmp_path / "cut", tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "no safetensors"])
def test_a_damaged_checkpoint_is_one_line(damage: str, tmp_path: Path) -> None:
    weights = tiny_llama(tmp_path / "bad") / "model.safetensors"
    match damage:
        case "cut short":  # as a download that broke off
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no safetensors":
            weights.write_bytes(b"\xff" * 1000)
    with pytest.raises(CannotStart, match=r"^bad: transformers does not load it: ") as caught:
        start(tmp_path / "bad", tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    with_config(tiny_llama(tmp_path / "odd"), intermediate_size=80)
    shapes = r"is \[64, 96\] in its files, and \[64, 80\] by config\.json$"
    with pytest.raises(CannotStart, match=r"^odd: model\.layers\.0\.mlp\.down_proj\.weight " + shapes):
        start(tmp_path / "odd", tmp_path)


@pytest.mark.parametrize("said", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", ""])
def test_a_probe_that_runs_out_of_memory_says_that(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, x: Any) -> None:
        raise RuntimeError(said) if said else MemoryError

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    with pytest.raises(CannotStart, match=r"^not enough memory on cpu: the weights of llama take about "):
        start(tiny_llama(tmp_path / "llama"), tmp_path)
