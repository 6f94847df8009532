"""The whole service with the real engine and model, driven by the real openai client: what the simulated engine
cannot show (log-probabilities with alternatives, sampling, what adapters do) and what must hold between its parts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from safetensors.torch import load_file, save_file

from service.tokenizer import Tokenizer
from tests.engine.oracle import Recipe, make_adapter
from tests.ports import unused_port
from tests.service.launch import Launched, wait_for

BASE = "SmolLM2-135M-Instruct"
PROMPT = "The river runs from the mountains to"

pytestmark = [pytest.mark.xdist_group("real-engine"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "models").symlink_to(base_model_dir.parent)
    with Launched(folder, unused_port(), "--threads", "1", "--max-positions", "1024") as launched:
        launched.wait_announced()
        for seed, name in enumerate(("one", "two")):
            made = make_adapter(base_model_dir, folder / name, Recipe(8), seed=seed, strength=0.4)
            with (made / "adapter_model.safetensors").open("rb") as weights:
                files = {"config": (made / "adapter_config.json").read_bytes(), "weights": weights}
                launched.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()
        yield launched


@pytest.fixture
def client(service: Launched) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=200) as made:
        yield made


def test_base_adapters_and_a_mix_say_different_things_and_the_same_each_time(client: OpenAI, service: Launched) -> None:
    def say(model: str, **extra: object) -> str:
        done = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body=extra)
        return done.choices[0].text

    mix = {"adapters": [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}]}
    first = [say(BASE), say("one"), say("two"), say(BASE, **mix)]
    assert len(set(first)) >= 3
    assert [say(BASE), say("one@1"), say("two"), say(BASE, **mix)] == first
    assert say(BASE, adapters=[{"name": "one", "weight": 1.0}]) == first[1]
    assert say(BASE, adapters=[{"name": "one", "weight": 0.0}]) == first[0]


def test_streams_of_different_adapters_in_one_batch_say_what_each_says_alone(client: OpenAI, service: Launched) -> None:
    models = [BASE, "one", "two", "one", BASE, "two"]

    def alone(model: str) -> str:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text

    expected = {model: alone(model) for model in set(models)}

    async def stream(api: AsyncOpenAI, model: str) -> str:
        chunks = await api.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in chunks:
            text += "".join(choice.text for choice in chunk.choices)
            usage = chunk.usage or usage
        assert usage is not None
        assert usage.completion_tokens == 12
        return text

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=200) as api:
            return await asyncio.gather(*(stream(api, model) for model in models))

    assert asyncio.run(together()) == [expected[model] for model in models]


def test_logprobs_with_alternatives_and_echo(client: OpenAI) -> None:
    done = client.completions.create(model="one", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=4, echo=True)
    found = done.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == done.choices[0].text
    assert found.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in found.token_logprobs[1:])
    for token, value, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[-3:]:
        assert len(top) >= 4
        assert max(top.values()) == top[token] == value, "greedy decoding takes the most probable token"

    chat = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "Say hello."}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for entry in content.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.bytes == list(entry.token.encode())


def test_the_same_distribution_scores_a_text_as_generating_it_does(client: OpenAI) -> None:
    made = client.completions.create(model="two", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=0)
    generated = made.choices[0].logprobs
    scored = (
        client.completions.create(
            model="two", prompt=PROMPT + made.choices[0].text, max_tokens=0, logprobs=0, echo=True
        )
        .choices[0]
        .logprobs
    )
    assert generated is not None
    assert scored is not None
    assert generated.token_logprobs == pytest.approx(scored.token_logprobs[-6:], abs=1e-3)


def test_seeds_repeat_and_choices_differ(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        done = client.completions.create(model="one", prompt=PROMPT, max_tokens=8, temperature=1.2, seed=seed, n=3)
        return [choice.text for choice in done.choices]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) == 3


def test_stop_strings_penalties_and_limits(client: OpenAI) -> None:
    plain = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=16, temperature=0).choices[0].text
    word = plain.split()[2]
    cut = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=16, temperature=0, stop=[word]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == plain[: plain.index(word)]
    biased = client.completions.create(
        model=BASE, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"260": -100}
    ).choices[0]
    assert " the" not in biased.text
    with pytest.raises(BadRequestError, match="1024"):
        client.completions.create(model=BASE, prompt=PROMPT, max_tokens=2000)


REPEATING = "one two one two one two three one two one two"
Change = Callable[[Any, list[int], list[int]], None]
"""(logits [vocabulary] to change, tokens of the prompt, tokens made so far)."""


@pytest.fixture(scope="module")
def expected(base_model_dir: Path) -> Callable[[Change, int], str]:
    """What transformers' own generate says, greedily, when a change has been at the logits of each step. A step that
    two tokens could win would show nothing, and is an error."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = Tokenizer.load(base_model_dir)
    model = AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.float32).eval()
    prompt = tokenizer.encode_now([REPEATING])[0]

    def say(change: Change, count: int) -> str:
        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            change(scores[0], prompt, ids[0, len(prompt) :].tolist())
            first, second = scores[0].topk(2).values.tolist()
            assert first - second > 1e-3, "choose another prompt"
            return scores

        ids = torch.tensor([prompt])
        config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        found = model.generate(ids, config, attention_mask=torch.ones_like(ids), logits_processor=[process])
        made = found[0, len(prompt) :].tolist()
        assert not set(made) & set(tokenizer.eos_token_ids), "choose another prompt"
        return tokenizer.decode(made)

    return say


