"""How many tokens a step may have. No torch.

`tokens_per_step` is the whole budget. `prefill_tokens_per_step` bounds what prompts may add to a step in which others
decode (`Filling` and, for a crowd or a backlog, `riding_tokens` say how much a step is given), and so the time between
two tokens of a stream:

    time between tokens = step that only decodes + RIDING_S         (but for a crowd, or a `Backlog`: up to twice)

RIDING_S is 12 ms, so that the time between tokens of 64 sequences with 64 distinct adapters stays below 27 ms: 21 are
measured on an H200 (99th percentile), 22 on an H100. The bound is the number of prompt tokens that the device computes
in that time, at 2 operations for each parameter:

    tokens = RIDING_S * FLOPS / (2 * parameters)        rounded down to a multiple of 64, at least 64

From FLOPS; of these models the one with 8B was measured (benchmarks/RESULTS.md):

    bfloat16, H200        1B: 3648    8B: 512    14B: 256    32B: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache

from adapters.manifest import Manifest

RIDING_S = 0.012
FLOPS = 600e12
"""Of prefill in bfloat16 or float16 on an H100 or H200: 8 x 512 tokens of an 8B model took 95.8 ms."""
MULTIPROCESSORS = 132
"""Of that device; others are taken to be slower or faster by their number."""
FLOAT32 = 0.08
"""Share of FLOPS in float32."""
CPU_PREFILL = 128
"""A quarter of the budget. There a step of a small model takes 50 ms and a prompt token several."""


DETERMINISTIC = 256
"""Tokens of every step of the deterministic engine on CUDA, few or many: about where a product begins to be bound by
arithmetic instead of by reading the weights, so that what is padded costs least."""


STEP_SIZES = (64, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024, 1280, 1536, 2048)
"""Tokens to which steps with prompts are padded on CUDA (graphs.py), and the budget, if that is less than the last.
Larger ones are not: they keep the device busy for
longer than their launches take the host. There is no 448: such a step takes 18.3 ms, and one of 512 15.2 (8B,
H100)."""
MIXED_SEQUENCES = 256
"""Most sequences of such a step."""
CROWD, CROWD_TOKENS = 80, 1280
"""From so many decoding sequences on the bound grows with them, as far as a step of so many tokens."""


class Left(Enum):
    """What a step's bound left of prompts."""

    ROOM = auto()
    """Nothing."""
    REST = auto()
    """All room was taken, by those that were in it: one of them may not be through."""
    OTHERS = auto()
    """Others stood behind them."""


LASTING_S, LASTING = 3.0, 2
"""After so many seconds in which others stood behind, prompts may take up to so many times the bound."""
CLEARLY = 1.25
"""Otherwise the steps stay as they are: a few tokens more are not worth a size that is not full."""


class Backlog:
    """Whether prompts have stood behind others' for long, in steps in which sequences decode: sequences with answers
    much shorter than their prompts then wait for one another, or more come in than the bound lets through. Those who
    wait for a first token are worth longer steps: with 32 streams, 2,048 tokens in and 64 out, the median wait was
    1.1 s, and the time between two tokens 16 ms (8B, H200). A burst is over before: 64 prompts of 512 tokens take 1 s.

    It begins when others have stood behind for LASTING_S more than not, and ends when there has been room for so long:
    with longer steps fewer stand behind, so by one measure alone it would come and go."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self.lasts = False

    def took(self, seconds: float, left: Left) -> None:
        """A step in which sequences decoded."""
        more = left is Left.OTHERS or (self.lasts and left is Left.REST)
        self._seconds = min(LASTING_S, max(0.0, self._seconds + (seconds if more else -seconds)))
        if self._seconds in (0.0, LASTING_S):
            self.lasts = self._seconds > 0.0


def riding_tokens(decoding: int, bound: int, *, lasts: bool = False) -> int:
    """Prompt tokens that may ride with so many decoding sequences, where no other tenant waits for a short step: the
    bound, or more for a crowd, and where a backlog `lasts`.

    Under a fixed bound no more sequences decode than it brings in while they last, and others wait before free slots:
    with prompts of 512 tokens, four times as long as answers, 124 of 256 run. So the bound grows with those that
    decode, to what fills a size: what is padded costs as much. On an H100 256 streams gave 6,547 tokens/s instead of
    6,147, and waited 0.23 s instead of 2.6 for their first token; each then took 35 ms instead of 20
    (benchmarks/RESULTS.md). Padded from 1,280 to 1,536 tokens the same steps gave less than the fixed bound."""
    if decoding <= CROWD and not lasts:
        return bound
    most = min(CROWD_TOKENS, decoding + bound * max(decoding, LASTING * CROWD if lasts else 0) // CROWD)
    more = max((size for size in STEP_SIZES if size <= most), default=0) - decoding
    return more if more > bound * (1.0 if decoding > CROWD else CLEARLY) else bound


FULL_FROM = 16
"""From so many decoding sequences on their steps are filled (`Filling`). With fewer a prompt rather ends in one step:
throughput is nobody's concern then, and the next step takes as long for a rest of one token."""
ALIKE = 1.03
"""Prices that differ by less are alike: times are measured, once."""


class Filling:
    """Prompts are cut where a step's size is full, if that makes their tokens no dearer: what is padded costs as much,
    and of steps that compute prompts at the same pace the shorter ones are better for all who wait.

    An 8B model on an H100, 63 sequences with contexts of 600 tokens decoding, a bound of 512: by 449 tokens in a size
    of 512 a prompt token takes 32.8 us of the step, by 512 in one of 576 33.2 (benchmarks/RESULTS.md). A step that only
    decodes takes 8.1 ms anyway; what prompts add to that is 14.8 us a token in the first, and 17.4 in the second. The
    times at start, by which is chosen, are of steps without contexts."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """seconds: of a step, by the size to which it is padded; empty: steps are not padded."""
        self._sizes = sorted(seconds.items())
        self.tokens = lru_cache(maxsize=4096)(self._tokens)

    def _tokens(self, decoding: int, bound: int) -> int:
        """Prompt tokens, at most `bound`, that ride with so many decoding sequences: those of the smallest size whose
        price for each of them is the least there is."""
        if bound < 1 or not FULL_FROM <= decoding < MIXED_SEQUENCES:
            return bound
        if not self._sizes or decoding + bound > self._sizes[-1][0]:
            return bound
        prices: list[tuple[int, float]] = []
        for size, seconds in self._sizes:
            if size > decoding:
                tokens = min(bound, size - decoding)
                prices.append((tokens, seconds / tokens))
            if size >= decoding + bound:
                break
        least = min(price for _, price in prices)
        return next(tokens for tokens, price in prices if price <= ALIKE * least)


def tokens_per_step(device: str, *, deterministic: bool = False) -> int:
    if device == "cpu":
        return 512
    return DETERMINISTIC if deterministic else 2048


def prefill_tokens_per_step(device: str, manifest: Manifest, multiprocessors: int = MULTIPROCESSORS) -> int:
    """The bound for prompts that ride with decoding sequences."""
    if device == "cpu":
        return CPU_PREFILL
    parameters = sum(module.in_features * module.out_features for module in manifest.linears)
    flops = FLOPS * multiprocessors / MULTIPROCESSORS * (FLOAT32 if manifest.dtype == "float32" else 1.0)
    tokens = RIDING_S * flops / (2.0 * max(1, parameters))
    return max(64, int(tokens) // 64 * 64)
