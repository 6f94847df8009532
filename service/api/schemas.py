"""The requests of the inference API. Unknown fields are refused, but for those of IGNORED."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.api.errors import FIELD_ERROR
from service.api.failure import shown

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
        "verbosity",
    }
)
"""Fields that clients send and that change nothing here."""

MAX_ADAPTERS = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_BIASES = 1024

# Refused with a reason of their own until they are served; null is the same as absent.
_LATER = (
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "structured_outputs",
)


MAX_FIELDS = 100
"""Of one JSON object. Every unknown field becomes an error of its own, of which a hostile body would have a million."""


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"should have at most {MAX_FIELDS} fields, it has {len(data)}")
        return data


def _refused(field: str, value: Any, reason: str) -> PydanticCustomError:
    """An error of one field, for validators that see the whole request."""
    context = {"field": field, "value": shown(value), "reason": reason}
    return PydanticCustomError(FIELD_ERROR, "{field}: {reason} (value {value})", context)


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("should be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"should have at most {MAX_STOPS} strings, it has {len(stops)}")
    if not all(stops):
        raise ValueError("should have no empty string")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"should have no string of more than {MAX_STOP_CHARACTERS} characters")
    if not all(_is_text(stop) for stop in stops):
        raise ValueError("should have no lone surrogates")
    return tuple(stops)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompts(value: Any) -> Any:
    """Every form of `prompt` as a list of texts or a list of id lists."""
    expected = "should be a string, a list of strings, a list of token ids or a list of lists of token ids"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(expected)
    if not value:
        raise ValueError("should not be empty")
    if type(value[0]) is int:
        value = [value]
    if all(isinstance(item, str) for item in value):
        if not all(map(_is_text, value)):
            raise ValueError("should have no lone surrogates")
        return value
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        return value
    raise ValueError(expected)


_TEXT_PART = frozenset({"type", "text", "id", "annotations", "cache_control", "prompt_cache_breakpoint"})
"""Fields of a text part; those behind the text are as those of IGNORED (clients of other services add them)."""


def _content(value: Any) -> str | None:
    """Text parts are joined by a newline, since templates that take a list are the fewer."""
    if value is None or isinstance(value, str):
        text = value
    elif isinstance(value, list):
        texts: list[str] = []
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"part {i} is of type {kind!r}, but only text parts are supported")
            if unknown := part.keys() - _TEXT_PART:
                raise ValueError(f"part {i} has the unknown field {shown(min(unknown))}")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part {i} should have a string as its text")
            texts.append(part["text"])
        text = "\n".join(texts)
    else:
        raise ValueError("should be a string or a list of text parts")
    if text is not None and not _is_text(text):
        raise ValueError("should have no lone surrogates")
    return text


def _few_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"should have at most {MAX_BIASES} token ids, it has {len(value)}")
    return value


def _canonical(value: Any) -> Any:
    """One spelling for each id, or one of two entries would be lost."""
    if isinstance(value, str) and not re.fullmatch("0|-?[1-9][0-9]*", value):
        raise ValueError("should be a token id in decimal digits, without leading zeros or anything around them")
    return value


def _text(value: str) -> str:
    if not _is_text(value):
        raise ValueError("should have no lone surrogates")
    return value


_StringOrStrings = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_Ids = {"type": "array", "items": {"type": "integer"}}
_PROMPT_SCHEMA = {"anyOf": [*_StringOrStrings["anyOf"], _Ids, {"type": "array", "items": _Ids}]}

Stops = Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(_StringOrStrings)]
Prompts = Annotated[list[str] | list[list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
_PARTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
Content = Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_PARTS_SCHEMA)]
Model = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, BeforeValidator(_canonical)]
Bias = Annotated[StrictFloat, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[TokenId, Bias], BeforeValidator(_few_biases), Field(json_schema_extra={"maxProperties": MAX_BIASES})
]


class AdapterWeight(Strict):
    """One adapter of a composition."""

    name: Model
    """adapter | adapter@3 | adapter@alias"""
    weight: StrictFloat = Field(1.0, ge=-1000, le=1000)


class StreamOptions(Strict):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None
    """OpenAI's padding against eavesdroppers; nothing is added here."""


