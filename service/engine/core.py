"""The engine: requests in, tokens out, one step at a time. Single-threaded; knows no sockets and no torch.

`step` is the whole of it: place adapters, schedule, launch, collect, reply. Everything else here is what happens to a
request before its first step (submit) and after its last.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import AccountTooSmall, AdapterTooLarge
from adapters.manifest import Manifest
from adapters.residency import Residency
from service.engine.budgets import Filling, tokens_per_step
from service.engine.calls import Calls
from service.engine.config import EngineConfig
from service.engine.errors import EngineBroken, EngineError, IntegrityError
from service.engine.fairness import Prices
from service.engine.kv_cache import PagePool, cache_root
from service.engine.messages import (
    Abort,
    AdapterRef,
    Delta,
    FromEngine,
    Limits,
    Outputs,
    Ping,
    Refused,
    Submit,
    ToEngine,
)
from service.engine.patience import Kind, Patience, kind_of
from service.engine.permits import queue_full, too_large
from service.engine.request import PENDING, Batch, Sampled, Sequence, State
from service.engine.scheduler import Scheduler
from service.engine.tracing import SequenceTracer, Timeline

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""After so many failed steps in a row the device, or the code, is beyond repair."""
NOT_FINITE = (
    "the logits of this request are not finite numbers: an adapter, its weight, or a penalty is too large for the "
    "model's dtype"
)
_RUNNING, _FINISHED = State.RUNNING, State.FINISHED  # faster than by the enumeration, once for each sequence and step
_SEED_MASK = 2**63 - 1
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's plain RuntimeErrors say of it."""

Adapters = tuple[AdapterRef, ...]
Key = tuple[bytes, str]
"""(client, request id)"""


Collect = Callable[[], list[Sampled | None]]
"""Waits for a launched step: one result per item, None where nothing is sampled. Appends to `prompt_logprobs`."""


class Runner(Protocol):
    """Executes batches, in the order of their launches. Reads its sequences while it launches, and changes nothing of
    them but `prompt_logprobs`, when the step is collected."""

    @property
    def ahead(self) -> bool:
        """The device works while this process goes on: `launch` only queues the step. Sequences may then end in a
        PENDING token that the launch before has drawn, and at most two steps are launched and not collected."""

    def launch(self, batch: Batch) -> Collect: ...


@dataclass(slots=True)
class Flight:
    """A step that was launched."""

    batch: Batch
    kind: Kind
    collect: Collect
    started: float
    """time.monotonic() when the device could begin with it."""
    began: float
    """The same by the engine's clock."""


