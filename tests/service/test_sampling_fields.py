"""Every field of a request that says how tokens are drawn reaches the engine, each as itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from service.api.auth import SINGLE_USER
from service.api.deps import Services
from service.api.openai import Target, _job, _sampling
from service.api.schemas import ChatRequest, CompletionRequest, Sampled
from service.engine.messages import AdapterRef, SamplingParams

EOS = (2, 7)
SERVICES = cast(
    Services,
    SimpleNamespace(
        engine=SimpleNamespace(manifest=SimpleNamespace(vocab_size=100)), tokenizer=SimpleNamespace(eos_token_ids=EOS)
    ),
)
SAMPLING: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.31, "temperature", 0.31),
    "top_p": (0.32, "top_p", 0.32),
    "top_k": (33, "top_k", 33),
    "min_p": (0.34, "min_p", 0.34),
    "presence_penalty": (0.35, "presence_penalty", 0.35),
    "frequency_penalty": (0.36, "frequency_penalty", 0.36),
    "repetition_penalty": (1.37, "repetition_penalty", 1.37),
    "logit_bias": ({"38": 3.8}, "logit_bias", {38: 3.8}),
    "seed": (39, "seed", 39),
    "min_tokens": (4, "min_tokens", 4),
    "stop_token_ids": ([41], "stop_token_ids", (41, *EOS)),
    "ignore_eos": (True, "stop_token_ids", ()),
}
"""Field -> a value that no other has, the attribute of SamplingParams, and its value."""
JOB: dict[str, tuple[Any, str, Any]] = {
    "n": (3, "n", 3),
    "stop": (["end", "fin"], "stop", ("end", "fin")),
    "include_stop_str_in_output": (True, "include_stop", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "priority": (5, "priority", 5),
}
"""The same for Job, which becomes the engine's Submit."""
ELSEWHERE = {"model", "adapters", "stream", "stream_options", "max_tokens"}
"""What the tests of the routes show."""
OUTSIDE = {"max_tokens": 64, "logprobs": 11, "prompt_logprobs": 11}
"""Attributes that the routes work out themselves, and hand over as arguments."""
KINDS: list[tuple[type[Sampled], dict[str, Any]]] = [
    (CompletionRequest, {"model": "m", "prompt": "p"}),
    (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "p"}]}),
]
both = pytest.mark.parametrize(("kind", "least"), KINDS, ids=["completion", "chat"])


def sampling_of(kind: type[Sampled], body: dict[str, Any]) -> dict[str, Any]:
    params = _sampling(SERVICES, kind.model_validate(body), 64, logprobs=11, echo=True)
    return {name: getattr(params, name) for name in SamplingParams.__struct_fields__}


def test_the_tables_are_complete() -> None:
    assert SAMPLING.keys() | JOB.keys() | ELSEWHERE == Sampled.model_fields.keys()
    assert {attribute for _, attribute, _ in SAMPLING.values()} | OUTSIDE.keys() == set(
        SamplingParams.__struct_fields__
    )
    values = [str(value) for value, _, _ in SAMPLING.values()]
    assert len(set(values)) == len(values)


@both
def test_absent_fields_are_the_engines_defaults(kind: type[Sampled], least: dict[str, Any]) -> None:
    defaults = SamplingParams(stop_token_ids=EOS, **OUTSIDE)
    assert sampling_of(kind, least) == {name: getattr(defaults, name) for name in SamplingParams.__struct_fields__}


@both
@pytest.mark.parametrize("field", SAMPLING)
def test_each_alone(kind: type[Sampled], least: dict[str, Any], field: str) -> None:
    value, attribute, wanted = SAMPLING[field]
    assert sampling_of(kind, {**least, field: value}) == {**sampling_of(kind, least), attribute: wanted}


WRONG: dict[type, list[Any]] = {bool: ["no", "true", 1, 0.0], int: [True, "3", 2.5], float: [True, "0.5", [0.5]]}
SCALARS = {name: type(value) for name, (value, _, _) in (SAMPLING | JOB).items() if type(value) in WRONG}


@both
@pytest.mark.parametrize("field", [*SCALARS, "stream"])
def test_a_value_of_another_type_is_refused(kind: type[Sampled], least: dict[str, Any], field: str) -> None:
    for value in WRONG[SCALARS.get(field, bool)]:
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({**least, field: value})
        assert [error["loc"] for error in refused.value.errors()] == [(field,)], value
    assert kind.model_validate({**least, "temperature": 1}).temperature == 1.0


@both
@pytest.mark.parametrize(("given", "wanted"), [(-1, 0), (100, 100), (101, 100), (2**31, 100), (2**64, 100)])
def test_a_top_k_beyond_the_vocabulary_is_all_of_it(
    kind: type[Sampled], least: dict[str, Any], given: int, wanted: int
) -> None:
    assert sampling_of(kind, {**least, "top_k": given})["top_k"] == wanted


@both
def test_all_together(kind: type[Sampled], least: dict[str, Any]) -> None:
    fields = {field: entry for field, entry in SAMPLING.items() if field != "ignore_eos"}
    found = sampling_of(kind, {**least, **{field: value for field, (value, _, _) in fields.items()}})
    assert found == {**OUTSIDE, **{attribute: wanted for _, attribute, wanted in fields.values()}}


@both
def test_what_is_not_sampling(kind: type[Sampled], least: dict[str, Any]) -> None:
    body = kind.model_validate({**least, **{field: value for field, (value, _, _) in JOB.items()}})
    sampling = SamplingParams(top_k=5)
    target = Target((AdapterRef("d", 0.5),), {"1": 4096}, "", "")
    job = _job(body, SINGLE_USER, target, [[1, 2]], sampling)
    assert {field: getattr(job, attribute) for field, (_, attribute, _) in JOB.items()} == {
        field: wanted for field, (_, _, wanted) in JOB.items()
    }
    assert (job.prompts, job.sampling, job.adapters) == ([[1, 2]], sampling, target.adapters)