def test_each_penalty_is_its_own(client: OpenAI, expected: Callable[[Change, int], str]) -> None:
    """Three penalties that change the text, each in its own way and each as it is defined."""

    def presence(logits: Any, prompt: list[int], made: list[int]) -> None:
        for token in set(made):
            logits[token] -= 1.5

    def frequency(logits: Any, prompt: list[int], made: list[int]) -> None:
        for token in made:
            logits[token] -= 1.5

    def repetition(logits: Any, prompt: list[int], made: list[int]) -> None:
        for token in {*prompt, *made}:
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5

    def nothing(logits: Any, prompt: list[int], made: list[int]) -> None:
        pass

    changes: dict[str, Change] = {
        "presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition, "": nothing,
    }  # fmt: skip
    wanted = {field: expected(change, 16) for field, change in changes.items()}
    assert len(set(wanted.values())) == len(wanted), wanted
    for field, text in wanted.items():
        done = client.completions.create(
            model=BASE, prompt=REPEATING, max_tokens=16, temperature=0, extra_body={field: 1.5} if field else {}
        )
        assert (field, done.choices[0].text) == (field, text)


def test_what_cuts_the_distribution(client: OpenAI) -> None:
    """One token, drawn often: all that are left are among those that the cut leaves, and several of these come."""
    prompt = "My favourite animal is the"
    scored = client.completions.create(model=BASE, prompt=prompt, max_tokens=1, temperature=0, logprobs=20).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.top_logprobs is not None
    top = dict(sorted(scored.logprobs.top_logprobs[0].items(), key=lambda entry: -entry[1]))
    masses = [math.exp(value) for value in top.values()]

    def drawn(temperature: float = 1.0, **fields: float) -> set[str]:
        done = client.completions.create(
            model=BASE, prompt=prompt, max_tokens=1, n=40, seed=5, temperature=temperature, extra_body=fields
        )
        return {choice.text for choice in done.choices}

    def nucleus(mass: float) -> set[str]:
        return set(list(top)[: next(i for i in range(1, 20) if sum(masses[:i]) >= mass)])

    def at_least(share: float) -> set[str]:
        return {token for token, mass in zip(top, masses, strict=True) if mass >= share * masses[0]}

    assert len(drawn()) > 12, "choose another prompt"
    assert drawn(temperature=0.05) <= set(list(top)[:2])
    assert drawn(top_k=3) == set(list(top)[:3])
    assert drawn(top_k=2**70) == drawn(top_k=0) == drawn()
    assert drawn(top_p=0.2) == nucleus(0.2)
    assert drawn(min_p=0.5) == at_least(0.5)
    kept = [set(list(top)[:3]), nucleus(0.2), at_least(0.5)]
    assert all(2 <= len(one) <= 8 for one in kept), kept
    assert (
        drawn(temperature=2.0, top_k=1) == drawn(temperature=2.0, top_p=0.001) == drawn(min_p=1.0) == {next(iter(top))}
    )


