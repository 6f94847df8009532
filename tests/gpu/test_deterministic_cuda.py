"""The deterministic engine on CUDA: a request's tokens and log-probabilities are the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from tests.engine.oracle import VOCABULARY, recipes
from tests.engine.test_parity import MIXES, World, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def world(request, tmp_path_factory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param), recipes(request.param), MIXES)


def sampling(i: int) -> dict:
    """Every third is sampled, every fifth asks for its prompt's log-probabilities."""
    options = {"max_tokens": 12, "logprobs": VOCABULARY, "seed": i}
    if i % 3 == 0:
        options |= {"temperature": 0.8, "top_p": 0.9}
    if i % 5 == 0:
        options |= {"prompt_logprobs": VOCABULARY}
    return options


def ask(engine, world, names, **more) -> None:
    for i, name in enumerate(world.requests):
        if name in names:
            tokens, mix = world.requests[name]
            engine.ask(name, tokens, mix, **sampling(i) | more)


def test_bits_do_not_depend_on_who_else_is_there(world, tmp_path) -> None:
    engine = world.engine(
        tmp_path, device="cuda", dtype="bfloat16", deterministic=True, max_sequences=64, max_tokens_per_step=128
    )
    alone = {}
    for name in world.requests:
        ask(engine, world, [name])
        engine.run()
        alone[name] = engine.streams.pop((name, 0))
    assert len({tuple(stream.tokens) for stream in alone.values()}) > 3

    for turn in range(3):
        # Adapters come back in another order, so that their rows differ; prompts are in the prefix cache, or are not.
        for name in world.adapters if turn else ():
            engine.unload(name)
        names = sorted(world.requests, reverse=turn == 1)
        for i in range(20 * turn):
            length = 5 + 11 * (i % 20)
            engine.ask(f"stranger{turn}-{i}", prompt(900 + i, length), (), salt=str(turn), max_tokens=3 * i + 1)
        for name in names:
            ask(engine, world, [name])
            for _ in range(turn):
                engine.engine.step()
        engine.run()
        assert not engine.refused
        for name in names:
            stream, before = engine.streams.pop((name, 0)), alone[name]
            assert stream.tokens == before.tokens, (turn, name)
            assert stream.logprobs == before.logprobs, (turn, name)
            assert stream.prompt_logprobs == before.prompt_logprobs, (turn, name)
    assert engine.stats()["prefix_hit_tokens_total"] > 0
    engine.close()


def test_few_pages_and_preemptions_change_no_bit(world, tmp_path) -> None:
    options = {"device": "cuda", "dtype": "bfloat16", "deterministic": True, "max_sequences": 64}
    engine = world.engine(tmp_path, max_tokens_per_step=128, **options)
    names = [name for i, name in enumerate(world.requests) if i % 5]
    ask(engine, world, names, max_tokens=40)
    engine.run()
    plenty = {name: engine.streams.pop((name, 0)) for name in names}
    engine.close()
    engine = world.engine(tmp_path, max_tokens_per_step=128, kv_pages=20, **options)
    ask(engine, world, names, max_tokens=40)
    engine.run()
    assert engine.stats()["preemptions_total"] > 0
    for name in names:
        stream = engine.streams.pop((name, 0))
        assert (stream.tokens, stream.logprobs) == (plenty[name].tokens, plenty[name].logprobs), name
    engine.close()
