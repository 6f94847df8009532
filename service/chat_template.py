"""Chat templates as transformers renders them (transformers/utils/chat_template_utils.py), without importing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplateError(ValueError):
    """The template is missing or refuses these messages; str() is fit for the client."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training masks; when serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` for templates: the constructor and nothing that leads out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    return environment


class ChatTemplate:
    """The templates of one model ("default" and perhaps "tool_use") and the special tokens that they may name."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, Any]) -> None:
        self._sources = dict(templates)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        except jinja2.TemplateSyntaxError as exc:
            raise ChatTemplateError(
                f"the model's chat template is not valid: line {exc.lineno}: {exc.message}"
            ) from exc
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, Any]) -> ChatTemplate:
        """From chat_template.jinja, additional_chat_templates/*.jinja, chat_template.json or tokenizer_config.json's
        field: whichever the model's folder has, newest convention first."""
        templates: dict[str, str] = {}
        field = config.get("chat_template")
        if field is None and (folder / "chat_template.json").is_file():
            field = json.loads((folder / "chat_template.json").read_text("utf-8")).get("chat_template")
        if isinstance(field, str):
            templates["default"] = field
        elif isinstance(field, list):
            templates.update({entry["name"]: entry["template"] for entry in field})
        if (path := folder / "chat_template.jinja").is_file():
            templates["default"] = path.read_text("utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text("utf-8")
        return cls(templates, special_tokens)

    def __bool__(self) -> bool:
        return bool(self._templates)

    def names(self, word: str) -> bool:
        """Whether any template mentions `word`, such as a role."""
        return any(word in source for source in self._sources.values())

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template that a conversation with tools is rendered by reads them."""
        source = self._sources.get("tool_use", self._sources.get("default", ""))
        return "tools" in jinja2.meta.find_undeclared_variables(_environment().parse(source))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. `messages` hold plain JSON data. Raises ChatTemplateError."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatTemplateError("the model has no chat template: use /v1/completions")
        variables = variables or {}
        if clash := _RESERVED & variables.keys():
            raise ChatTemplateError(f"{min(clash)!r} cannot be given as a variable of the chat template")
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            messages[-1] = _marked(messages[-1])
        try:
            text = self._templates[name].render(
                **{**self._special_tokens, **variables},
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as exc:
            raise ChatTemplateError(f"the model's chat template refuses the messages: {exc}") from exc
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as exc:
            raise ChatTemplateError(f"the model's chat template cannot take these messages: {exc}") from exc
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise ChatTemplateError("the messages have lone surrogates, which are no text") from exc
        return _cut(text, messages[-1]["content"]) if continue_final_message else text


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        raise ChatTemplateError("continue_final_message needs a final message with content")
    return {**message, "content": content + _CONTINUE}


def _cut(text: str, content: str) -> str:
    """`text` up to where the final message ends; whether the template kept trailing spaces decides where that is."""
    at = text.rfind(_CONTINUE.strip())
    if at < 0 or content.removesuffix(_CONTINUE).strip() not in text:
        raise ChatTemplateError("continue_final_message: the model's chat template changes the final message")
    return text[:at] if text[at : at + len(_CONTINUE)] == _CONTINUE else text[:at].rstrip()
