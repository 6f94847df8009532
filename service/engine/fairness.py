"""Who has had how much: virtual token counters per tenant, with weights. No torch, no clock.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Everything that a step computes for a
tenant is charged in virtual tokens (`Prices`), divided by its weight. Whoever has been charged least goes first, so
tenants that always have work get shares in the ratio of their weights; what one leaves unused goes to whoever asks.
One that comes back is lifted to the least charged of those that wait: what it did not ask for is not saved up. One
that was charged more than they were keeps that, so that leaving for a moment does not help either.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters.manifest import Manifest
from service.engine.errors import IntegrityError
from service.engine.request import Sequence

MAX_IDLE = 4096
"""Tenants without a request whose counters are kept; of more, those that owe least are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What work costs, in virtual tokens: one is a prompt token of the base model.

    The constants are ratios of times on an H200 with an 8B model in bfloat16. They carry over to other models, since
    both sides grow with the model: what an adapter costs depends on its bytes against those of the base's linears,
    sum of rank * (k + d) over sum of k * d.
    """

    decode: float = 4.0
    """Of a generated token. 512 prompt tokens take 11 ms; a decode step takes 8.5 ms with 64 sequences and 15 ms with
    256, hence a token 6 and 3 times what a prompt token takes."""
    lora_prefill: float = 20.0
    """A prompt token with an adapter of a hundredth of the base's size costs a fifth more: rank 16 on all projections
    (0.6%) took prefill from 96 to 107 ms."""
    lora_decode: float = 48.0
    """The same for a generated token: 64 distinct ones of 0.6% took a decode step from 6.6 to 8.5 ms."""
    load: float = 12000.0
    """Of moving as many bytes as the base has to the device: at 55 GB/s they take as long as 12,000 prompt tokens."""
    base_bytes: float = math.inf
    """Bytes of the base's linears. Infinite: adapters cost nothing."""

    @classmethod
    def of(cls, manifest: Manifest) -> Prices:
        """For a base model."""
        elements = sum(module.in_features * module.out_features for module in manifest.linears)
        return cls(base_bytes=float(max(1, elements) * (4 if manifest.dtype == "float32" else 2)))

    def step(self, prefill: int, decode: int, adapter_bytes: int) -> float:
        """Of `prefill` prompt and `decode` generated tokens, all with adapters of so many bytes together."""
        share = adapter_bytes / self.base_bytes
        return prefill * (1.0 + self.lora_prefill * share) + decode * self.decode * (1.0 + self.lora_decode * share)

    def loading(self, nbytes: int) -> float:
        return self.load * nbytes / self.base_bytes


def rank(seq: Sequence) -> tuple[int, float]:
    """Order within a tenant: higher priority first, then first come, first served."""
    return (-seq.priority, seq.arrival)


@dataclass(eq=False, slots=True)
class Tenant:
    """One tenant's account and its queue."""

    name: str
    weight: float = 1.0
    counter: float = 0.0
    """Virtual tokens charged by weight, or what it was lifted to."""
    served: float = 0.0
    """Virtual tokens charged since the account was opened, whatever the weight."""
    waiting: list[Sequence] = field(default_factory=list)
    """WAITING and FETCHING, in order of rank()."""
    running: int = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def enqueue(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=rank)

    def dequeue(self, seq: Sequence) -> None:
        at = bisect_left(self.waiting, rank(seq), key=rank)
        if at == len(self.waiting) or self.waiting[at] is not seq:
            raise IntegrityError(f"{seq.request_id}/{seq.index} is not in the queue of its tenant")
        del self.waiting[at]

    def standing(self) -> tuple[float, float]:
        """Whose is least goes first. Between equals: who has fewer running for its weight."""
        return (self.counter, self.running / self.weight)