class Sampled(Strict):
    """What completions and chat completions share. A field that is null has its default."""

    model: Model
    adapters: list[AdapterWeight] | None = Field(None, min_length=1, max_length=MAX_ADAPTERS)
    """Several adapters at once, each with its weight; only with `model` = the base model."""
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: StrictInt = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: StrictInt | None = Field(None, ge=0)
    min_tokens: StrictInt = Field(0, ge=0)
    temperature: StrictFloat = Field(1.0, ge=0, le=2)
    top_p: StrictFloat = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=-1)
    """-1 and 0: all."""
    min_p: StrictFloat = Field(0.0, ge=0, le=1)
    presence_penalty: StrictFloat = Field(0.0, ge=-2, le=2)
    frequency_penalty: StrictFloat = Field(0.0, ge=-2, le=2)
    repetition_penalty: StrictFloat = Field(1.0, gt=0, le=10)
    logit_bias: Biases = {}
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = ()
    stop_token_ids: tuple[StrictInt, ...] = Field((), max_length=64, fail_fast=True)
    include_stop_str_in_output: StrictBool = False
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    priority: StrictInt = Field(0, ge=-100, le=100)
    """Higher goes first, among the same tenant's requests."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Nulls and ignored fields go; what will be served later is refused for what it is."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None and key not in IGNORED}
        for field in _LATER:
            if field in data:
                raise _refused(field, data[field], "is not supported yet")
        response_format = data.pop("response_format", None)
        if response_format is not None and response_format != {"type": "text"}:
            raise _refused("response_format", response_format, "is not supported yet, only type text is")
        return data

    @model_validator(mode="after")
    def _fields_agree(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", self.stream_options.model_dump(), "is only for stream=true")
        return self


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Prompts
    echo: StrictBool = False
    logprobs: StrictInt | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: StrictInt | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise _refused("best_of", self.best_of, f"should be equal to n, which is {self.n}")
        if self.max_tokens == 0 and not self.echo:
            raise _refused("max_tokens", 0, "should be at least 1, but for echo=true")
        return self


class ToolCallFunction(Strict):
    name: str
    arguments: str | dict[str, Any] = ""
    parsed_arguments: Any = Field(None, exclude=True)
    """What the `openai` client's parse() adds; not for the template."""


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolCallFunction
    index: StrictInt | None = Field(None, exclude=True)
    """Of a streamed one, as clients put them together; not for the template."""


class Message(Strict):
    """One message of a conversation; also as the `openai` client gives it back."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, fail_fast=True)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    parsed: Any = Field(None, exclude=True)
    """As parsed_arguments."""

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role!r} should have content")
        return self

    def plain(self, *, developer_role: bool) -> dict[str, Any]:
        """What the chat template sees. `developer_role`: whether it knows that role, which is system's successor."""
        message = self.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
        if self.role == "developer" and not developer_role:
            message["role"] = "system"
        for call in message.get("tool_calls", ()):
            # The API carries arguments as JSON text, templates expect the object.
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                with contextlib.suppress(ValueError):
                    call["function"]["arguments"] = json.loads(arguments) if arguments else {}
        return message


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunction


class ChatFields(BaseModel):
    """What the prompt of a conversation is made of."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    tools: list[Tool] | None = Field(None, fail_fast=True)
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    """The answer goes on with the last message; then add_generation_prompt counts for nothing."""
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatFields, Sampled):
    """POST /v1/chat/completions."""

    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: Literal["none", "auto"] | None = None
    """Tools are shown to the model; calls are not parsed out of its answer yet."""

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _refused("top_logprobs", self.top_logprobs, "is only for logprobs=true")
        if self.max_tokens == 0:
            raise _refused("max_tokens", 0, "should be at least 1")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _refused("max_tokens", self.max_tokens, "should be absent where max_completion_tokens is given")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: of a text, or of a conversation."""

    model: Model | None = None
    prompt: Annotated[str, AfterValidator(_text)] | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    tools: list[Tool] | None = Field(None, fail_fast=True)
    add_special_tokens: StrictBool | None = None
    """Default: true for a text, false for a conversation, whose template writes them."""
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: StrictBool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _refused("prompt", self.prompt, "should be given, or else messages, but not both")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Model | None = None
    tokens: list[StrictInt] = Field(fail_fast=True)
    skip_special_tokens: StrictBool = False
