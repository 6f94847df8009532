"""The inference routes, driven over HTTP by the real openai client, against a simulated engine."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ParsedChatCompletionMessage, ParsedFunction

from tests.service.inference_helpers import BASE, InferenceServer, events

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


def chat_ids(server: InferenceServer, messages: list[dict[str, Any]]) -> list[int]:
    return server.tokenizer.encode_now([server.tokenizer.chat.render(messages)], add_special_tokens=False)[0]


def test_a_completion_and_its_usage(server: InferenceServer) -> None:
    answer = server.openai.completions.create(model=BASE, prompt=PROMPT, temperature=0, max_tokens=20)
    assert answer.choices[0].text == server.expected_text(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.model == BASE
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 20, 24)
    default = server.openai.completions.create(model=BASE, prompt=PROMPT, temperature=0)
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_a_streamed_completion_is_the_same(server: InferenceServer) -> None:
    stream = server.openai.completions.create(
        model=BASE, prompt=PROMPT, temperature=0, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk for chunk in chunks if chunk.usage is not None] == chunks[-1:]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 60
    texts = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in texts) == server.expected_text(PROMPT, 60)
    assert [choice.finish_reason for choice in texts] == [None] * (len(texts) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_streamed_events_as_they_are_on_the_wire(server: InferenceServer) -> None:
    body = {"model": BASE, "messages": MESSAGES, "temperature": 0, "max_tokens": 5, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    parts = events(answer.text)
    assert parts[-1] == "[DONE]"
    chunks = [json.loads(part) for part in parts[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_what_takes_longer_than_a_shutdown_waits_is_told_so(base_model_dir: Path, tmp_path: Path) -> None:
    """A stream by an event of its own; a whole answer, and who waits for a load, by the status."""
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.1, "load_s": 28.0})
    try:
        server.start()
        assert server.api is not None
        long = {"model": BASE, "prompt": [1, 2], "max_tokens": 500, "ignore_eos": True}
        server.upload("slow", tmp_path, 1)
        with ThreadPoolExecutor(3) as threads:
            load = threads.submit(server.http.post, "/v1/adapters/slow/load?wait=true", timeout=60)
            stream = threads.submit(server.http.post, "/v1/completions", json={**long, "stream": True}, timeout=60)
            whole = threads.submit(server.http.post, "/v1/completions", json=long, timeout=60)
            server.wait_for_engine("sequences_running", 2)
            server.api.send_signal(signal.SIGTERM)
            ends = stream.result().text.rstrip().rpartition("event: error\ndata: ")[2]
            assert json.loads(ends)["error"]["code"] == "shutting_down"
            for waiting in (whole, load):
                assert waiting.result().status_code == 503
                assert waiting.result().json()["error"]["code"] == "shutting_down"
        assert server.api.wait(30) == -signal.SIGTERM
        assert "Exception in ASGI" not in server.log_path.read_text()
    finally:
        server.stop()


def test_chat_streamed_and_not(server: InferenceServer) -> None:
    wanted = server.expected_text(chat_ids(server, MESSAGES), 30)
    whole = server.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, max_completion_tokens=30
    )
    assert whole.choices[0].message.content == wanted
    assert whole.choices[0].message.role == "assistant"
    stream = server.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, max_tokens=30, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted


def test_a_chat_answer_may_fill_the_context(server: InferenceServer) -> None:
    ids = chat_ids(server, MESSAGES)
    answer = server.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].finish_reason == "length"


def test_messages_in_all_their_forms(server: InferenceServer) -> None:
    plain = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "a\nb"}]
    parts: list[Any] = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
    ]
    answers = [
        server.openai.chat.completions.create(model=BASE, messages=messages, temperature=0, max_tokens=8)
        for messages in (plain, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    # What the client was given goes back as it is.
    follow_up = [*parts, answers[1].choices[0].message, {"role": "user", "content": "And?"}]
    again = server.openai.chat.completions.create(model=BASE, messages=follow_up, temperature=0, max_tokens=8)
    text = answers[1].choices[0].message.content
    ids = chat_ids(server, [*plain, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}])
    assert again.choices[0].message.content == server.expected_text(ids, 8)


def test_tool_calls_go_back_as_clients_send_them(base_model_dir: Path, tmp_path: Path) -> None:
    """With the nulls of an answer, and with what streaming and parse() add, of which the template sees nothing."""
    model = shutil.copytree(base_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text("{{ messages | tojson }}")
    function = ParsedFunction(name="clock", arguments='{"zone": "UTC"}', parsed_arguments={"zone": "UTC"})
    call = {"id": "1", "type": "function", "function": function.model_dump(), "index": 0}
    nulls = dict.fromkeys(("refusal", "audio", "function_call", "annotations", "content", "parsed"))
    made: Any = ParsedChatCompletionMessage.model_validate({"role": "assistant", "tool_calls": [call], **nulls})
    part = {"type": "text", "text": "noon", "id": "lc_1", "prompt_cache_breakpoint": {"mode": "explicit"}}
    messages: list[Any] = [*MESSAGES, made, {"role": "tool", "tool_call_id": "1", "content": [part]}]
    shown = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    server = InferenceServer(model)
    try:
        server.start()
        answer = server.openai.chat.completions.create(model=BASE, messages=messages, max_tokens=1)
        raw = [message if isinstance(message, dict) else message.model_dump() for message in messages]
        assert set(nulls) < set(raw[1])
        ids = server.http.post("/tokenize", json={"messages": raw}).json()["tokens"]
        assert json.loads(server.tokenizer.decode(ids)) == [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [shown]},
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices_keep_their_index(server: InferenceServer, stream: bool) -> None:
    prompts = ["One", "Two and more", "Three"]
    arguments: dict[str, Any] = {"model": BASE, "prompt": prompts, "n": 2, "temperature": 0, "max_tokens": 12}
    texts = [""] * 6
    if stream:
        for chunk in server.openai.completions.create(**arguments, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = server.openai.completions.create(**arguments)
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [choice.text for choice in answer.choices]
        assert answer.usage.completion_tokens == 72
        assert answer.usage.prompt_tokens == sum(map(len, server.tokenizer.encode_now(prompts)))
    assert texts == [server.expected_text(prompt, 12) for prompt in prompts for _ in range(2)]


def test_prompts_as_token_ids(server: InferenceServer) -> None:
    for prompt in ([5, 6, 7], [[5, 6, 7], [8]]):
        answer = server.openai.completions.create(model=BASE, prompt=prompt, temperature=0, max_tokens=5)
        lists = prompt if isinstance(prompt[0], list) else [prompt]
        assert [choice.text for choice in answer.choices] == [server.expected_text(ids, 5) for ids in lists]


def test_seeds_repeat_and_choices_differ(server: InferenceServer) -> None:
    def draw(seed: int) -> list[str]:
        answer = server.openai.completions.create(model=BASE, prompt=PROMPT, seed=seed, n=3, max_tokens=10)
        return [choice.text for choice in answer.choices]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(-1))) == 3


def test_adapters_by_name_version_and_alias(server: InferenceServer, adapters: dict[str, str]) -> None:
    cases = {"first": "first@2", "first@1": "first@1", "first@old": "first@1", "second": "second@1"}
    texts = set()
    for model, version in cases.items():
        answer = server.openai.completions.with_raw_response.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=8
        )
        assert answer.headers["x-loraplex-adapter"] == version
        completion = answer.parse()
        assert completion.model == model
        assert completion.choices[0].text == server.expected_text(PROMPT, 8, {adapters[version]: 1.0})
        texts.add(completion.choices[0].text)
    assert len(texts) == 3
    assert "x-loraplex-adapter" not in server.http.post("/v1/completions", json={"model": BASE, "prompt": "x"}).headers


def test_a_composition_of_adapters(server: InferenceServer, adapters: dict[str, str]) -> None:
    mix = [{"name": "first@1", "weight": 0.5}, {"name": "second"}, {"name": "first@old", "weight": 0.25}]
    answer = server.openai.chat.completions.with_raw_response.create(
        model=BASE, messages=MESSAGES, temperature=0, max_tokens=8, stream=True, extra_body={"adapters": mix}
    )
    assert answer.headers["x-loraplex-adapter"] == "first@1, second@1, first@1"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer.parse())
    weights = {adapters["first@1"]: 0.75, adapters["second@1"]: 1.0}
    assert text == server.expected_text(chat_ids(server, MESSAGES), 8, weights)
    nothing = server.openai.completions.create(
        model=BASE,
        prompt=PROMPT,
        temperature=0,
        max_tokens=8,
        extra_body={"adapters": [{"name": "first", "weight": 0}]},
    )
    assert nothing.choices[0].text == server.expected_text(PROMPT, 8)


def test_models(server: InferenceServer, adapters: dict[str, str]) -> None:
    models = {model.id: model for model in server.openai.models.list()}
    assert next(iter(models)) == BASE
    assert {"first", "second"} <= set(models)
    assert models[BASE].model_dump()["parent"] is None
    assert models["first"].model_dump()["parent"] == BASE
    assert server.openai.models.retrieve("first@old").id == "first@old"
    assert server.openai.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("first@9")
    seen: list[str] = []
    after = None
    while True:
        page = server.http.get("/v1/models", params={"limit": 1} | ({"after": after} if after else {})).json()
        assert len(page["data"]) == 1
        assert page["first_id"] == page["last_id"] == page["data"][0]["id"]
        seen.append(after := page["last_id"])
        if not page["has_more"]:
            break
    assert seen == list(models)


def test_a_page_of_the_base_alone_is_the_last_one(slow: InferenceServer) -> None:
    """This server has no adapters."""
    assert slow.http.get("/v1/adapters").json()["data"] == []
    page = slow.http.get("/v1/models", params={"limit": 1}).json()
    assert ([model["id"] for model in page["data"]], page["has_more"]) == ([BASE], False)
    page = slow.http.get("/v1/models", params={"limit": 1, "after": BASE}).json()
    assert (page["data"], page["has_more"]) == ([], False)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_with_echo(server: InferenceServer, stream: bool) -> None:
    arguments: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    arguments |= {"logprobs": 2, "echo": True}
    text, fields = "", {"tokens": [], "token_logprobs": [], "text_offset": []}
    if stream:
        parts = [chunk.choices[0] for chunk in server.openai.completions.create(**arguments, stream=True)]
    else:
        parts = server.openai.completions.create(**arguments).choices
    for part in parts:
        text += part.text
        for name, values in fields.items():
            values += getattr(part.logprobs, name)
    ids = server.tokenizer.encode_now([PROMPT])[0]
    assert text == PROMPT + server.expected_text(PROMPT, 12)
    assert len(fields["tokens"]) == len(fields["token_logprobs"]) == len(ids) + 12
    assert fields["token_logprobs"][0] is None
    assert all(isinstance(value, float) for value in fields["token_logprobs"][1:])
    for token, offset in zip(fields["tokens"], fields["text_offset"], strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echoed_special_tokens_stand_where_their_offsets_say(
    server: InferenceServer, stream: bool, skip: bool, as_ids: bool
) -> None:
    prompt = "<|im_start|>user\nhi \U0001f700<|im_end|>\n  <|im_start|>assistant\n"
    (ids,) = server.tokenizer.encode_now([prompt])
    arguments: dict[str, Any] = {"model": BASE, "prompt": ids if as_ids else prompt, "max_tokens": 3, "temperature": 0}
    arguments |= {"logprobs": 0, "echo": True, "extra_body": {"skip_special_tokens": skip}}
    text, tokens, offsets = "", [], []
    made = server.openai.completions.create(**arguments, stream=stream)
    for part in [chunk.choices[0] for chunk in made] if stream else made.choices:
        text += part.text
        tokens += part.logprobs.tokens
        offsets += part.logprobs.text_offset
    shown = server.tokenizer.decode(ids, skip_special_tokens=skip) if as_ids else prompt
    assert text == shown + server.expected_text(ids, 3)
    assert tokens == [server.tokenizer.token_text(id) for id in [*ids, *server.expected_ids(ids, 3)]]
    for token, start, end in zip(tokens, offsets, [*offsets[1:], len(text)], strict=True):
        silent = as_ids and skip and token.startswith("<|im_")
        assert token.startswith("bytes:") or text[start:end] == ("" if silent else token)


def test_scoring_a_prompt_generates_nothing(server: InferenceServer) -> None:
    answer = server.openai.completions.create(model=BASE, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["Once", " upon", " a", " time"]
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_a_prompt_as_long_as_the_model_takes_can_be_scored(server: InferenceServer) -> None:
    arguments: dict[str, Any] = {"model": BASE, "prompt": [5] * 512, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.openai.completions.create(**arguments)
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 512
    with pytest.raises(openai.BadRequestError, match="512"):
        server.openai.completions.create(**arguments | {"max_tokens": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server: InferenceServer, stream: bool) -> None:
    arguments: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    arguments |= {"logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = server.openai.chat.completions.create(**arguments, stream=True)
        entries = [e for chunk in chunks if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content or []]
    else:
        answer = server.openai.chat.completions.create(**arguments)
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    ids = server.expected_ids(chat_ids(server, MESSAGES), 20)
    assert [bytes(entry.bytes or []) for entry in entries] == [server.tokenizer.token_bytes(id) for id in ids]
    assert all(entry.logprob <= 0 for entry in entries)


def test_a_stop_token_ends_the_text_before_itself(server: InferenceServer) -> None:
    ids = server.expected_ids(PROMPT, 10)
    arguments: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 10}
    arguments["extra_body"] = {"stop_token_ids": [ids[4]]}
    answer = server.openai.completions.create(**arguments)
    assert answer.choices[0].text == server.tokenizer.decode(ids[:4])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5
    arguments["extra_body"]["include_stop_str_in_output"] = True
    assert server.openai.completions.create(**arguments).choices[0].text == server.tokenizer.decode(ids[:5])


def test_ignored_fields_and_nulls_are_taken(server: InferenceServer) -> None:
    body = {"model": BASE, "prompt": PROMPT, "user": "me", "temperature": 0, "top_p": None, "stop": None, "n": None}
    body |= {"best_of": 1, "suffix": None, "logit_bias": None, "response_format": {"type": "text"}, "max_tokens": 4}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == server.expected_text(PROMPT, 4)


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}, "strict": True}}


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_tools_reach_the_template(base_model_dir: Path, tmp_path: Path, file: str) -> None:
    model = shutil.copytree(base_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text("{% if tools %}{{ tools[0].function | tojson }}{% endif %}{{ messages[0].content }}")
    server = InferenceServer(model)
    try:
        server.start()
        ids = server.http.post("/tokenize", json={"messages": MESSAGES, "tools": [TOOL]}).json()["tokens"]
        assert server.tokenizer.decode(ids) == json.dumps(TOOL["function"]) + "Hello"
        body = {"model": BASE, "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 2}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_tools_that_the_template_would_not_show_are_refused(server: InferenceServer, path: str) -> None:
    body = {"model": BASE, "messages": MESSAGES}
    assert server.http.post(path, json=body | {"tools": []}).status_code == 200
    answer = server.http.post(path, json=body | {"tools": [TOOL]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("tools", "tools_not_supported")
    assert "no place for tools" in error["message"]
    if path != "/tokenize":  # the model is not to call any: nothing is missed
        unused = body | {"tools": [TOOL], "tool_choice": "none", "max_tokens": 1}
        assert server.http.post(path, json=unused).status_code == 200


def test_tokenize_and_detokenize(server: InferenceServer) -> None:
    answer = server.http.post("/tokenize", json={"model": BASE, "prompt": PROMPT, "return_token_strs": True}).json()
    assert answer["tokens"] == server.tokenizer.encode_now([PROMPT])[0]
    assert answer["count"] == 4
    assert "".join(answer["token_strs"]) == PROMPT
    assert answer["max_model_len"] == 512
    assert server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": PROMPT}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == chat_ids(server, [dict(message) for message in MESSAGES])
    text = server.http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\n")


def test_continuing_an_answer(server: InferenceServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer is"}]
    body = {"messages": messages, "continue_final_message": True}
    ids = server.http.post("/tokenize", json=body).json()["tokens"]
    assert server.tokenizer.decode(ids).endswith("assistant\nThe answer is")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequences(slow: InferenceServer, tmp_path: Path, stream: bool) -> None:
    slow.upload("left", tmp_path, 1)
    slow.wait_until_idle()
    body = {"model": "left", "prompt": PROMPT, "max_tokens": 500, "n": 4, "ignore_eos": True, "stream": stream}
    payload = json.dumps(body).encode()
    before = slow.metrics()
    with socket.create_connection(("127.0.0.1", slow.settings.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
        slow.wait_for_engine("sequences_running", 4)
    slow.wait_until_idle()
    after = slow.metrics()
    name = "loraplex_client_disconnects_total"
    assert after[name] == before[name] + 1
    name = "loraplex_engine_generated_tokens_total"
    assert 0 < after[name] - before[name] < 4 * 400
    assert slow.http.delete("/v1/adapters/left").status_code == 200


def test_request_ids_and_the_access_line(server: InferenceServer, adapters: dict[str, str]) -> None:
    body = {"model": "second", "prompt": PROMPT, "max_tokens": 3}
    given = server.http.post("/v1/completions", json=body, headers={"x-request-id": "trace-42"})
    assert given.headers["x-request-id"] == "trace-42"
    odd = server.http.get("/version", headers={"x-request-id": "a b\tc"})
    assert odd.headers["x-request-id"] not in ("", "a b\tc")
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "trace-42"]
    wanted = {"route": "/v1/completions", "status": 200, "method": "POST", "adapter": "second@1", "model": "second"}
    wanted |= {"prompt_tokens": 4, "completion_tokens": 3}
    assert wanted.items() <= line.items()
    assert line["ms"] > 0


def test_operation_routes(server: InferenceServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json()["status"] == "ready"
    version = server.http.get("/version").json()
    assert version["engine"]["architecture"] == "Simulated"
    assert version["engine"]["limits"]["max_positions"] == 512
    assert "/docs" in server.http.get("/").json()["docs"]
    assert server.http.get("/docs").status_code == 200
    schema = server.http.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/adapters", "/metrics"} <= set(schema["paths"])


async def test_the_async_client_and_many_at_once(server: InferenceServer, adapters: dict[str, str]) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

        async def one(number: int) -> str:
            model = ["first", "second", BASE][number % 3]
            stream = await client.completions.create(
                model=model, prompt=f"Number {number}", temperature=0, max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(one, range(30)))
    digest = {0: {adapters["first@2"]: 1.0}, 1: {adapters["second@1"]: 1.0}, 2: {}}
    assert texts == [server.expected_text(f"Number {i}", 20, digest[i % 3]) for i in range(30)]


def test_a_server_ends_on_a_signal(base_model_dir: Path) -> None:
    server = InferenceServer(base_model_dir).start()
    assert server.http.post("/v1/completions", json={"model": BASE, "prompt": "x"}).status_code == 200
    # uvicorn ends by the signal that it was sent, after an orderly shutdown.
    assert server.stop() in (0, -15)