def test_what_ends_an_answer(client: OpenAI, base_model_dir: Path) -> None:
    """With a bias that no logit reaches the end is the next token, and so is what would come after it."""
    end = Tokenizer.load(base_model_dir).eos_token_ids[0]

    def say(token: int = end, **fields: Any) -> tuple[str, int]:
        done = client.completions.create(
            model=BASE, prompt=PROMPT, max_tokens=6, temperature=0, logit_bias={str(token): 100}, extra_body=fields
        )
        assert done.usage is not None
        return done.choices[0].finish_reason, done.usage.completion_tokens

    assert say() == ("stop", 1)
    assert say(min_tokens=3) == ("stop", 4)
    assert say(ignore_eos=True) == ("length", 6)
    assert say(token=260) == ("length", 6)
    assert say(token=260, stop_token_ids=[260]) == ("stop", 1)
    assert say(token=260, stop_token_ids=[260], min_tokens=2) == ("stop", 3)
    assert say(token=260, stop_token_ids=[260], ignore_eos=True) == ("stop", 1)


def test_a_client_that_leaves_frees_its_sequence_and_pages(service: Launched) -> None:
    def gauge(name: str) -> float:
        text = service.http.get("/metrics").text
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))

    body = {"model": "two", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=service.url, timeout=60, trust_env=False) as leaving,
        leaving.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()  # kept: httpx closes the connection of an iterator that nobody holds
        next(lines)
        wait_for(lambda: gauge("loraplex_engine_sequences_running") == 1)
    wait_for(lambda: gauge("loraplex_engine_sequences_running") == 0, 20)
    wait_for(lambda: gauge("loraplex_engine_adapter_leases") == 0, 20)


def test_an_adapter_that_overflows_is_told_so_and_disturbs_nobody(
    client: OpenAI, service: Launched, tmp_path: Path, base_model_dir: Path
) -> None:
    made = make_adapter(base_model_dir, tmp_path / "huge", Recipe(8), seed=3, strength=0.4)
    factors = load_file(made / "adapter_model.safetensors")
    save_file({name: factor * 1e30 for name, factor in factors.items()}, made / "adapter_model.safetensors")
    with (made / "adapter_model.safetensors").open("rb") as weights:
        files = {"config": (made / "adapter_config.json").read_bytes(), "weights": weights}
        service.http.post("/v1/adapters", data={"name": "huge"}, files=files).raise_for_status()

    def say(model: str) -> str:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text

    before = say("one")
    body = {"model": "huge", "prompt": PROMPT, "max_tokens": 4}
    with ThreadPoolExecutor() as threads:
        neighbours = [threads.submit(say, "one") for _ in range(3)]
        refused = service.http.post("/v1/completions", json=body)
        assert [each.result() for each in neighbours] == [before] * 3
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_finite")
    streamed = service.http.post("/v1/completions", json=body | {"stream": True})
    assert '"not_finite"' in streamed.text
    assert say("one") == before


def test_only_the_engine_has_loaded_torch(service: Launched) -> None:
    tree = psutil.Process(service.process.pid).children(recursive=True)
    with_torch = [p.cmdline() for p in tree if any("libtorch_cpu" in m.path for m in p.memory_maps(grouped=True))]
    assert len(with_torch) == 1
    assert "service.engine.process" in " ".join(with_torch[0])
