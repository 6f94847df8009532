"""The whole service with the real engine and model, driven by the real openai client: what the simulated engine
cannot show (log-probabilities with alternatives, sampling, what adapters do) and what must hold between its parts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

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


def test_only_the_engine_has_loaded_torch(service: Launched) -> None:
    tree = psutil.Process(service.process.pid).children(recursive=True)
    with_torch = [p.cmdline() for p in tree if any("libtorch_cpu" in m.path for m in p.memory_maps(grouped=True))]
    assert len(with_torch) == 1
    assert "service.engine.process" in " ".join(with_torch[0])
