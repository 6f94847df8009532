"""Which requests are let into the queue. No torch.

One tenant alone may fill the whole queue (`max_queue` sequences). It does not take away what others would wait in: each
may always have its share waiting, `max_queue` by weight among the tenants that wait, or one request if it has none.
So the queue can become longer than `max_queue`, by at most a share or one request for each tenant that came
while it was full; nothing that was accepted is refused later.
"""

from __future__ import annotations

import math

from adapters.manifest import Manifest
from service.engine.fairness import Tenants
from service.engine.kv_cache import PagePool
from service.engine.messages import Limits, Refused, Submit


def too_large(request: Submit, limits: Limits, manifest: Manifest, pool: PagePool) -> str | None:
    """Why the request can never be served, whatever else runs. An id that the model does not know would fail the
    whole step, with everybody else's requests in it."""
    new = len(request.prompts) * request.n
    vocabulary = range(manifest.vocab_size)
    ids = (*request.sampling.stop_token_ids, *request.sampling.logit_bias)
    if new < 1 or new > limits.max_queue:
        return f"{new} sequences in one request, between 1 and {limits.max_queue} are served"
    if not 0.0 < request.tenant_weight < math.inf:
        return f"tenant_weight is {request.tenant_weight}, it must be a number above 0"
    if len(request.adapters) > limits.max_adapters_per_request:
        return f"{len(request.adapters)} adapters, at most {limits.max_adapters_per_request} are served"
    if any(each not in vocabulary for each in ids):
        return f"stop_token_ids or logit_bias have token ids outside 0..{vocabulary[-1]}"
    for number, prompt in enumerate(request.prompts):
        total = len(prompt) + request.sampling.max_tokens
        if not prompt:
            return f"prompt {number} has no tokens"
        if min(prompt) not in vocabulary or max(prompt) not in vocabulary:
            return f"prompt {number} has token ids outside 0..{vocabulary[-1]}"
        if total > limits.max_positions:
            return f"prompt {number} and max_tokens are {total} tokens, at most {limits.max_positions} are served"
        if pool.pages_for(total) > pool.num_pages:
            room = pool.num_pages * pool.page_size
            return f"prompt {number} and max_tokens are {total} tokens, the KV cache holds {room}"
    return None


def queue_full(request: Submit, max_queue: int, tenants: Tenants, seconds_each: float) -> Refused | None:
    """The refusal of a request for which there is no room in the queue; `seconds_each`: what one sequence takes of the
    engine's time, on average, to say when to come back."""
    new, waiting = len(request.prompts) * request.n, tenants.num_waiting
    if waiting + new <= max_queue:
        return None
    tenant = tenants.get(request.tenant)
    mine = len(tenant.waiting) if tenant is not None else 0
    if mine < waiting:  # others wait too
        weights = sum(other.weight for other in tenants.queued.values() if other is not tenant)
        share = max_queue * request.tenant_weight / (weights + request.tenant_weight)
        if mine == 0 or mine + new <= share:
            return None
    after = min(60.0, max(1.0, seconds_each * (waiting + new - max_queue)))
    return Refused(request.request_id, "queue_full", f"{waiting} sequences are waiting already", after)
