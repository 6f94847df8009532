"""Parity with PEFT on the real base model: SmolLM2-135M-Instruct, float32, real text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.harness import Harness
from tests.engine.oracle import Mix, Oracle, Recipe, make_adapter

TOLERANCE = 1e-4
"""Of the largest logit."""
RECIPES = {
    "all16": Recipe(16),
    "attention33-rs": Recipe(33, {"target_modules": ["q_proj", "v_proj"]}, {"use_rslora": True}, torch.bfloat16),
    "patterns64": Recipe(
        64,
        {"target_modules": r".*\.(1?[0-9])\.(self_attn\.o_proj|mlp\.(up|down)_proj)"},
        {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"down_proj": 2}},
        torch.float16,
    ),
    "all1": Recipe(1),
}
TEXTS = [
    "The river runs from the mountains to the sea, and on its way",
    "A short history of the bicycle. " * 12,
    "def fibonacci(n):",
    "What is the capital of France, and why did it become the capital?",
]


@pytest.fixture(scope="module")
def world(base_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    adapters = {
        name: make_adapter(base_model_dir, folder / name, recipe, seed=i, strength=0.4)
        for i, (name, recipe) in enumerate(RECIPES.items())
    }
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return base_model_dir, adapters, Oracle(base_model_dir, adapters), prompts


def test_adapters_mixed_with_the_base_in_every_batch(world, tmp_path):
    base, adapters, oracle, prompts = world
    engine = Harness(base, tmp_path, adapters, arena_bytes=128 << 20, max_tokens_per_step=40, kv_pages=64)
    mixes: list[Mix] = [(), *(((name, 1.0),) for name in adapters), (("all16", 0.6), ("all1", 0.7))]
    for name in adapters:
        assert engine.load(name).error is None
    asked = {f"{i}-{j}": (prompts[(i + j) % len(prompts)], mix) for i, mix in enumerate(mixes) for j in range(2)}
    for name, (prompt, mix) in asked.items():
        engine.ask(name, prompt, mix, max_tokens=6, logprobs=20)
    engine.run(seconds=250)
    assert not engine.refused
    assert engine.max_running >= 4
    said = set()
    for name, (prompt, mix) in asked.items():
        stream = engine.streams[name, 0]
        logits = oracle.logits([*prompt, *stream.tokens][:-1], mix)[len(prompt) - 1 :]
        assert stream.tokens == logits.argmax(-1).tolist(), name
        expected, scale = logits.log_softmax(-1), float(logits.abs().max())
        for position, entry in enumerate(stream.logprobs):
            ids, values = zip(*entry.top, strict=True)
            error = (torch.tensor(values) - expected[position, list(ids)]).abs().max()
            assert error < TOLERANCE * scale, (name, position, float(error))
        said.add((tuple(prompt), tuple(stream.tokens)))
    assert len(said) > len(prompts) + 2, "the adapters do not change what the model says"
    engine.close()