class Tenants:
    """All accounts that matter: of tenants with requests, and of those that have had more than others."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.num_waiting = 0
        self.queued: dict[str, Tenant] = {}
        """Those that wait for something."""
        self.serving: dict[str, Tenant] = {}
        """Those that have sequences running."""
        self._tenants: dict[str, Tenant] = {}
        self._floor = 0.0
        """What the last tenant to leave the queues had been charged: where one starts while nobody waits."""
        self._most_to_spare: float | None = None

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tenants.values())

    def __len__(self) -> int:
        return len(self._tenants)

    def __getitem__(self, name: str) -> Tenant:
        return self._tenants[name]

    @property
    def most_to_spare(self) -> float:
        """The most that any tenant would still run for its weight with one sequence less."""
        if self._most_to_spare is None:
            self._most_to_spare = self._to_spare()
        return self._most_to_spare

    def _to_spare(self) -> float:
        return max([(each.running - 1) / each.weight for each in self.serving.values()], default=0.0)

    def get(self, name: str) -> Tenant | None:
        return self._tenants.get(name)

    def open(self, name: str, weight: float) -> Tenant:
        """The account of a tenant that has a new request. Raises ValueError unless 0 < weight < infinity."""
        if not 0.0 < weight < math.inf:
            raise ValueError(f"tenant_weight is {weight}, it must be a number above 0")
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= 2 * MAX_IDLE:
                self._forget()
            tenant = self._tenants[name] = Tenant(name)
        if tenant.weight != weight:
            tenant.weight = weight
            self._most_to_spare = None
        return tenant

    def enqueue(self, seq: Sequence, *, lift: bool) -> None:
        """Into its tenant's queue; `lift`: as a new request, not one that was interrupted."""
        tenant = self._tenants[seq.tenant]
        if lift and not tenant.waiting:
            least = min((other.counter for other in self.queued.values()), default=self._floor)
            tenant.counter = max(tenant.counter, least)
        tenant.enqueue(seq)
        self.queued[tenant.name] = tenant
        self.num_waiting += 1

    def dequeue(self, seq: Sequence) -> None:
        tenant = self._tenants[seq.tenant]
        tenant.dequeue(seq)
        self.num_waiting -= 1
        if not tenant.waiting:
            del self.queued[tenant.name]
            self._floor = max(self._floor, tenant.counter)

    def begin(self, seq: Sequence) -> None:
        """From its tenant's queue to those that run."""
        tenant = self._tenants[seq.tenant]
        self.dequeue(seq)
        tenant.running += 1
        self._most_to_spare = None
        self.serving[tenant.name] = tenant

    def end(self, seq: Sequence) -> None:
        """It does not run any more."""
        tenant = self._tenants[seq.tenant]
        tenant.running -= 1
        self._most_to_spare = None
        if not tenant.running:
            del self.serving[tenant.name]

    def charge(self, tenant: Tenant, cost: float) -> None:
        """`cost` below 0 gives back what was charged for work that is not done after all."""
        tenant.served += cost
        tenant.counter += cost / tenant.weight

    def _forget(self) -> None:
        """Accounts without requests that are at or below the floor would be lifted to it anyway."""
        idle = sorted((tenant for tenant in self if tenant.idle), key=lambda tenant: -tenant.counter)
        for place, tenant in enumerate(idle):
            if tenant.counter <= self._floor or place >= MAX_IDLE:
                del self._tenants[tenant.name]

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises IntegrityError unless queues and counts agree."""
        if self.num_waiting != sum(len(tenant.waiting) for tenant in self):
            raise IntegrityError("the number of waiting sequences is wrong")
        if self.queued != {tenant.name: tenant for tenant in self if tenant.waiting}:
            raise IntegrityError("not exactly the tenants that wait count as queued")
        if self.serving != {tenant.name: tenant for tenant in self if tenant.running}:
            raise IntegrityError("not exactly the tenants that run something count as served")
        if self._most_to_spare not in (None, self._to_spare()):
            raise IntegrityError("what tenants could spare was not counted anew")
        for tenant in self:
            if [*map(rank, tenant.waiting)] != sorted(map(rank, tenant.waiting)):
                raise IntegrityError(f"the queue of tenant {tenant.name!r} is out of order")
            if any(seq.tenant != tenant.name for seq in tenant.waiting):
                raise IntegrityError(f"the queue of tenant {tenant.name!r} has another's requests")
            if tenant.running != sum(seq.tenant == tenant.name for seq in running):
                raise IntegrityError(f"tenant {tenant.name!r} runs another number of sequences than it counts")
            if not math.isfinite(tenant.counter) or tenant.served < -1e-3:  # rounding of what was given back
                raise IntegrityError(f"tenant {tenant.name!r} was charged {tenant.served}, {tenant.counter}")
