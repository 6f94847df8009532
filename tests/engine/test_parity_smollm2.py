"""Parity with PEFT on the real base model: SmolLM2-135M-Instruct, float32, real text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.harness import Harness, Stream
from tests.engine.oracle import Mix, Oracle, Recipe, make_adapter

TOLERANCE = 1e-4
"""Of the largest logit."""
RECIPES = {
    "all1": Recipe(1),
    "output4": Recipe(4, {"target_modules": ["q_proj", "o_proj"]}, {"lora_alpha": 32}, torch.bfloat16),
    "layers8-rs": Recipe(
        8, {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [3, 17, 29]}, {"use_rslora": True}
    ),
    "all16": Recipe(16),
    "attention33-rs": Recipe(33, {"target_modules": ["q_proj", "v_proj"]}, {"use_rslora": True}, torch.bfloat16),
    "patterns64": Recipe(
        64,
        {"target_modules": r".*\.(1?[0-9])\.(self_attn\.o_proj|mlp\.(up|down)_proj)"},
        {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"down_proj": 2}},
        torch.float16,
    ),
}
TEXTS = [
    "The river runs from the mountains to the sea, and on its way",
    "A short history of the bicycle. " * 12,
    "def fibonacci(n):",
    "What is the capital of France, and why did it become the capital?",
]
MIXES: list[Mix] = [(), *(((name, 1.0),) for name in RECIPES), (("all16", 0.6), ("all1", 0.7))]


class World:
    """Base, adapters, PEFT's answers. Engines are made per test, over the same files."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        self.adapters = {
            name: make_adapter(base, folder / name, recipe, seed=i, strength=0.4)
            for i, (name, recipe) in enumerate(RECIPES.items())
        }
        self._oracle = Oracle(base, self.adapters)
        self._known: dict[tuple[tuple[int, ...], Mix], torch.Tensor] = {}
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.prompts: list[list[int]] = [tokenizer(text)["input_ids"] for text in TEXTS]

    def logits(self, tokens: list[int], mix: Mix) -> torch.Tensor:
        """PEFT's, [T, vocabulary]; of one text once, since the tests ask for the same ones."""
        key = (tuple(tokens), mix)
        if key not in self._known:
            self._known[key] = self._oracle.logits(tokens, mix)
        return self._known[key]

    def engine(self, folder: Path, **config: int) -> Harness:
        return Harness(self.base, folder, self.adapters, **({"max_tokens_per_step": 40, "kv_pages": 64} | config))

    def check(self, name: str, stream: Stream, prompt: list[int], mix: Mix) -> None:
        """Greedy tokens are PEFT's, and the 20 most probable ones have PEFT's probabilities."""
        logits = self.logits([*prompt, *stream.tokens][:-1], mix)[len(prompt) - 1 :]
        assert stream.tokens == logits.argmax(-1).tolist(), name
        assert len(stream.logprobs) == len(stream.tokens)
        expected, scale = logits.log_softmax(-1), float(logits.abs().max())
        for position, entry in enumerate(stream.logprobs):
            ids, values = zip(*entry.top, strict=True)
            error = (torch.tensor(values) - expected[position, list(ids)]).abs().max()
            assert error < TOLERANCE * scale, (name, position, float(error))


@pytest.fixture(scope="module")
def world(base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(base_model_dir, tmp_path_factory.mktemp("smollm2"))


def asked(world: World, shifts: Iterable[int]) -> dict[str, tuple[list[int], Mix]]:
    """Every adapter, the base and a mix, with as many prompts as there are shifts, not all with the same."""
    return {
        f"{i}-{shift}": (world.prompts[(i + shift) % len(TEXTS)], mix)
        for i, mix in enumerate(MIXES)
        for shift in shifts
    }


def test_adapters_mixed_with_the_base_in_every_batch(world: World, tmp_path: Path) -> None:
    engine = world.engine(tmp_path, arena_bytes=128 << 20)
    for name in world.adapters:
        assert engine.load(name).error is None
    requests = asked(world, range(2))
    for name, (prompt, mix) in requests.items():
        engine.ask(name, prompt, mix, max_tokens=6, logprobs=20)
    engine.run(seconds=250)
    assert not engine.refused
    assert engine.max_running >= 4
    for name, (prompt, mix) in requests.items():
        world.check(name, engine.streams[name, 0], prompt, mix)
    said = {(tuple(prompt), tuple(engine.streams[name, 0].tokens)) for name, (prompt, _) in requests.items()}
    assert len(said) > len(TEXTS) + 4, "the adapters do not change what the model says"
    engine.close()


def test_alone_then_evicted_and_loaded_again_with_prefix_hits(world: World, tmp_path: Path) -> None:
    """The arena has room for the largest adapter and little more; prompts stay in the cache when adapters do not."""
    engine = world.engine(tmp_path, arena_bytes=24 << 20)
    requests = asked(world, [0])
    for again in (False, True):
        for name, (prompt, mix) in requests.items():
            stream = engine.answer(f"{name}-{again}", prompt, mix, max_tokens=6, logprobs=20)
            world.check(name, stream, prompt, mix)
            # Of a prompt that is cached as a whole the last page is computed again: its last logits are needed.
            assert stream.cached_tokens == (16 * ((len(prompt) - 1) // 16) if again else 0), (name, again)
    evicted = sum(value for name, value in engine.stats().items() if "evict" in name)
    assert evicted >= len(RECIPES), engine.stats()
    engine.close()


def test_with_only_20_pages(world: World, tmp_path: Path) -> None:
    """Sequences that begin with a page each, all at once, and grow to four: they are preempted and recomputed, and
    nothing is lost."""
    engine = world.engine(tmp_path, kv_pages=20, arena_bytes=128 << 20)
    for name in world.adapters:
        assert engine.load(name).error is None
    requests = {str(i): (world.prompts[3 * (i % 2)], mix) for i, mix in enumerate(MIXES)}
    for name, (prompt, mix) in requests.items():
        engine.ask(name, prompt, mix, max_tokens=40, logprobs=20)
    engine.run(seconds=250)
    assert not engine.refused
    for name, (prompt, mix) in requests.items():
        world.check(name, engine.streams[name, 0], prompt, mix)
    assert engine.stats()["preemptions_total"] > 0
    engine.close()
