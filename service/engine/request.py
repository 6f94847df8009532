"""A request and its sequences, as the scheduler sees them. No torch here.

What is made anew for each sequence and step is a msgspec.Struct without garbage collection: it is made in a third of
the time of a dataclass, and is in no cycle of references."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from service.engine.budgets import Left
from service.engine.messages import AdapterRef, SamplingParams, TokenLogprob
from service.engine.tracing import Timeline

PENDING = -1
"""Stands in `tokens` for a token that the step in flight draws on the device, and that is not known here yet. It is
always the last one."""


class State(enum.Enum):
    """WAITING (for pages and a slot) | FETCHING (its adapters are on their way) | RUNNING | FINISHED."""

    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens. Its KV entries are those of tokens[:num_computed], in `pages`, page_size tokens each; those
    of the step in flight count."""

    request_id: str
    index: int
    client: bytes
    """ZeroMQ identity of the API process to answer."""
    tokens: list[int]
    """Prompt, then generated tokens."""
    num_prompt: int
    sampling: SamplingParams
    seed: int
    adapters: tuple[AdapterRef, ...] = ()
    cache_root: bytes = b""
    """Root of its hash chain in the prefix cache: (salt, sorted adapters and weights)."""
    arrival: float = 0.0
    state: State = State.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    """A list that only grows. Where a page is exchanged there is a new list, so that who has seen one (step_inputs.py)
    knows its beginning."""
    rows: tuple[tuple[int, float], ...] = ()
    """(arena row, weight) of its leased adapters while RUNNING."""
    cached_tokens: int = 0
    preemptions: int = 0
    tenant: str = ""
    priority: int = 0
    adapter_bytes: int = 0
    """Of its leased adapters together, on the device; known once it has had a lease."""
    decode_cost: float = 0.0
    """Virtual tokens that its tenant is charged for each token that it generates; known once it has run."""
    paid: int = 0
    """Tokens that its tenant has been charged for: what a preemption makes us compute again is paid for once."""
    passed: int = 0
    """Sequences of other tenants that came in while it waited for pages."""
    timeline: Timeline | None = None
    """Of a traced sequence alone."""
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    end: int = field(init=False)
    """With so many tokens it ends, whatever they are."""

    def __post_init__(self) -> None:
        self.end = self.num_prompt + self.sampling.max_tokens

    @property
    def num_generated(self) -> int:
        """The one that is pending counts."""
        return len(self.tokens) - self.num_prompt

    @property
    def pending(self) -> bool:
        """Its last token has been drawn, and is not known here yet."""
        return self.tokens[-1] == PENDING

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed


class Scheduled(msgspec.Struct, gc=False):
    """`count` tokens of `seq` from num_computed on go through the model in this step.

    `samples`: the last of them is the sequence's last token, so its logits give the next one."""

    seq: Sequence
    count: int
    samples: bool
    cost: float = 0.0
    """Virtual tokens that its tenant is charged, for `charged` of its tokens; the others were paid for before."""
    charged: int = 0


@dataclass(slots=True)
class Batch:
    """One step's work, decided by the scheduler and executed by the runner. Token order = order of items."""

    items: list[Scheduled]
    left: Left | None = None
    """Of prompts; None where no sequence decodes."""

    @property
    def num_tokens(self) -> int:
        return sum([item.count for item in self.items])


class Sampled(msgspec.Struct, gc=False):
    """What the runner gives back for an item that samples."""

    token_id: int
    """Negative: its logits are not finite, there is nothing to draw from."""
    logprob: TokenLogprob | None = None
