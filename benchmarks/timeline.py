"""The simulated engine in a time of its own: a step takes what the cost model says, and nobody sleeps.

Everything but the model is the real thing: engine, scheduler, pages, residency; tokens are all alike. Results are exact
and the same on every machine. What they are worth depends on the cost model, which is stated beside them:

    step = step_s + token_s * prompt tokens + decode_token_s * sequences that decode
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service.engine.config import EngineConfig
from service.engine.messages import AdapterRef, FromEngine, Outputs, Refused, SamplingParams, Submit
from service.engine.request import Sampled, Scheduled
from service.engine.simulated import Options, SimulatedRunner, build_engine

H200_8B = Options(step_s=0.0047, token_s=0.0000215, decode_token_s=0.000041)
"""An 8B model in bfloat16 on an H200, rank 16 on all projections, as the prototype's kernels were measured: 512 prompt
tokens 11 ms more; a decode step 4.7 ms with one sequence, 7.3 with 64, 15.2 with 256 (5.0, 8.5 and 15.2 there)."""
H200_8B_NOW = Options(step_s=0.0056, token_s=0.0000215, decode_token_s=0.000147)
"""The same with the decode steps of the first measurement over HTTP: 5.6 ms alone, 15 ms with 64 distinct adapters."""
H100_8B = Options(step_s=0.0062, token_s=0.0000158, decode_token_s=0.0000335, ahead=True)
"""The same on an H100, by what its CUDA graphs take (benchmarks/RESULTS.md): 6.3 ms alone, 8.3 with 64, 13 with 205. It
works beside the engine, as a GPU does: steps are launched before the one in progress ends."""
ADAPTER_BYTES = 84_000_000


@dataclass(slots=True)
class Asked:
    """One request and when its tokens came, in seconds."""

    tenant: str
    sent: float
    times: list[float] = field(default_factory=list)
    done: Callable[[], None] | None = None
    refused: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent


class Timekeeper(SimulatedRunner):
    """Which token is drawn is of no interest here, and would cost half of the host's time."""

    def _run(self, item: Scheduled) -> Sampled | None:
        return Sampled(0) if item.samples else None


class Timeline:
    """An engine, its clock, and what happens when."""

    def __init__(self, options: Options, **config: int | bool) -> None:
        self.now = 0.0
        self.asked: dict[str, Asked] = {}
        settings = {"max_positions": 32768, "kv_pages": 20000} | config
        self.engine, _ = build_engine(
            EngineConfig(model_path="", blobs_dir="", cache_dir="", socket="", **settings),
            self._hear,
            options,
            clock=lambda: self.now,
            sleep=self._pass,
        )
        self.engine.runner = Timekeeper(self.engine.pool, lambda _: "", options, self._pass, lambda: self.now)
        self._ended: list[Callable[[], None]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def ask(
        self,
        tenant: str,
        prompt: int,
        output: int,
        *,
        weight: float = 1.0,
        priority: int = 0,
        adapters: tuple[str, ...] = (),
        done: Callable[[], None] | None = None,
    ) -> Asked:
        """A request of `prompt` tokens, no two alike, for `output` tokens; `done` is called when it has them."""
        number = next(self._numbers)
        name = f"{tenant}/{number}"
        asked = self.asked[name] = Asked(tenant, self.now, done=done)
        tokens = [(number * 7919 + i * 31) % 1000 for i in range(prompt)]
        tokens[: min(4, prompt)] = [number // 1000**i % 1000 for i in range(min(4, prompt))]
        self.engine.handle(
            b"",
            Submit(
                request_id=name,
                prompts=[tokens],
                adapters=tuple(AdapterRef(each) for each in adapters),
                sampling=SamplingParams(temperature=0.0, max_tokens=output),
                salt=tenant,
                tenant=tenant,
                tenant_weight=weight,
                priority=priority,
            ),
        )
        return asked

    def closed_loop(self, tenant: str, streams: int, prompt: int, output: int, **more: object) -> None:
        """`streams` requests in flight from now on: the next is sent when one has ended."""
        adapters = more.pop("adapters", None)

        def send(slot: int) -> None:
            mine = {"adapters": (adapters[slot % len(adapters)],)} if adapters else {}
            self.ask(tenant, prompt, output, done=lambda: send(slot), **mine, **more)

        for slot in range(streams):
            send(slot)

    def open_loop(self, tenant: str, every: Iterator[float], prompt: int, output: int, **more: object) -> None:
        """A request at each of the times, whatever became of the last."""

        def send(when: float) -> None:
            # The engine takes messages between steps; the client has waited since `when`.
            self.ask(tenant, prompt, output, **more).sent = when

        for when in every:
            self.at(when, functools.partial(send, when))

    def run(self, until: float, each_step: Callable[[], None] = lambda: None) -> None:
        """Steps until that second."""
        while self.now < until:
            # As the engine's process does: who comes while the device is busy is in the next step.
            while self._events and self._events[0][0] <= self.now + max(0.0, self.engine.spare):
                when, _, what = heapq.heappop(self._events)
                self.now = max(self.now, when)
                what()
            self.now += max(0.0, self.engine.spare)
            worked = self.engine.step()
            ended, self._ended = self._ended, []
            for what in ended:
                what()
            each_step()
            if not worked and not ended:
                # Nothing runs: to the next event, or, where adapters are on their way, to the loader's next poll.
                following = self._events[0][0] if self._events else until
                self.now = min(following, self.now + 0.001) if self.engine.busy else following

    def of(self, tenant: str, after: float = 0.0) -> list[Asked]:
        """Requests of a tenant that were sent after a warm-up and got a first token."""
        mine = (asked for asked in self.asked.values() if asked.tenant == tenant)
        return [asked for asked in mine if asked.sent >= after and asked.times]

    def tokens(self, after: float = 0.0) -> dict[str, int]:
        """Generated tokens by tenant since `after`."""
        counts: dict[str, int] = defaultdict(int)
        for asked in self.asked.values():
            counts[asked.tenant] += sum(time >= after for time in asked.times)
        return dict(counts)

    def served(self) -> dict[str, float]:
        """Virtual tokens by tenant."""
        return {tenant.name: tenant.served for tenant in self.engine.scheduler.tenants}

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def _hear(self, _client: bytes, message: FromEngine) -> None:
        if isinstance(message, Refused):
            asked = self.asked[message.request_id]
            asked.refused = message.code
            if asked.done is not None:
                self.at(self.now + (message.retry_after_s or 1.0), asked.done)
        elif isinstance(message, Outputs):
            for delta in message.deltas:
                asked = self.asked[delta.request_id]
                asked.times += [self.now] * len(delta.token_ids)
                if delta.finish_reason is not None and asked.done is not None:
                    self._ended.append(asked.done)


def percentile(values: list[float], share: float) -> float:
    """Nearest rank: the smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]