def merged(adapters: Adapters) -> Adapters:
    """An adapter named twice counts once, with the sum of its weights; one whose weight is 0 not at all. By digest: a
    mix is summed up in this order, so that it is rounded alike however it was written, as the prefix cache assumes."""
    weights: dict[str, float] = {}
    for each in adapters:
        weights[each.digest] = weights.get(each.digest, 0.0) + each.weight
    return tuple(AdapterRef(digest, weight) for digest, weight in sorted(weights.items()) if weight != 0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or of the device. By name and text, because this module does not import torch."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class Engine:
    """All requests of all API processes. `send(client, message)` must not block."""

    def __init__(
        self,
        config: EngineConfig,
        manifest: Manifest,
        limits: Limits,
        runner: Runner,
        pool: PagePool,
        residency: Residency,
        send: Callable[[bytes, FromEngine], None],
        *,
        max_tokens_per_step: int | None = None,
        max_prefill_tokens_per_step: int | None = None,
        prices: Prices | None = None,
        filling: Filling | None = None,
        backlog: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """The budgets of a step: as given, else as configured, else by device. `prices`: else the model's. `filling`:
        how steps are padded. `backlog`: as for the scheduler. `clock`: times steps for the scheduler. `on_close` ends
        what the parts run beside the step loop (the loader's threads and worker)."""
        self.close = on_close
        self._clock = clock
        self.config = config
        self.manifest = manifest
        self.limits = limits
        self.runner = runner
        self.pool = pool
        self.residency = residency
        self.scheduler = Scheduler(
            pool,
            residency,
            max_sequences=limits.max_sequences,
            max_tokens_per_step=max_tokens_per_step or config.max_tokens_per_step or tokens_per_step(config.device),
            max_prefill_tokens_per_step=max_prefill_tokens_per_step or config.max_prefill_tokens_per_step,
            prices=prices or Prices.of(manifest),
            filling=filling,
            backlog=backlog,
        )
        self.calls = Calls(residency, send)
        self.draining = False
        """Set: new requests are refused with shutting_down."""
        self.step_started: float | None = None
        """time.monotonic() of the step in progress; read by the thread that answers Pings."""
        self.tracer: SequenceTracer | None = None
        """Set: sequences of traced requests have a Timeline, and are handed to it when they end."""
        self._send = send
        self._flight: Flight | None = None
        self._patience = Patience()
        self._requests: dict[Key, dict[int, Sequence]] = {}
        self._outbox: defaultdict[bytes, list[Delta]] = defaultdict(list)
        self._arrivals = itertools.count()
        self._random = random.SystemRandom()
        self._failed_steps = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._generated = 0
        self._prefilled = 0
        self._finished = 0
        self._out_of_memory = 0

    # ------------------------------------------------------------ the step

    def step(self) -> bool:
        """Run one step; False if nothing can be done before a message or the loader comes. Raises EngineBroken and
        IntegrityError: end the process.

        Where the device works beside this process, this step is launched before the one before it is collected: all
        that Python does for a step is done while the device is busy with another. A sequence that turns out to have
        ended is then computed once more for nothing. Whoever calls this as soon as it returns keeps newcomers waiting
        for two steps; `spare` says for how long to listen to them first."""
        begin = self._clock()
        self.residency.poll()
        self.calls.answer(self._named)
        batch = self.scheduler.schedule()
        more = self.residency.poll()  # begins what was just asked for, before the device is busy with this step
        self._refuse_failed()
        before, self._flight = self._flight, None
        if not batch.items and before is None:
            return more
        after = failure = None
        if batch.items:
            started, began = time.monotonic(), self._clock()
            self.step_started = started if before is None else before.started
            try:
                collect = self.runner.launch(batch)
                kind = kind_of(batch.num_tokens - len(batch.items), len(batch.items))
                after = Flight(batch, kind, collect, started, began)
                self._patience.launched(self._clock() - begin)
            except Exception as error:
                failure = error
        if before is not None:
            self._land(before, after)
        if failure is not None:
            self._give_up(batch, failure)
        if after is not None:
            self._assume(after)
            if self.runner.ahead:
                self._flight = after
            else:
                self._land(after)
        self.step_started = None if self._flight is None else self._flight.started
        return True

    def advance_loads(self) -> None:
        """Between two steps: takes what the loader has finished, answers who waits for it, and begins what comes next.
        A load goes from file to host memory to the device: otherwise each of its stages would wait for a step."""
        self.residency.poll()
        self.calls.answer(self._named)
        self.residency.poll()

    @property
    def spare(self) -> float:
        """Seconds for which the device needs no further step; not positive: launch the next one."""
        flight = self._flight
        return 0.0 if flight is None else self._patience.until(flight.kind, flight.began) - self._clock()

    def _assume(self, flight: Flight) -> None:
        """The books as if the step had been collected already, but for the tokens that it draws."""
        for item in flight.batch.items:
            seq = item.seq
            if seq.state is not _RUNNING:
                continue  # the step before was its last
            if item.count > 1 or seq.num_computed < seq.num_prompt:
                self._prefilled += item.count
                if seq.timeline is not None:
                    seq.timeline.begun(flight.started)
            seq.num_computed += item.count
            # If the next token ends it whatever it is, no step need be prepared for the one after.
            if item.samples and len(seq.tokens) + 1 < seq.end:
                seq.tokens.append(PENDING)

    def _land(self, flight: Flight, after: Flight | None = None) -> None:
        """Collects a step and tells its clients. `after`: the device goes on with that one."""
        asked = self._clock()
        try:
            sampled = flight.collect()
            if [result is not None for result in sampled] != [item.samples for item in flight.batch.items]:
                raise EngineError("the runner's results do not match its batch")
        except Exception as error:
            ended = self._clock()
            self._give_up(flight.batch, error)
        else:
            ended = self._clock()
            self._failed_steps = 0
            self._advance(flight.batch, sampled)
            self._reply()
            if self.runner.ahead:
                self._patience.took(flight.kind, ended - flight.began, ended - asked)
            self.scheduler.took(flight.batch, ended - flight.began, self._patience.lead if self.runner.ahead else 0.0)
            self._steps += 1
        now = time.monotonic()
        self._step_seconds += now - flight.started
        if after is not None:
            after.started, after.began = now, ended

    def _advance(self, batch: Batch, sampled: list[Sampled | None]) -> None:
        """The tokens of a step, for their sequences and clients. Written for speed: all that run go through here in
        every step."""
        size, outbox = self.pool.page_size, self._outbox
        for item, result in zip(batch.items, sampled, strict=True):
            seq = item.seq
            state = seq.state
            if state is _FINISHED:
                continue
            if result is not None and result.token_id < 0:  # before its pages can be found by others
                self._refuse((seq.client, seq.request_id), "not_finite", NOT_FINITE)
                continue
            if result is None:
                continue  # nobody knows yet whether what it has computed are numbers
            # If a page has become full, or a prompt has ended. One that was preempted meanwhile has no pages.
            done = seq.num_computed
            if (done % size < item.count or done <= seq.num_prompt) and state is _RUNNING:
                self.pool.commit(seq)
            tokens, token = seq.tokens, result.token_id
            if tokens[-1] == PENDING:
                tokens[-1] = token
            elif len(tokens) < seq.end:
                tokens.append(token)
            delta = Delta(seq.request_id, seq.index, [token])
            if result.logprob is not None:
                delta.logprobs = [result.logprob]
            if len(tokens) <= seq.num_prompt + 1:
                self._first(seq, delta)
            # min_tokens needs no care here: before it, the sampler draws no stop token.
            if token in seq.sampling.stop_token_ids and delta.token_ids:
                delta.finish_reason = "stop"
            elif len(tokens) >= seq.end:
                delta.finish_reason = "length"
            outbox[seq.client].append(delta)
            if delta.finish_reason is not None:
                seq.finish_reason = delta.finish_reason
                self._finished += 1
                self._remove(seq)

    def _first(self, seq: Sequence, delta: Delta) -> None:
        """What comes with a sequence's first token, or instead of it."""
        if seq.end == seq.num_prompt:  # only the prompt's log-probabilities are wanted
            delta.token_ids, delta.logprobs = [], None
        delta.cached_tokens = seq.cached_tokens
        delta.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        if seq.timeline is not None:
            seq.timeline.token()

    def _reply(self) -> None:
        """One message per API process and step."""
        for client, deltas in self._outbox.items():
            self._generated += sum([len(delta.token_ids) for delta in deltas])
            self._send(client, Outputs(deltas))
        self._outbox.clear()

    def _give_up(self, batch: Batch, error: Exception) -> None:
        """The step failed: so do its requests, and nothing else."""
        self._steps += 1
        self._failed_steps += 1
        # What the failed step held, on the device above all, is free before the next one.
        traceback.clear_frames(error.__traceback__)
        jobs = list(dict.fromkeys(item.seq.request_id for item in batch.items))
        log.error("step of %d tokens failed", batch.num_tokens, exc_info=error, extra={"jobs": jobs})
        for item in batch.items:
            if item.seq.timeline is not None:
                item.seq.timeline.begun(self.step_started)
        code, message = "engine_error", "the engine failed while it computed this request"
        if is_out_of_memory(error):
            self._out_of_memory += 1
            code, message = "out_of_memory", "the engine ran out of memory while it computed this request"
        for key in dict.fromkeys((item.seq.client, item.seq.request_id) for item in batch.items):
            if key in self._requests:  # the step before may have been its last
                self._refuse(key, code, message)
        self.check_integrity()
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise EngineBroken(f"{self._failed_steps} steps in a row failed") from error

    # ------------------------------------------------------------ requests

    def handle(self, client: bytes, message: ToEngine) -> None:
        """One message of an API process."""
        match message:
            case Submit():
                self.submit(client, message)
            case Abort(request_id, index):
                self.abort(client, request_id, index)
            case Ping():
                pass  # the process answers it
            case _:
                self.calls.handle(client, message)

    def submit(self, client: bytes, request: Submit) -> None:
        """Queue every sequence of a request, or refuse it whole."""
        key = (client, request.request_id)
        if key in self._requests:  # the sender cannot tell the two apart, so neither can go on
            self._refuse(key, "engine_error", f"request id {request.request_id!r} was in use")
            return
        refused = self._refusal(request)
        if refused is not None:
            self._send(client, refused)
            return
        adapters = merged(request.adapters)
        self.calls.limit(request.resident_limits)
        self.residency.prefetch(tuple(ref.digest for ref in adapters))
        root = cache_root(request.salt, adapters)
        sequences: dict[int, Sequence] = {}
        for number, prompt in enumerate(request.prompts):
            for choice in range(request.n):
                seq = self._sequence(client, request, number * request.n + choice, prompt, adapters, root)
                self.scheduler.add(seq, sequences.get(number * request.n), request.tenant_weight)
                sequences[seq.index] = seq
        self._requests[key] = sequences

    def _sequence(
        self, client: bytes, request: Submit, index: int, prompt: list[int], adapters: Adapters, root: bytes
    ) -> Sequence:
        sampling = request.sampling
        seed = self._random.getrandbits(63) if sampling.seed is None else sampling.seed + index % request.n
        return Sequence(
            request_id=request.request_id,
            index=index,
            client=client,
            tokens=list(prompt),
            num_prompt=len(prompt),
            sampling=sampling,
            seed=seed & _SEED_MASK,
            adapters=adapters,
            cache_root=root,
            arrival=float(next(self._arrivals)),
            tenant=request.tenant,
            priority=request.priority,
            timeline=self._timeline(request) if request.trace else None,
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
        )

    def _timeline(self, request: Submit) -> Timeline | None:
        return None if self.tracer is None else Timeline(request.trace, request.received_ns or time.time_ns())

    def _refusal(self, request: Submit) -> Refused | None:
        if self.draining:
            return Refused(request.request_id, "shutting_down", "the engine is shutting down", 1.0)
        reason = too_large(request, self.limits, self.manifest, self.pool)
        if reason is not None:
            return Refused(request.request_id, "too_large", reason)
        each = self._step_seconds / self._finished if self._finished else 0.0
        return queue_full(request, self.limits.max_queue, self.scheduler.tenants, each)

    def abort(self, client: bytes, request_id: str, index: int | None = None) -> None:
        """Free a request's sequences, or one; nothing is said to the client."""
        sequences = self._requests.get((client, request_id), {})
        for seq in list(sequences.values()):
            if index is None or seq.index == index:
                seq.finish_reason = "abort"
                self._remove(seq)

    def drop_client(self, client: bytes) -> None:
        """The API process is gone: so is everything it asked."""
        for owner, request_id in list(self._requests):
            if owner == client:
                self.abort(client, request_id)
        self.calls.drop_client(client)

    def refuse_all(self, code: str, message: str) -> None:
        """Give up every request."""
        for key in list(self._requests):
            self._refuse(key, code, message)

    def _refuse(self, key: Key, code: str, message: str) -> None:
        client, request_id = key
        for seq in self._requests.get(key, {}).values():
            if seq.timeline is not None:
                seq.timeline.code = code
        self.abort(client, request_id)
        self._send(client, Refused(request_id, code, message))

    def _refuse_failed(self) -> None:
        failed = list(self.scheduler.failed)
        self.scheduler.failed.clear()
        for seq, error in failed:
            if seq.finish_reason is None:  # a sibling may have taken the request away already
                code = "too_large" if isinstance(error, AdapterTooLarge) else "adapter_failed"
                code = "resident_limit" if isinstance(error, AccountTooSmall) else code
                self._refuse((seq.client, seq.request_id), code, str(error))

    def _remove(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        if seq.timeline is not None and self.tracer is not None:
            self.tracer.ended(seq, seq.timeline)
        key = (seq.client, seq.request_id)
        del self._requests[key][seq.index]
        if not self._requests[key]:
            del self._requests[key]

    def _named(self) -> set[str]:
        """Digests of all adapters of accepted requests."""
        return {ref.digest for asked in self._requests.values() for ref in next(iter(asked.values())).adapters}

    # ------------------------------------------------------------ what is going on

    @property
    def busy(self) -> bool:
        """Some request is not finished."""
        return bool(self._requests)

    @property
    def expecting(self) -> bool:
        """Something waits for the loader, so step() must be called again soon though nothing runs."""
        return self.calls.expecting or self.scheduler.num_waiting > 0

    def stats(self) -> dict[str, float]:
        """Gauges and, ending in _total, counters since the start; the residency's among them."""
        scheduler, pool = self.scheduler, self.pool
        fetching = scheduler.num_fetching
        stats: dict[str, float] = {
            "sequences_running": len(scheduler.running),
            "sequences_waiting": scheduler.num_waiting - fetching,
            "sequences_fetching": fetching,
            "kv_pages_used": pool.num_used,
            "kv_pages": pool.num_pages,
            "kv_pages_cached": pool.num_cached,
            "prefix_hit_tokens_total": pool.hit_tokens,
            "prefix_query_tokens_total": pool.query_tokens,
            "preemptions_total": scheduler.preemptions,
            "steps_total": self._steps,
            "step_seconds_total": self._step_seconds,
            "steps_late_total": self._patience.late,
            "steps_backlog_total": scheduler.steps_in_backlog,
            "generated_tokens_total": self._generated,
            "prefill_tokens_total": self._prefilled,
            "out_of_memory_total": self._out_of_memory,
        }
        stats.update(self.residency.stats())
        return stats

    def check_integrity(self) -> None:
        """Raises IntegrityError unless queues, pages, leases and adapters agree."""
        self.scheduler.check_integrity()
        try:
            self.residency.check_integrity()
        except RuntimeError as error:
            raise IntegrityError(str(error)) from error
