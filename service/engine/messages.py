"""Every message between the API processes and the engine, and nothing else.

Transport: ZeroMQ over ipc://, the engine binds a ROUTER, each API process connects a DEALER. One frame per message,
msgpack of one of these tagged structs. Messages carry digests and weights, never adapter names. Where there are
tenants, a digest is followed by the number of the tenant that owns the adapter (adapters/keys.py), whoever uses it:
what lies on the device is the owner's. `resident_limits` are bytes by such numbers: what of an owner's adapters may lie
on the device at once from now on, None: as much as fits. Owners that are not named keep what they had.
"""

from __future__ import annotations

from typing import Any

import msgspec

from adapters.manifest import Manifest


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One adapter of a request: the key of its version and the weight of its delta (1.0 when alone)."""

    digest: str
    weight: float = 1.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Values are validated by the API; semantics are OpenAI's and vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: the engine draws one. Random numbers depend on (seed, position) alone, never on the batch."""
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence (end-of-sequence ids included, unless the request ignores them)."""
    logprobs: int | None = None
    """Number of alternatives to report for each generated token; 0: the chosen one alone; None: nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first (echo with logprobs)."""


# ---------------------------------------------------------------- API process -> engine


class Ping(msgspec.Struct, tag="ping"):
    """Sent by an API process every second; an API process not heard of for 10 s has its sequences aborted."""


class Submit(msgspec.Struct, tag="submit", kw_only=True):
    """One inference request: all sequences (prompts x n) are admitted together or the request is refused.

    Sequence `index` = prompt number * n + choice number. `salt` separates prefix caches of tenants.
    """

    request_id: str
    prompts: list[list[int]]
    n: int = 1
    adapters: tuple[AdapterRef, ...] = ()
    sampling: SamplingParams
    salt: str = ""
    tenant: str = ""
    """Who is charged for it (service/engine/fairness.py): any string that is one tenant's alone and stays the same."""
    tenant_weight: float = 1.0
    """The tenant's share against others' while they compete, > 0. The newest request's weight counts for the tenant."""
    resident_limits: dict[str, int | None] = {}
    priority: int = 0
    """Higher goes first, among the tenant's own requests alone; no priority takes anything from another tenant."""
    trace: str = ""
    """W3C traceparent of the request's span, if it is traced (tracing.py)."""
    received_ns: int = 0
    """Of a traced request: when the engine got it, in nanoseconds since 1970. Set by the engine itself."""


class Abort(msgspec.Struct, tag="abort"):
    """Frees the sequences of a request at once; unknown ids are ignored. No reply. `index` None: all of them."""

    request_id: str
    index: int | None = None


class Prefetch(msgspec.Struct, tag="prefetch"):
    """Hint: these adapters are about to be used. No reply."""

    digests: tuple[str, ...]
    resident_limits: dict[str, int | None] = {}


class LoadAdapter(msgspec.Struct, tag="load"):
    """Bring an adapter to the device. Reply when it is resident, or with the error."""

    call_id: str
    digest: str
    resident_limits: dict[str, int | None] = {}


class UnloadAdapter(msgspec.Struct, tag="unload"):
    """Drop an adapter from device and host memory as soon as no lease holds it. Reply when dropped.
    `forget`: the adapter was deleted, and nobody has its content any more. Waits for every accepted request that names
    the content, whoever its owner is, those that still have to fetch it included, and deletes its block file; nobody
    needs the adapter's own files after the reply."""

    call_id: str
    digest: str
    forget: bool = False


class QueryResidency(msgspec.Struct, tag="residency"):
    """Reply.value: {digest: "absent"|"loading"|"host"|"device"|"failed"} for the digests asked."""

    call_id: str
    digests: tuple[str, ...]


class TakeOccupancy(msgspec.Struct, tag="occupancy"):
    """Reply.value: {digest: [loads to the device, bytes there times seconds]} since the last such call of any API
    process: each figure is given once."""

    call_id: str


# ---------------------------------------------------------------- engine -> API process


class Limits(msgspec.Struct, frozen=True):
    """What the engine can take; the API refuses what can never fit with 400 before submitting it."""

    max_positions: int
    """Prompt plus generated tokens of one sequence."""
    max_sequences: int
    max_queue: int
    page_size: int
    pages: int
    max_adapters_per_request: int
    max_rank: int
    arena_bytes: int


class Ready(msgspec.Struct, tag="ready"):
    """Answer to the first Ping of an API process, and again after an engine restart."""

    engine_id: str
    """Random per engine start: a change tells that everything submitted before is lost."""
    manifest: Manifest
    limits: Limits
    device: str
    versions: dict[str, str]


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Answer to every further Ping."""

    engine_id: str
    step_age_s: float
    """How long the step in progress has been running; 0.0 when idle."""
    stats: dict[str, float]
    """Gauges and counters by metric name, see service/metrics.py."""


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):
    """Log-probability (natural, float) of one token and its alternatives, most probable first.

    Computed from the raw logits (before temperature, penalties and filters), as vLLM does."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one sequence. The last one of a sequence has a finish_reason: stop | length | error."""

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache (set on the first delta)."""


class Outputs(msgspec.Struct, tag="outputs"):
    """Everything one engine step has for one API process."""

    deltas: list[Delta]
    """At most one for each sequence, in the order of the batch: first tokens last."""


class Refused(msgspec.Struct, tag="refused"):
    """The request was not, or is no longer, served. Nothing of it is held any more.

    code: queue_full (HTTP 429) | too_large (400: can never fit) | resident_limit (413: its adapters' owner may not have
    so much on the device) | adapter_failed (503: could not be loaded) | not_finite (422: its logits are no numbers, as
    when an adapter overflows) | out_of_memory (503: in the step that computed it) | engine_error (500) |
    engine_unavailable (503: the engine is being replaced) | shutting_down (503).
    """

    request_id: str
    code: str
    message: str
    retry_after_s: float | None = None


class Reply(msgspec.Struct, tag="reply"):
    """Answer to a control call."""

    call_id: str
    error: str | None = None
    value: dict[str, Any] | None = None
    code: str = ""
    """With `error`, where that is one of Refused: resident_limit."""


ToEngine = Ping | Submit | Abort | Prefetch | LoadAdapter | UnloadAdapter | QueryResidency | TakeOccupancy
FromEngine = Ready | Heartbeat | Outputs | Refused | Reply

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
