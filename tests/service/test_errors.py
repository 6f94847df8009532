"""Every failure has OpenAI's shape, the status a client expects, and names what is wrong with its value."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters import errors as adapter_errors
from adapters.residency import TooManyAdapters
from service.api.errors import as_api_error
from service.api.failure import ApiError
from service.engine import errors as engine_errors
from service.store import errors as store_errors
from service.store import merges as store_merges
from tests.service.inference_helpers import BASE, VOCABULARY, InferenceServer, events

COMPLETION = {"model": BASE, "prompt": "Hello"}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}]}

BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "required"),
    ({"model": None}, "model", "required"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": []}, "prompt", "[]"),
    ({"prompt": [[1], []]}, "prompt[1]", "no tokens"),
    ({"prompt": ["a", 1]}, "prompt", "should be a string"),
    ({"prompt": [True]}, "prompt", "should be a string"),
    ({"prompt": {"text": "x"}}, "prompt", "should be a string"),
    ({"prompt": [1, VOCABULARY]}, "prompt", str(VOCABULARY)),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"temperature": 2.5}, "temperature", "2.5"),
    ({"temperature": -0.1}, "temperature", "-0.1"),
    ({"top_p": 0}, "top_p", "0"),
    ({"top_p": 1.01}, "top_p", "1.01"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": 1.5}, "min_p", "1.5"),
    ({"presence_penalty": 3}, "presence_penalty", "3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    ({"n": 0}, "n", "0"),
    ({"n": 129}, "n", "129"),
    ({"best_of": 3}, "best_of", "3"),
    ({"suffix": "end"}, "suffix", "end"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"min_tokens": 17}, "min_tokens", "17"),
    ({"logprobs": 21}, "logprobs", "21"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "101"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", str(VOCABULARY)),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]", "x"),
    ({"logit_bias": {"5": 1, "05": -1}}, "logit_bias.05.[key]", "05"),
    ({"logit_bias": {" 5": 1}}, "logit_bias. 5.[key]", " 5"),
    ({"logit_bias": {"5.0": 1}}, "logit_bias.5.0.[key]", "5.0"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    ({"stop_token_ids": [-5]}, "stop_token_ids", "-5"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": [str(i) for i in range(17)]}, "stop", "17"),
    ({"stop": 5}, "stop", "5"),
    ({"seed": 2**64}, "seed", str(2**64)),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
    ({"temprature": 1}, "temprature", "unknown field"),
    ({"guided_json": {"type": "object"}}, "guided_json", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"adapters": []}, "adapters", "[]"),
    ({"adapters": [{"name": "a"}] * 9}, "adapters", "8"),
    ({"adapters": [{"name": "a", "weight": "heavy"}]}, "adapters[0].weight", "heavy"),
    ({"adapters": [{"name": "a", "weight": 1e300}]}, "adapters[0].weight", "1e"),
    ({"adapters": [{"name": "a", "scale": 1}]}, "adapters[0].scale", "unknown field"),
    ({"model": "other", "adapters": [{"name": "a"}]}, "adapters", "other"),
]


def _called(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}, **fields}]}


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "[]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood", "unknown field"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": "good"}]}]},
        "messages[0].content",
        'unknown field "mood"',
    ),
    ({"messages": [_called(mood="good")]}, "messages[0].tool_calls[0].mood", "unknown field"),
    ({"messages": [_called(function={"name": "f", "mood": 1})]}, "messages[0].tool_calls[0].function.mood", "unknown"),
    ({"top_logprobs": 2}, "top_logprobs", "2"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "4"),
    ({"tool_choice": "required"}, "tool_choice", "required"),
    ({"tools": [{"type": "search"}]}, "tools[0].type", "search"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "json_schema"),
    ({"chat_template_kwargs": {"messages": []}}, "messages", "messages"),
    ({"prompt": "x"}, "prompt", "unknown field"),
]


@pytest.mark.parametrize(("change", "param", "text"), BAD_COMPLETIONS, ids=lambda value: str(value)[:30])
def test_a_bad_completion_names_field_and_value(
    server: InferenceServer, change: dict[str, Any], param: str, text: str
) -> None:
    _check(server, "/v1/completions", COMPLETION | change, param, text)


@pytest.mark.parametrize(("change", "param", "text"), BAD_CHATS, ids=lambda value: str(value)[:30])
def test_a_bad_chat_names_field_and_value(
    server: InferenceServer, change: dict[str, Any], param: str, text: str
) -> None:
    _check(server, "/v1/chat/completions", CHAT | change, param, text)


def _check(server: InferenceServer, path: str, body: dict[str, Any], param: str, text: str) -> None:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert text in error["message"].lower() or text in error["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "min_p", "presence_penalty"])
def test_numbers_that_are_none(server: InferenceServer, field: str, value: str) -> None:
    body = json.dumps(COMPLETION)[:-1] + f', "{field}": {value}}}'
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates(server: InferenceServer, text: str) -> None:
    for path, body in (
        ("/v1/completions", {**COMPLETION, "prompt": text}),
        ("/v1/completions", {**COMPLETION, "stop": text}),
        ("/v1/completions", {**COMPLETION, "model": text}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"x": text}}),
        ("/tokenize", {"prompt": text}),
    ):
        answer = server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        # A variable that the template does not use does no harm.
        allowed = (200,) if "chat_template_kwargs" in body else (400, 404)
        assert answer.status_code in allowed, (path, answer.text)


def test_a_context_that_is_too_long(server: InferenceServer) -> None:
    for path, body, param in (
        ("/v1/completions", {**COMPLETION, "max_tokens": 512}, "prompt"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 500}, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    ):
        error = server.http.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert "512 tokens" in error["message"]
    with pytest.raises(openai.BadRequestError):
        server.openai.completions.create(model=BASE, prompt=[5] * 513, max_tokens=1)


def test_too_many_sequences_in_one_request(server: InferenceServer) -> None:
    answer = server.http.post("/v1/completions", json={**COMPLETION, "prompt": ["x"] * 20, "n": 4})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_large"


def test_models_that_do_not_exist(server: InferenceServer, adapters: dict[str, str]) -> None:
    for model in ("nobody", "first@7", "first@nowhere", "first@", "../x", "first@1@2", f"{BASE}@1"):
        answer = server.http.post("/v1/completions", json={**COMPLETION, "model": model})
        assert answer.status_code == 404, model
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    mix = {"adapters": [{"name": "first"}, {"name": "nobody"}]}
    error = server.http.post("/v1/completions", json=COMPLETION | mix).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "adapters[1].name")
    with pytest.raises(openai.NotFoundError):
        server.openai.chat.completions.create(**(CHAT | {"model": "nobody"}))


def test_bodies_that_are_no_requests(server: InferenceServer) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{", b"", b"[1]", b'"x"', b"\xff\xfe", b"null"):
        answer = server.http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400, content
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
    answer = server.http.post("/v1/completions", content=json.dumps(COMPLETION))
    assert "application/json" in answer.json()["error"]["message"]


def test_urls_and_methods(server: InferenceServer) -> None:
    missing = server.http.get("/v2/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    wrong = server.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


def test_query_parameters_that_a_route_does_not_have(server: InferenceServer) -> None:
    """Of every route but those of probes, before the body is looked at."""
    for path, item in server.http.get("/openapi.json").json()["paths"].items():
        for method, operation in item.items():
            there = [each["name"] for each in operation["parameters"] if each["in"] == "query"]
            address = path.format(
                **{each["name"]: each["example"] for each in operation["parameters"] if "example" in each}
            )
            answer = server.http.request(
                method, f"{address}?tenant=default&limmit=1", headers={"content-type": "text/x"}
            )
            if path in ("/health", "/ready"):
                assert answer.status_code == 200, path
                continue
            assert answer.status_code == 400, (method, path, answer.text)
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("unknown_parameter", "limmit"), (method, path)
            names = ", ".join(sorted([*there, "tenant"]))
            assert error["message"] == f'Unknown query parameter "limmit"; there are: {names}.', (method, path)
    for query in ("api-version=2024-10-21", "start=2026-01-01&end=2026-02-01", "From=2026-01-01", "=", "fr%00om=1"):
        for path in ("/v1/usage", "/v1/models", "/"):
            assert server.http.get(f"{path}?{query}").json()["error"]["code"] == "unknown_parameter", (path, query)
    assert server.http.get("/v1/usage?from=2026-01-01&to=2026-02-01&tenant=default").status_code == 200
    secret = server.http.get("/v1/models?api_key=sesame").text
    assert "api_key" in secret
    assert "sesame" not in secret
    for path in ("/docs?x=1", "/openapi.json?x=1"):
        assert server.http.get(path).status_code == 200


def test_other_routes_check_their_bodies_too(server: InferenceServer) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "prompt"),
        ("/detokenize", {"tokens": [VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/tokenize", {"prompt": "x", "model": ""}, "model"),
    ):
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_tokens_are_those_of_a_model_that_is_there(server: InferenceServer, adapters: dict[str, str]) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "x"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
        ("/detokenize", {"tokens": [5]}),
    ):
        for model in (BASE, None, "first", "first@1", "first@old"):
            assert server.http.post(path, json=body | {"model": model}).status_code == 200
        for model in ("nope", "first@99", "../x"):
            answer = server.http.post(path, json=body | {"model": model})
            assert answer.status_code == 404
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert error == server.http.post("/v1/completions", json=COMPLETION | {"model": model}).json()["error"]


# ---------------------------------------------------------------- a busy, a broken, an absent engine


@pytest.fixture
def small(base_model_dir: Path) -> Iterator[InferenceServer]:
    """An engine that runs one sequence slowly and lets one wait."""
    options = {"step_s": 0.05, "poison": 777}  # 400 tokens last longer than a busy machine needs to look at them
    server = InferenceServer(base_model_dir, engine_options=options, max_sequences=1, max_queue=1)
    try:
        yield server.start()
    finally:
        server.stop()


def test_a_full_queue_a_lost_engine_and_its_return(small: InferenceServer) -> None:
    arguments: dict[str, Any] = {"model": BASE, "prompt": "x", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    body = {"model": BASE, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with small.http.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        assert next(lines).startswith("data: ")
        failures: list[Exception] = []

        def wait() -> None:
            try:
                small.openai.completions.create(**arguments)
            except openai.APIStatusError as exc:
                failures.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()
        small.wait_for_engine("sequences_waiting", 1)
        for stream in (False, True):
            refused = small.http.post("/v1/completions", json=body | {"stream": stream})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")

        small.kill_engine()
        rest = "\n".join(lines)
    thread.join()
    # The stream that had begun ends with an error event and no [DONE]; the one that waited gets a status.
    assert "event: error" in rest
    assert "[DONE]" not in rest
    assert json.loads(events(rest)[-1])["error"]["code"] == "engine_unavailable"
    assert [type(failure) for failure in failures] == [openai.InternalServerError]
    assert failures[0].status_code == 503  # type: ignore[attr-defined]

    small.wait_for("/ready", 503)
    assert small.http.get("/ready").headers["retry-after"]
    assert small.http.get("/health").status_code == 200
    gone = small.http.post("/v1/completions", json=body)
    assert gone.status_code == 503
    assert gone.headers["retry-after"]
    assert gone.json()["error"]["code"] == "engine_unavailable"
    assert small.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert small.http.get("/v1/models").status_code == 200

    small.start_engine()
    small.wait_for("/ready")
    answer = small.openai.completions.create(model=BASE, prompt="x", max_tokens=2, temperature=0)
    assert answer.choices[0].text == small.expected_text("x", 2)


def test_the_openai_client_sees_an_error_in_a_stream(small: InferenceServer) -> None:
    stream = small.openai.completions.create(
        model=BASE, prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    small.kill_engine()
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)


def test_a_step_that_fails_is_a_500(small: InferenceServer) -> None:
    answer = small.http.post("/v1/completions", json={"model": BASE, "prompt": [777]})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"


# ---------------------------------------------------------------- the mapping


def leaves(root: type[Exception]) -> list[type[Exception]]:
    below = [leaf for kind in root.__subclasses__() for leaf in leaves(kind)]
    return below or [root]


def test_an_adapter_that_can_never_be_loaded_is_the_client_s_business() -> None:
    """By hand (a call of the engine) as in a request."""
    too_large = adapter_errors.AdapterTooLarge("d", 2, 1)
    for error in (too_large, engine_errors.EngineCallFailed(str(too_large), "too_large")):
        answer = as_api_error(error)
        assert (answer.status, answer.code, answer.message) == (400, "too_large", str(too_large))


EXAMPLES: dict[type[Exception], tuple[Exception, int]] = {
    engine_errors.EngineRefused: (engine_errors.EngineRefused("queue_full", "full", 2.5), 429),
    engine_errors.EngineUnavailable: (engine_errors.EngineUnavailable("gone"), 503),
    engine_errors.EngineCallFailed: (engine_errors.EngineCallFailed("no"), 503),
    engine_errors.EngineCallTimedOut: (engine_errors.EngineCallTimedOut("late"), 503),
    engine_errors.UnsupportedModel: (engine_errors.UnsupportedModel("x"), 500),
    engine_errors.IntegrityError: (engine_errors.IntegrityError("x"), 500),
    engine_errors.EngineBroken: (engine_errors.EngineBroken("x"), 500),
    adapter_errors.AdapterRefused: (adapter_errors.AdapterRefused(["a", "b"]), 422),
    adapter_errors.AdapterMissing: (adapter_errors.AdapterMissing("d"), 404),
    adapter_errors.BlobDamaged: (adapter_errors.BlobDamaged("d", "size"), 500),
    adapter_errors.AccountTooSmall: (adapter_errors.AccountTooSmall("7", 2, 1), 413),
    TooManyAdapters: (TooManyAdapters("d", 2, 1), 400),
    adapter_errors.AdapterUnavailable: (adapter_errors.AdapterUnavailable("d", "x"), 503),
    adapter_errors.StoreUnavailable: (adapter_errors.StoreUnavailable("no answer"), 503),
    store_errors.AdapterNotFound: (store_errors.AdapterNotFound("a"), 404),
    store_errors.VersionNotFound: (store_errors.VersionNotFound("a", 3), 404),
    store_errors.AliasNotFound: (store_errors.AliasNotFound("a", "b"), 404),
    store_errors.AdapterExists: (store_errors.AdapterExists("a"), 409),
    store_errors.VersionInUse: (store_errors.VersionInUse("x"), 409),
    store_errors.WrongBase: (store_errors.WrongBase("a", 1), 409),
    store_merges.MergeNotFound: (store_merges.MergeNotFound("m"), 404),
    store_merges.MergeExists: (store_merges.MergeExists("a", "m", "queued"), 409),
    store_merges.KeyReused: (store_merges.KeyReused("m"), 409),
    store_errors.TenantNotFound: (store_errors.TenantNotFound("a"), 404),
    store_errors.KeyNotFound: (store_errors.KeyNotFound("a", "b"), 404),
    store_errors.TenantExists: (store_errors.TenantExists("a"), 409),
    store_errors.TenantReserved: (store_errors.TenantReserved("a"), 409),
    store_errors.QuotaReached: (store_errors.QuotaReached("max_rank", 8, "it has 16", status=422), 422),
    store_errors.PreconditionFailed: (store_errors.PreconditionFailed("x"), 412),
    store_errors.CatalogueFull: (store_errors.CatalogueFull(), 507),
    store_errors.CatalogueBusy: (store_errors.CatalogueBusy(), 503),
    store_errors.CatalogueDamaged: (store_errors.CatalogueDamaged("x"), 500),
    store_errors.CatalogueUnusable: (store_errors.CatalogueUnusable("x"), 503),
    store_errors.CatalogueTooNew: (store_errors.CatalogueTooNew("9999"), 503),
    store_errors.ClaimLost: (store_errors.ClaimLost(), 503),
    store_errors.UnstorableText: (store_errors.UnstorableText(), 400),
}


@pytest.mark.parametrize(
    "root", [engine_errors.EngineError, adapter_errors.LoraplexAdapterError, store_errors.CatalogueError]
)
def test_every_leaf_is_mapped(root: type[Exception]) -> None:
    for leaf in leaves(root):
        assert leaf in EXAMPLES, f"say here what {leaf.__name__} answers"
        example, status = EXAMPLES[leaf]
        error = as_api_error(example)
        assert error.status == status, leaf
        body = error.body()["error"]
        assert body["message"]
        assert body["code"]


def test_details_of_some() -> None:
    full = as_api_error(engine_errors.EngineRefused("queue_full", "full", 2.5))
    assert full.headers["Retry-After"] == "3"
    refused = as_api_error(adapter_errors.AdapterRefused(["rank 9999", "bad shape"]))
    assert refused.body()["error"]["reasons"] == ["rank 9999", "bad shape"]
    assert "rank 9999; bad shape" in refused.message
    unavailable = ("adapter_failed", "shutting_down", "out_of_memory", "engine_unavailable")
    for code, status in (
        ("too_large", 400),
        ("not_finite", 422),
        ("engine_error", 500),
        *((code, 503) for code in unavailable),
    ):
        assert as_api_error(engine_errors.EngineRefused(code, "x")).status == status
    hidden = as_api_error(RuntimeError("password=1234"))
    assert (hidden.status, "1234" in hidden.message) == (500, False)
    same = ApiError(418, "x")
    assert as_api_error(same) is same
