"""Inference in OpenAI's shapes: models, completions, chat completions."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service import log, tracing
from service.api.auth import SINGLE_USER, Caller, CallerDep, Route, allow, caller_of, limit_error, reserve
from service.api.departure import Departure
from service.api.deps import EventStream, Services, ServicesDep
from service.api.errors import as_api_error
from service.api.failure import invalid
from service.api.formats import DONE, ChatFormat, CompletionFormat, Format, error_event
from service.api.generation import Generation, Job, Piece
from service.api.prompts import (
    capacity,
    chat_prompt,
    check_characters,
    check_ids,
    find_model,
    require_engine,
    unknown_model,
)
from service.api.schemas import AdapterWeight, ChatRequest, CompletionRequest, Sampled
from service.engine.messages import AdapterRef, Limits, SamplingParams
from service.metrics import Metrics
from service.named_metrics import NamedRequest
from service.store.errors import NotFound
from service.store.records import Adapter
from service.usage import Meter

router = APIRouter(tags=["inference"], route_class=Route)

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; a chat answer may be as long as the context allows."""
DEFAULT_SHARE = 8
"""Except where tokens per minute are limited: then a chat request that names no max_tokens gets this part of the limit,
as all that an answer may have is reserved when it is begun."""
_MODELS_AT_ONCE = 500


@dataclass(slots=True)
class Target:
    """What a request's model string and composition mean now."""

    adapters: tuple[AdapterRef, ...]
    resident_limits: dict[str, int | None]
    """Of the adapters' owners."""
    label: str
    """For the header x-loraplex-adapter: `name@version`, several separated by commas; empty for the base."""
    account: str
    """What its use is entered under: the names without versions, in order, joined with "+"."""


