"""From a request to token ids: templates, checks; and the routes that show what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from service.api.auth import Caller, CallerDep, Route, allow
from service.api.deps import Services, ServicesDep
from service.api.failure import ApiError, invalid
from service.api.schemas import ChatRequest, DetokenizeRequest, Message, TokenizeRequest
from service.chat_template import ChatTemplateError
from service.engine.errors import EngineUnavailable
from service.engine.messages import Limits
from service.store.errors import NotFound
from service.store.records import Resolved

router = APIRouter(tags=["tokens"], route_class=Route)

# Rendering and encoding so much takes under a millisecond; more goes to a thread.
_INLINE_CHARACTERS = 2048


@router.post("/tokenize", summary="Token ids of a text or of a conversation")
@allow("any", metered=True)
async def tokenize(body: TokenizeRequest, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    await find_model(services, caller, body.model)
    tokenizer = services.tokenizer
    if body.messages is not None:
        ids = await chat_prompt(services, body, add_special_tokens=bool(body.add_special_tokens))
    else:
        check_characters(services, body.prompt or "", "prompt")
        with_special = body.add_special_tokens is not False
        (ids,) = await tokenizer.encode([body.prompt or ""], add_special_tokens=with_special)
    ready = services.engine.last_ready
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": ready.limits.max_positions if ready else None,
        "tokens": ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(id) for id in ids]
    return answer


@router.post("/detokenize", summary="The text of token ids")
@allow("any", metered=True)
async def detokenize(body: DetokenizeRequest, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    await find_model(services, caller, body.model)
    check_ids(body.tokens or [0], services.tokenizer.vocab_size, "tokens")
    text = await asyncio.to_thread(services.tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens)
    return {"prompt": text}


async def find_model(services: Services, caller: Caller, model: str | None) -> Resolved | None:
    """The adapter that a model string means to the caller, also while there is no engine; None: the base model, which
    is also meant where none is named. Raises ApiError 404, WrongBase."""
    if model is None or model == services.base_name:
        return None
    try:
        found = await services.catalogue.resolve(model, caller.namespace, caller.viewer)
    except NotFound as exc:
        raise unknown_model(model, "model", exc) from exc
    if (ready := services.engine.last_ready) is not None:
        found.require_base(*ready.manifest.fingerprints)
    return found


def unknown_model(model: str, param: str, exc: NotFound) -> ApiError:
    return ApiError(404, f"The model {model!r} does not exist: {exc}", code="model_not_found", param=param)


async def chat_prompt(
    services: Services, body: ChatRequest | TokenizeRequest, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a conversation. The template writes the special tokens itself."""
    tokenizer = services.tokenizer
    wanted = body.tools and getattr(body, "tool_choice", None) != "none"
    if wanted and tokenizer.chat and not tokenizer.chat.takes_tools:
        # The model would answer as if there were none, and the client would wait for calls that never come.
        message = f"'tools' has {len(body.tools or ())} entries, but the model's chat template has no place for tools."
        raise invalid("tools", message, "tools_not_supported")
    messages: Sequence[Message] = body.messages or ()
    developer_role = tokenizer.chat.names("developer")
    plain = [message.plain(developer_role=developer_role) for message in messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None

    def render() -> list[int]:
        text = tokenizer.chat.render(
            plain,
            tools=tools,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        check_characters(services, text, "messages")
        return tokenizer.encode_now([text], add_special_tokens=add_special_tokens)[0]

    try:
        if not tools and sum(len(message.content or "") for message in messages) <= _INLINE_CHARACTERS:
            return render()
        return await asyncio.to_thread(render)
    except ChatTemplateError as exc:
        raise invalid("messages", str(exc), "chat_template_error") from exc


def capacity(limits: Limits) -> int:
    """Tokens that one sequence can have, prompt and answer."""
    return min(limits.max_positions, limits.pages * limits.page_size)


def check_characters(services: Services, text: str, param: str) -> None:
    """Refuses a text that is too long whatever its tokens are: to find them takes 500 bytes of memory for each."""
    ready, most = services.engine.last_ready, services.tokenizer.characters_per_token
    if ready is not None and most is not None and len(text) > capacity(ready.limits) * most:
        message = (
            f"This model's maximum context length is {capacity(ready.limits)} tokens. However, '{param}' has "
            f"{len(text)} characters, which are at least {len(text) // most} tokens. Please reduce its length."
        )
        raise invalid(param, message, "context_length_exceeded")


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """Refuses an empty prompt and ids that the model does not have."""
    if not ids:
        raise invalid(param, f"'{param}' has no tokens.", "empty_prompt")
    if min(ids) < 0 or max(ids) >= vocabulary:
        at, wrong = next((at, id) for at, id in enumerate(ids) if not 0 <= id < vocabulary)
        message = f"'{param}': token id {wrong} at position {at} is not in the vocabulary of {vocabulary}."
        raise invalid(param, message, "invalid_token_id")


def require_engine(services: Services) -> None:
    """Raises EngineUnavailable where a request could only wait for its failure."""
    engine = services.engine
    if not engine.healthy:
        raise EngineUnavailable("it does not answer" if engine.last_ready is not None else "it is still starting")
