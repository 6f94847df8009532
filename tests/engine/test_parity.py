"""Parity with PEFT: for every architecture and every kind of adapter that is served, the engine's tokens and
distributions are PEFT's, however the request was scheduled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import Harness, Stream
from tests.engine.oracle import (
    ARCHITECTURES,
    HIGH_RANKS,
    VOCABULARY,
    Mix,
    Oracle,
    Recipe,
    make_adapter,
    make_base,
    recipes,
)

TOLERANCE = 1e-4
"""Of the largest logit, float32."""
MIXES: list[Mix] = [
    (("rank16", 0.7), ("rank8-rs", 0.4)),
    (("rank16", 1.0), ("rank8-rs", -0.5)),
    (("rank16", 0.5),),
]


class World:
    """One architecture: base, adapters, oracle; engines are made per test, over the same files."""

    def __init__(self, architecture: str, folder: Path, made: dict[str, Recipe], mixes: list[Mix]) -> None:
        self.architecture = architecture
        self.base = make_base(architecture, folder / "base")
        self.adapters = {
            name: make_adapter(self.base, folder / name, recipe, seed=i)
            for i, (name, recipe) in enumerate(made.items())
        }
        self.oracle = Oracle(self.base, self.adapters)
        self._said: dict[tuple[tuple[int, ...], Mix], torch.Tensor] = {}
        self.requests: dict[str, tuple[list[int], Mix]] = {"base": (prompt(0), ()), "base-long": (prompt(1, 100), ())}
        for i, name in enumerate(self.adapters):
            self.requests[name] = (prompt(2 + i), ((name, 1.0),))
            self.requests[f"{name}-long"] = (prompt(20 + i, 100), ((name, 1.0),))
        for i, mix in enumerate(mixes):
            self.requests[f"mix{i}"] = (prompt(40 + i, 30), mix)

    def engine(self, folder: Path, **config) -> Harness:
        return Harness(self.base, folder, self.adapters, **config)

    def check(self, name: str, stream: Stream) -> None:
        """Greedy tokens are PEFT's, and so is the whole distribution at every position that was asked for."""
        tokens, mix = self.requests[name]
        assert stream.finish_reason in ("length", "stop"), name
        everything = tokens + stream.tokens
        # Most tests want the same of the same requests: PEFT is asked once.
        if (asked := (tuple(everything[:-1]), mix)) not in self._said:
            self._said[asked] = self.oracle.logits(everything[:-1], mix)
        logits = self._said[asked]
        generated = logits[len(tokens) - 1 :]
        assert stream.tokens == generated.argmax(-1).tolist(), name
        scale = float(logits.abs().max())
        expected = logits.log_softmax(-1)
        entries = [*stream.prompt_logprobs[1:], *stream.logprobs]
        first = len(expected) - len(entries)
        assert entries, "nothing to compare"
        for position, entry in enumerate(entries, start=first):
            assert entry is not None
            found = torch.empty(VOCABULARY)
            ids, values = zip(*entry.top, strict=True)
            found[list(ids)] = torch.tensor(values)
            assert (found - expected[position]).abs().max() < TOLERANCE * scale, (name, position)
            assert entry.token_id == everything[position + 1]


def prompt(seed: int, length: int = 23) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def world(request, tmp_path_factory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param), recipes(request.param), MIXES)


def ask_all(engine: Harness, world: World, names: list[str] | None = None, **options) -> None:
    options = {"logprobs": VOCABULARY, "stop_token_ids": (2,)} | options
    for name in names or world.requests:
        tokens, mix = world.requests[name]
        engine.ask(name, tokens, mix, **options)


def check_all(engine: Harness, world: World, names: list[str] | None = None) -> None:
    assert not engine.refused
    for name in names or world.requests:
        world.check(name, engine.streams[name, 0])


def test_the_adapters_change_what_the_model_says(world):
    """Otherwise the tests below would show nothing."""
    for name in world.adapters:
        tokens, mix = world.requests[name]
        base, adapted = world.oracle.logits(tokens, ()), world.oracle.logits(tokens, mix)
        assert (base - adapted).abs().max() > 0.05 * base.abs().max(), name


def test_alone(world, tmp_path):
    engine = world.engine(tmp_path)
    for name in world.requests:
        ask_all(engine, world, [name])
        engine.run()
    check_all(engine, world)
    engine.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_all_mixed_in_one_batch_with_chunked_prompts_and_prompt_logprobs(world, tmp_path, ahead):
    engine = world.engine(tmp_path, max_tokens_per_step=48, ahead=ahead)
    for name in world.adapters:
        engine.load(name)
    ask_all(engine, world, prompt_logprobs=VOCABULARY, max_tokens=24)
    engine.run()
    assert engine.max_running > 10, "the requests did not share batches"
    assert all(len(engine.streams[name, 0].prompt_logprobs) == len(p) for name, (p, _) in world.requests.items())
    check_all(engine, world)
    engine.close()


def test_after_eviction_and_reload(world, tmp_path):
    """An arena that holds only some of the adapters at a time: blocks come, go, move and come back."""
    sizes = world.engine(tmp_path / "sizes")
    manifest = sizes.manifest
    sizes.close()
    per_rank = 4 * sum(module.in_features + module.out_features for module in manifest.linears)
    engine = world.engine(tmp_path, arena_bytes=50 * per_rank)
    for _ in range(2):
        ask_all(engine, world)
        engine.run()
        check_all(engine, world)
    stats = engine.stats()
    assert sum(value for name, value in stats.items() if "evict" in name) > 0, stats
    engine.close()