@router.post("/v1/completions", summary="Complete prompts")
@allow("infer", metered=True)
async def completions(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    caller = caller_of(request)
    prompts = [prompt for prompt in body.prompt if isinstance(prompt, list)]
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    target = await resolve(services, body, caller, ahead=bool(texts))
    if texts:
        for i, text in enumerate(texts):
            check_characters(services, text, f"prompt[{i}]" if len(texts) > 1 else "prompt")
        with tracing.part(request.scope["state"], "tokenise"):
            prompts = await services.tokenizer.encode(texts)
    limits = services.engine.limits
    vocabulary = services.engine.manifest.vocab_size
    for i, ids in enumerate(prompts):
        check_ids(ids, vocabulary, f"prompt[{i}]" if len(prompts) > 1 else "prompt")
    max_tokens = _granted(caller, body.max_tokens, COMPLETION_MAX_TOKENS)
    sampling = _sampling(services, body, max_tokens, logprobs=body.logprobs, echo=body.echo)
    check_lengths(prompts, sampling, body.n, limits, "prompt")
    job = _job(body, caller, target, prompts, sampling)
    job.continues, job.score_only = True, max_tokens == 0
    if body.echo:
        # A text is echoed as it came, with special tokens in it, whatever skip_special_tokens says of the answer.
        job.echo = texts or [
            services.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in prompts
        ]
        if texts and body.logprobs is not None:
            job.echo_starts = await services.tokenizer.starts(texts)
    return await _respond(request, services, body, job, target, CompletionFormat)


@router.post("/v1/chat/completions", summary="Answer a conversation")
@allow("infer", metered=True)
async def chat_completions(body: ChatRequest, request: Request, services: ServicesDep) -> Response:
    caller = caller_of(request)
    target = await resolve(services, body, caller, ahead=True)
    with tracing.part(request.scope["state"], "tokenise"):
        ids = await chat_prompt(services, body)
    limits = services.engine.limits
    check_ids(ids, services.engine.manifest.vocab_size, "messages")
    asked = body.max_completion_tokens or body.max_tokens
    room = capacity(limits) - len(ids)
    if (budget := caller.limits.tokens_per_minute) is not None:
        room = min(room, budget // DEFAULT_SHARE // body.n, (budget - len(ids)) // body.n)
    max_tokens = _granted(caller, asked, max(1, room))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(services, body, max_tokens, logprobs=logprobs)
    check_lengths([ids], sampling, body.n, limits, "messages")
    return await _respond(request, services, body, _job(body, caller, target, [ids], sampling), target, ChatFormat)


@router.get("/v1/models", summary="The base model and every adapter")
@allow("any")
async def list_models(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    after: str | None = None,
) -> dict[str, Any]:
    """All of them, unless `limit` is given: OpenAI's clients do not page here. The base model comes first."""
    data: list[dict[str, Any]] = []
    if after is None:
        data.append(_base_model(services))
    after = None if after == services.base_name else after
    ready = services.engine.last_ready
    fingerprints = ready.manifest.fingerprints if ready is not None else None
    more = True
    while more:
        count = _MODELS_AT_ONCE if limit is None else limit - len(data)
        page = await services.catalogue.list_adapters(
            max(1, count),
            after,
            fingerprints=fingerprints,
            tenant=caller.tenant,
            others=caller is not SINGLE_USER,
            viewer=caller.viewer,
        )
        if count == 0:  # the base model was all that was asked for: this page only says whether there is more
            more = bool(page.items)
            break
        data += [_adapter_model(services, caller, adapter) for adapter in page.items]
        more = page.has_more
        after = data[-1]["id"] if page.items else after
        if limit is not None:
            break
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


@router.get("/v1/models/{model:path}", summary="One model")
@allow("any")
async def get_model(model: str, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    found = await find_model(services, caller, model)
    if found is None:
        return _base_model(services)
    return _model(services, model, found.created_at, services.base_name)


async def resolve(services: Services, body: Sampled, caller: Caller, *, ahead: bool) -> Target:
    """The adapters of a request. ahead: the engine is told of them, and fetches those that it does not have, while the
    prompt is still being tokenised; where the request itself follows at once that would only keep the engine from it
    (0.3 ms to a first token, two shared cores)."""
    require_engine(services)
    wanted: Sequence[AdapterWeight] = body.adapters or ()
    composed = body.adapters is not None
    if body.model != services.base_name:
        if composed:
            message = f"'adapters' is only for the base model {services.base_name!r}; 'model' is {body.model!r}."
            raise invalid("adapters", message)
        wanted = [AdapterWeight(name=body.model, weight=1.0)]
    most = services.engine.limits.max_adapters_per_request
    if len(wanted) > most:
        raise invalid("adapters", f"'adapters' has {len(wanted)} entries, the limit is {most}.")
    weights: dict[str, float] = {}
    resident_limits: dict[str, int | None] = {}
    names: list[str] = []
    account: set[str] = set()
    for i, adapter in enumerate(wanted):
        try:
            found = await services.catalogue.resolve(adapter.name, caller.namespace, caller.viewer)
        except NotFound as exc:
            raise unknown_model(adapter.name, f"adapters[{i}].name" if composed else "model", exc) from exc
        found.require_base(*services.engine.manifest.fingerprints)
        # The same adapter twice is one with the sum of its weights.
        weights[found.key] = weights.get(found.key, 0.0) + adapter.weight
        resident_limits |= found.resident_limits
        said = caller.says(found.tenant, found.name)
        names.append(f"{said}@{found.version}")
        account.add(said)
    adapters = tuple(AdapterRef(key, weight) for key, weight in weights.items() if weight != 0.0)
    if adapters and ahead:
        services.engine.prefetch((adapter.digest for adapter in adapters), resident_limits)
    return Target(adapters, resident_limits, ", ".join(names), "+".join(sorted(account)))


def _granted(caller: Caller, asked: int | None, default: int) -> int:
    """Tokens that the answer may have. Raises ApiError 413 for more than the tenant's limit."""
    most = caller.limits.max_tokens
    if most is None:
        return default if asked is None else asked
    if asked is not None and asked > most:
        raise limit_error(413, caller, "max_tokens", most, f"; the request asks for {asked}")
    return min(default, most) if asked is None else asked


def check_lengths(prompts: list[list[int]], sampling: SamplingParams, n: int, limits: Limits, param: str) -> None:
    """Refuses what could never be served."""
    most = capacity(limits)
    for ids in prompts:
        if len(ids) + sampling.max_tokens > most:
            message = (
                f"This model's maximum context length is {most} tokens. However, you requested "
                f"{len(ids) + sampling.max_tokens} tokens ({len(ids)} in the prompt, {sampling.max_tokens} for the "
                "completion). Please reduce the length of the prompt or of the completion."
            )
            raise invalid(param, message, "context_length_exceeded")
    if sampling.min_tokens > sampling.max_tokens:
        message = f"'min_tokens' is {sampling.min_tokens}, more than the {sampling.max_tokens} that may be generated."
        raise invalid("min_tokens", message)
    if len(prompts) * n > limits.max_queue:
        message = f"The request has {len(prompts)} prompts x n {n} sequences; the limit is {limits.max_queue}."
        raise invalid("n" if n > 1 else "prompt", message, "too_large")


def _sampling(
    services: Services, body: Sampled, max_tokens: int, *, logprobs: int | None, echo: bool = False
) -> SamplingParams:
    vocabulary = services.engine.manifest.vocab_size
    for field, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        if wrong := [id for id in ids if not 0 <= id < vocabulary]:
            raise invalid(field, f"'{field}': token id {wrong[0]} is none of the vocabulary's 0 to {vocabulary - 1}.")
    eos = () if body.ignore_eos else services.tokenizer.eos_token_ids
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=min(max(0, body.top_k), vocabulary),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else body.seed % 2**63,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop_token_ids=tuple(dict.fromkeys([*body.stop_token_ids, *eos])),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )


def _job(body: Sampled, caller: Caller, target: Target, prompts: list[list[int]], sampling: SamplingParams) -> Job:
    return Job(
        # Not the x-request-id, which is the client's and may come twice.
        request_id=uuid.uuid4().hex,
        prompts=prompts,
        sampling=sampling,
        n=body.n,
        adapters=target.adapters,
        resident_limits=target.resident_limits,
        salt=caller.salt,
        tenant=caller.tenant,
        weight=caller.weight,
        priority=body.priority,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )


async def _respond(
    request: Request,
    services: Services,
    body: Sampled,
    job: Job,
    target: Target,
    shape: type[CompletionFormat] | type[ChatFormat],
) -> Response:
    state = request.scope["state"]
    state["model"], state["adapter"] = body.model, target.label or None
    state["job"], job.trace = job.request_id, tracing.traceparent(state)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    answer: Format = shape(
        job.request_id, body.model, len(job.prompts) * job.n, services.tokenizer, with_usage=with_usage
    )
    headers = {"x-loraplex-adapter": target.label} if target.label else {}
    caller = caller_of(request)
    sequences = len(job.prompts) * job.n
    most = sum(map(len, job.prompts)) + sequences * job.sampling.max_tokens
    reserve(request, caller, sequences=sequences, tokens=most)
    owner = caller.owner
    meter = services.recorder.open(owner, caller.key_id or "", target.account)
    named = None
    if services.metrics.named is not None:
        named = state["named"] = services.metrics.named.request(caller.tenant, target.account)
    generation = Generation(job, services.engine, services.tokenizer, _Observers(services.metrics, meter, named))
    meter.tokens = generation.usage
    departure = Departure(request.receive)
    if not body.stream:
        try:
            with departure.interrupts():
                await _gather(generation, answer)
        finally:
            departure.close()
            _account(services, state, generation, meter)
        return Response(answer.whole(generation.usage), 200, headers, "application/json")
    try:
        # The status is not sent before the engine has taken the request, so that a full queue is a 429.
        with departure.interrupts():
            first = await generation.__anext__()
    except BaseException:
        departure.close()
        _account(services, state, generation, meter)
        raise

    async def finish() -> None:
        await generation.aclose()
        _account(services, state, generation, meter)

    return EventStream(_events(state, generation, first, answer, with_usage), headers, departure, finish)


@dataclass(slots=True)
class _Observers:
    """Tokens are told to the metrics and to the tenant's account."""

    metrics: Metrics
    meter: Meter
    named: NamedRequest | None = None

    def first_token(self, seconds: float) -> None:
        self.metrics.first_token(seconds)
        self.meter.first_token(seconds)
        if self.named is not None:
            self.named.first_token(seconds)

    def tokens_done(self, tokens: int, seconds: float) -> None:
        self.metrics.tokens_done(tokens, seconds)


async def _gather(generation: Generation, answer: Format) -> None:
    try:
        async for piece in generation:
            answer.add(piece)
    finally:
        await generation.aclose()


async def _events(
    state: dict[str, Any],
    generation: Generation,
    first: Piece,
    answer: Format,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    try:
        yield answer.events(first)
        async for piece in generation:
            yield answer.events(piece)
        yield (answer.usage_event(generation.usage) if with_usage else b"") + DONE
    except Exception as exc:
        error = as_api_error(exc)
        state["error_code"] = error.code
        log.get(__name__).error("stream failed", error=str(exc), exc_info=exc if error.status == 500 else None)
        yield error_event(error.body())


def _account(services: Services, state: dict[str, Any], generation: Generation, meter: Meter) -> None:
    services.recorder.close_meter(meter)
    usage = generation.usage
    state["prompt_tokens"], state["completion_tokens"] = usage.prompt_tokens, usage.completion_tokens
    services.metrics.prompt_tokens.inc(usage.prompt_tokens)
    services.metrics.cached_tokens.inc(usage.cached_tokens)
    services.metrics.generated_tokens.inc(usage.completion_tokens)
    if (named := state.get("named")) is not None:
        named.done(usage)


def _base_model(services: Services) -> dict[str, Any]:
    return _model(services, services.base_name, services.started_at, None)


def _adapter_model(services: Services, caller: Caller, adapter: Adapter) -> dict[str, Any]:
    return _model(services, caller.says(adapter.tenant, adapter.name), adapter.created_at, services.base_name)


def _model(services: Services, name: str, created: float, parent: str | None) -> dict[str, Any]:
    ready = services.engine.last_ready
    return {
        "id": name,
        "object": "model",
        "created": math.floor(created),
        "owned_by": "loraplex",
        "parent": parent,
        "max_model_len": capacity(ready.limits) if ready is not None else None,
    }
