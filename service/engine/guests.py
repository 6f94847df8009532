"""Room for those that ask now and then, beside those that ask for all there is. No torch, no clock.

A guest is a tenant with few sequences: a quarter of its share of what runs, or less. A host runs more than half of its
share, and more than one. While guests come (LATELY), hosts do two things for them:

1. They keep steps short. A newcomer waits for the step in progress, so that one has to take less than the newcomer's
   own prompt does, if its first token is to come in less than twice the time that it needs alone (RATIO). Prompts of
   the size that guests ask for, `bound` at least, set the length; decodes of hosts take turns if need be, and their
   prompts get what is left. The longer guests' prompts are, the less this costs.
2. They sit out the steps in which a guest's prompt is computed, PAUSE in a row at most; then one step is shared. So a
   stream of a host waits at most PAUSE steps of `bound` prompt tokens longer for its next token.

Both end when the guest has been charged what the hosts were: in the long run counters decide alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from service.engine.budgets import RIDING_S
from service.engine.fairness import Tenant, Tenants
from service.engine.pace import StepTimes
from service.engine.request import Sequence

LATELY = 5.0
"""Seconds of steps since the last guest came."""
RATIO = 2.0
"""What a guest's first token may take against what it takes alone."""
UNFORESEEN = 0.2
"""Of that, what is left for what is not foreseen, as a share of what it takes alone; and for the engine's lead."""
PAUSE = 4
FORGET = 1 / 32
"""Of what the guests' shortest prompt is believed to be, by which it moves to a longer one."""


class Guests:
    """`bound`: of prompt tokens in a step in which others decode."""

    def __init__(self, tenants: Tenants, bound: int) -> None:
        self.times = StepTimes(bound, RIDING_S)
        self.bound = bound
        self._tenants = tenants
        self._lead = 0.0
        """Seconds before the end of a step in which newcomers have missed the next."""
        self._left = 0.0
        """Seconds for which the last guest is still remembered."""
        self._weights = 0.0
        """Of those that run something in this step, together."""
        self._prompt = 0.0
        """What a guest has to compute until its first token, the shortest of the last few; 0: not known."""
        self._paused = 0
        """Steps in a row that hosts sat out."""
        self._queue: list[Sequence] = []
        """Of hosts that take turns: whose is next, and next but one."""
        self._before: list[Sequence] = []
        """The same before this step."""

    def came(self, tenant: Tenant, running: int) -> None:
        """It has a new request; `running` sequences run."""
        self._weigh()
        if self._is_guest(tenant, running):
            if self._left <= 0.0:
                self._prompt = 0.0
            self._left = LATELY

    def took(self, tokens: int, sequences: int, seconds: float, lead: float = 0.0) -> None:
        """A step of `tokens` prompt tokens and so many sequences took so long; the next was closed `lead` before its
        end."""
        self.times.observe(tokens, sequences, seconds)
        self._lead = lead
        self._left -= seconds

    def hosts(self, running: int) -> dict[str, Tenant]:
        """The hosts of the next step; none while no guest came lately."""
        if self._left <= 0.0:
            return {}
        self._weigh()
        limit = running / (2.0 * self._weights) if self._weights else 0.0
        serving = self._tenants.serving
        return {name: tenant for name, tenant in serving.items() if tenant.running > max(1.0, limit * tenant.weight)}

    def among(self, names: Iterable[str], running: int, hosts: dict[str, Tenant]) -> set[str]:
        """The guests for whom hosts make room. Their lead is bounded, or shares would not be those of the weights."""
        most = min(host.counter for host in hosts.values()) + PAUSE * self.bound
        others = [self._tenants[name] for name in names if name not in hosts]
        return {each.name for each in others if each.counter <= most and self._is_guest(each, running)}

    def _weigh(self) -> None:
        self._weights = sum(tenant.weight for tenant in self._tenants.serving.values())

    def _is_guest(self, tenant: Tenant, running: int) -> bool:
        weights = self._weights if tenant.running else self._weights + tenant.weight
        return 4.0 * (tenant.running + len(tenant.waiting)) * weights <= tenant.weight * running

    # ------------------------------------------------------------ short steps

    @property
    def wait(self) -> float:
        """Seconds that a step may take: what RATIO leaves when the prompt is computed by chunks of `bound`, and came
        just after the next step was closed. No less than for a prompt of `bound` tokens."""
        tokens = max(self._prompt, self.bound)
        alone, least = self.times.step(tokens, 1), self.times.step(self.bound, 1)
        chunked = alone + (ceil(tokens / self.bound) - 1) * self.times.step(0, 1)
        return max(
            RATIO * alone - chunked - max(self._lead, UNFORESEEN * alone),
            (RATIO - 1.0) * least - max(self._lead, UNFORESEEN * least),
        )

    def asks(self, tokens: int) -> None:
        """A guest's prompt has so many tokens to compute."""
        known = self._prompt or tokens
        self._prompt = min(float(tokens), known + (tokens - known) * FORGET)

    def in_turn(self, running: list[Sequence], hosts: dict[str, Tenant]) -> list[Sequence]:
        """Those of `running` that may decode in a short step, by arrival; all of them if that is short enough, and of
        hosts' at least an eighth. Who had its turn, and who comes in, goes to the end, so nobody is passed: each has
        its turn within eight of the steps that hosts do not sit out, while no others end."""
        mine = [seq for seq in running if seq.tenant in hosts and len(seq.tokens) - seq.num_computed == 1]
        room = self.times.sequences_in(self.wait - self.times.step(0, len(running) - len(mine)))
        room = max(room, ceil(len(mine) / 8))
        if len(mine) <= room:
            self._before = self._queue = []
            return running
        decoding = set(mine)
        queue = [seq for seq in self._queue if seq in decoding]
        decoding.difference_update(queue)
        self._before = queue = queue + [seq for seq in mine if seq in decoding]
        self._queue = queue[room:] + queue[:room]
        out = set(queue[room:])
        return [seq for seq in running if seq not in out]

    def rest(self, decoding: int) -> int:
        """Prompt tokens of hosts in a short step in which so many sequences decode."""
        return max(1, self.bound // 16, self.times.tokens_in(self.wait - self.times.step(0, decoding)))

    # ------------------------------------------------------------ sitting out

    def sit_out(self, fed: bool) -> bool:
        """Whether hosts leave the step to guests, for whose prompts there are tokens in it or not (`fed`)."""
        self._paused = self._paused + 1 if fed and self._paused < PAUSE else 0
        if self._paused:
            self._queue = self._before
        return self._paused > 0
