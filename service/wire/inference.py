"""Completions, chats, models and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from service.wire.adapters import segment
from service.wire.errors import BadRequest, ProtocolError
from service.wire.flows import Flow, Open, PageOf, Request, Streamed, json_of, pages, send
from service.wire.merges import Sources, weights
from service.wire.records import Answer, Model, Tokens, read_answer

Message = Mapping[str, Any]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Options(TypedDict, total=False):
    """What completions and chats take alike; all of it is optional. The REST reference says what each does."""

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    extra: Mapping[str, Any]
    """Fields of the request that this client does not know."""


class CompletionOptions(Options, total=False):
    echo: bool
    logprobs: int | None


class ChatOptions(Options, total=False):
    logprobs: bool
    top_logprobs: int | None
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool


def _body(prompt: Mapping[str, Any], model: str | None, adapters: Sources | None, options: Any) -> Flow[dict[str, Any]]:
    options = dict(options)
    extra = options.pop("extra", {})
    body = {"model": model or (yield from base_model()), **prompt, **options, **extra}
    if adapters is not None:
        body["adapters"] = [{"name": item["adapter"], "weight": item["weight"]} for item in weights(adapters)]
    return {key: value for key, value in body.items() if value is not None}


def _messages(messages: str | Sequence[Message], system: str | None) -> Mapping[str, Any]:
    found: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"messages": found if system is None else [{"role": "system", "content": system}, *found]}


def _whole(path: str, body: Mapping[str, Any]) -> Flow[Answer]:
    # An answer changes nothing on the server, so a request that was put off may be sent again.
    reply = yield from send(Request(method="POST", path=path, json=body))
    return read_answer(reply.json(), reply.headers.get("x-loraplex-adapter"))


def _not_streamed(options: Any, instead: str) -> None:
    """Raises BadRequest where a stream is asked for of what gives a whole answer: its events could not be read."""
    if {**options, **options.get("extra", {})}.get("stream"):
        raise BadRequest(400, f"This call gives the whole answer: `{instead}` gives a stream.", param="stream")


def _streamed(path: str, body: Mapping[str, Any]) -> Flow[Streamed]:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return Streamed((yield Open(Request(method="POST", path=path, json=body))))


def complete(
    prompt: Prompt, *, model: str | None = None, adapters: Sources | None = None, **options: Unpack[CompletionOptions]
) -> Flow[Answer]:
    """Continues a prompt: a text or token ids, or several. `model`: base, `adapter`, `adapter@3` or `adapter@alias`;
    None: the base, whose name is then asked for first. `adapters`: a mix of adapters for this one request, weights by
    name; `model` has to be the base."""
    _not_streamed(options, "complete_stream")
    body = yield from _body({"prompt": prompt}, model, adapters, options)
    return (yield from _whole("/v1/completions", body))


def complete_stream(
    prompt: Prompt, *, model: str | None = None, adapters: Sources | None = None, **options: Unpack[CompletionOptions]
) -> Flow[Streamed]:
    """`complete`, piece by piece."""
    body = yield from _body({"prompt": prompt}, model, adapters, options)
    return (yield from _streamed("/v1/completions", body))


def chat(
    messages: str | Sequence[Message],
    *,
    model: str | None = None,
    adapters: Sources | None = None,
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Flow[Answer]:
    """Answers a conversation; a text is one message of the user. `model` and `adapters` as in `complete`."""
    _not_streamed(options, "chat_stream")
    body = yield from _body(_messages(messages, system), model, adapters, options)
    return (yield from _whole("/v1/chat/completions", body))


def chat_stream(
    messages: str | Sequence[Message],
    *,
    model: str | None = None,
    adapters: Sources | None = None,
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Flow[Streamed]:
    """`chat`, piece by piece."""
    body = yield from _body(_messages(messages, system), model, adapters, options)
    return (yield from _streamed("/v1/chat/completions", body))


def models() -> PageOf[Model]:
    """Everything that can be called: the base model first, then the adapters by name."""
    return pages("/v1/models", Model.read, limit=1000)


def model(id: str) -> Flow[Model]:
    """One model: `base`, `adapter`, `adapter@3` or `adapter@alias`."""
    if not id:
        raise BadRequest(400, "The model's id is empty.", param="model")
    # The id stands in the path as it is: it may have a slash.
    return Model.read((yield from json_of("GET", "/".join(("/v1/models", *map(segment, id.split("/")))))))


def base_model() -> Flow[str]:
    """The name that the base model answers to."""
    page = yield from pages("/v1/models", Model.read, limit=1)(None)
    if not page.items or page.items[0].parent is not None:
        raise ProtocolError("/v1/models does not begin with the base model")
    return page.items[0].id


def tokenize(
    text: str | None = None, *, messages: Sequence[Message] | None = None, return_token_strs: bool = False
) -> Flow[Tokens]:
    """Token ids of a text, or of a conversation as its template writes it."""
    body = {"prompt": text, "messages": messages, "return_token_strs": return_token_strs}
    given = {key: value for key, value in body.items() if value is not None}
    return Tokens.read((yield from json_of("POST", "/tokenize", json=given)))


def detokenize(tokens: Sequence[int], *, skip_special_tokens: bool = False) -> Flow[str]:
    """The text of token ids."""
    body = {"tokens": list(tokens), "skip_special_tokens": skip_special_tokens}
    answer = yield from json_of("POST", "/detokenize", json=body)
    try:
        return str(answer["prompt"])
    except (TypeError, KeyError):
        raise ProtocolError("/detokenize did not answer with a text") from None