def test_a_mix_is_rounded_alike_whatever_lies_where_and_however_it_is_written(world, tmp_path):
    mix = [("rank16", 0.7), ("rank8-rs", 0.4)]
    streams = []
    for number, loaded in enumerate((["rank16", "rank8-rs"], ["rank8-rs", "rank16"])):
        engine = world.engine(tmp_path / str(number))
        for name in loaded:
            engine.load(name)
        streams += [
            engine.answer(f"mix{i}", prompt(50), written, salt=str(i), logprobs=VOCABULARY, max_tokens=4)
            for i, written in enumerate((mix, mix[::-1]))
        ]
        engine.close()
    assert all(stream == streams[0] for stream in streams)


def test_unloaded_and_loaded_again(world, tmp_path):
    engine = world.engine(tmp_path)
    for forget in (False, True):
        for name in world.adapters:
            assert engine.load(name).error is None
            ask_all(engine, world, [name])
            engine.run()
            assert engine.unload(name, forget=forget).error is None
    check_all(engine, world, list(world.adapters))
    engine.close()


def test_with_prefix_cache_hits_that_never_cross_adapters(world, tmp_path):
    engine = world.engine(tmp_path)
    shared = prompt(99, 64)
    names = []
    for name, (_, mix) in list(world.requests.items()):
        world.requests[f"shared-{name}"] = (shared, mix)
        names.append(f"shared-{name}")
    for name in names:
        ask_all(engine, world, [name])
        engine.run()
        again = f"again-{name}"
        world.requests[again] = world.requests[name]
        ask_all(engine, world, [again])
        engine.run()
        assert engine.streams[again, 0].cached_tokens >= 48
    check_all(engine, world, [n for name in names for n in (name, f"again-{name}")])
    # Requests with the same prompt under other adapters found nothing of each other's.
    mixes = [world.requests[name][1] for name in names]
    firsts = [n for i, n in enumerate(names) if mixes[i] not in mixes[:i]]
    assert all(engine.streams[name, 0].cached_tokens == 0 for name in firsts)
    for name in names:
        del world.requests[name], world.requests[f"again-{name}"]
    engine.close()


def test_sampling_and_stops_are_the_same_whether_steps_are_prepared_ahead(world, tmp_path):
    """Penalties look at tokens that are still on the device, stops end sequences that are in the next step already."""
    ways = []
    for ahead in (False, True):
        engine = world.engine(tmp_path / str(ahead), max_tokens_per_step=48, ahead=ahead)
        for i, (name, (tokens, mix)) in enumerate(world.requests.items()):
            options = [
                {"temperature": 1.0},  # no cut by rank: among 320 tokens some two are equal but for rounding
                {"temperature": 0.8, "presence_penalty": 1.5, "stop_token_ids": tuple(range(2, 60)), "min_tokens": 3},
                {"frequency_penalty": 1.5, "stop_token_ids": tuple(range(0, 320, 9))},
                {"repetition_penalty": 1.6, "logprobs": 4, "prompt_logprobs": 2},
            ][i % 4]
            engine.ask(name, tokens, mix, n=1 + i % 3, seed=i, max_tokens=20, **options)
        engine.run()
        assert not engine.refused
        ways.append(engine.streams)
        engine.close()
    assert ways[0].keys() == ways[1].keys()
    for key, stream in ways[0].items():
        assert (stream.tokens, stream.finish_reason) == (ways[1][key].tokens, ways[1][key].finish_reason), key
        assert len(stream.logprobs) == len(ways[1][key].logprobs)
        assert len(stream.prompt_logprobs) == len(ways[1][key].prompt_logprobs)
    assert {stream.finish_reason for stream in ways[1].values()} == {"stop", "length"}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_whose_logits_are_no_numbers_is_told_so_and_harms_nobody(world, tmp_path, ahead):
    engine = world.engine(tmp_path, ahead=ahead)
    name = next(iter(world.adapters))
    for _ in range(2):  # pages that it has left are read under a mask
        for i, sampling in enumerate(({}, {"temperature": 1.0, "top_p": 0.5}, {"prompt_logprobs": 1})):
            engine.ask(f"mad{i}", prompt(60, 30), ((name, 3e38),), **sampling)
        ask_all(engine, world)
        engine.run()
        assert {key: refused.code for key, refused in engine.refused.items()} == {
            f"mad{i}": "not_finite" for i in range(3)
        }
        engine.refused.clear()
        check_all(engine, world)
        for key in world.requests:
            engine.streams.pop((key, 0))
    engine.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_with_only_20_pages(world, tmp_path, ahead):
    """Sequences of up to 11 pages in a cache of 20: they are preempted and recomputed, and nothing is lost."""
    engine = world.engine(tmp_path, kv_pages=20, max_tokens_per_step=64, ahead=ahead)
    names = [name for name in world.requests if "long" in name]
    for name in world.adapters:
        engine.load(name)
    ask_all(engine, world, names, max_tokens=70, stop_token_ids=())
    engine.run()
    check_all(engine, world, names)
    assert engine.stats()["preemptions_total"] > 0
    engine.close()


def test_the_highest_ranks(tmp_path):
    """All mixed, and again where there is room for the mix of the two largest and not for all."""
    mixes: list[Mix] = [(("rank512", 0.5), ("rank512-patterns", -0.4)), (("rank512", 0.5),)]
    world = World("llama", tmp_path, HIGH_RANKS, mixes)
    test_the_adapters_change_what_the_model_says(world)
    for arena_mb in (24, 9):
        engine = world.engine(tmp_path / str(arena_mb), arena_bytes=arena_mb << 20, max_tokens_per_step=48)
        for _ in range(2):
            ask_all(engine, world)
            engine.run()
            check_all(engine, world)
        evicted = sum(value for name, value in engine.stats().items() if "evict" in name)
        assert (evicted > 0) == (arena_mb == 9), engine.stats()
        engine.close()
