"""An engine without a model, for tests and load tests of everything around the model. No torch.

The simulated runner keeps its state where a real one does: in pages. The entry of a token is a mix of the entry before
it (read through the sequence's pages), the token, and the adapters found in the leased rows; the next token is a
function of the last entry. So a page that is lost, shared wrongly, or computed under another adapter changes the tokens
that follow, as it would with a model. `expected` gives the same tokens from the request alone. Adapters go through the
real residency; only its loader and arena are simulated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np

from adapters.errors import AdapterUnavailable
from adapters.keys import digest_of
from adapters.manifest import Manifest, Module
from adapters.regions import Region, RegionAllocator
from adapters.residency import Residency
from adapters.tiers import BlockInfo, Completion, Fence, RowEntries
from service.engine.config import EngineConfig
from service.engine.core import Collect, Engine
from service.engine.errors import IntegrityError
from service.engine.fairness import Prices
from service.engine.kv_cache import PagePool
from service.engine.messages import AdapterRef, FromEngine, Limits, SamplingParams, TokenLogprob
from service.engine.request import PENDING, Batch, Sampled, Scheduled, Sequence

_MASK = 2**64 - 1


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the simulation is to be like."""

    step_s: float = 0.0
    """Seconds each step takes."""
    token_s: float = 0.0
    """Seconds more for each token of the step."""
    decode_token_s: float | None = None
    """The same for the one token of a sequence that decodes; None: as any other."""
    ahead: bool = False
    """The device works beside the engine, as a GPU does: tokens are not known before the step is collected."""
    busy_s: float = 0.0
    """Seconds more for which a step holds the interpreter's lock, as preparing and launching a real one does."""
    load_s: float = 0.0
    """Seconds until an adapter lies on the device."""
    adapter_bytes: int = 4096
    """Adapters are once, twice or three times as large."""
    vocab_size: int = 1000
    poison: int | None = None
    """A step with this token id in it fails."""
    out_of_memory: int | None = None
    """A step with this token id in it runs out of the host's memory."""
    out_of_memory_every: int = 0
    """Every so many steps one runs out of the device's memory; 0: none."""
    broken: str = "broken"
    """Adapters whose digest starts so cannot be loaded."""
    client_timeout_s: float = 10.0
    drain_s: float = 20.0


# ---------------------------------------------------------------- the "model"


def _mix(*numbers: int) -> int:
    """SplitMix64's finaliser over a few integers."""
    state = 0
    for number in numbers:
        state = (state * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix_of_adapters(adapters: Iterable[tuple[str, float]]) -> int:
    """Commutative, as adding deltas is."""
    return sum(_mix(*digest.encode(), int(weight * 1e6)) for digest, weight in adapters) & _MASK


def _next_token(entry: int, seq: Sequence, vocab_size: int) -> int:
    """Greedy: of the last entry alone; else of (seed, position) too. Bans stop ids before min_tokens."""
    sampling = seq.sampling
    state = entry if sampling.temperature == 0.0 else _mix(entry, seq.seed, len(seq.tokens))
    token = state % vocab_size
    if seq.num_generated < sampling.min_tokens:
        while token in sampling.stop_token_ids:
            token = (token + 1) % vocab_size
    return token


def expected(
    prompt: list[int],
    sampling: SamplingParams,
    adapters: Iterable[AdapterRef] = (),
    *,
    choice: int = 0,
    vocab_size: int,
) -> list[int]:
    """The tokens that a request is answered with, computed alone and from the start."""
    mixed = _mix_of_adapters((digest_of(ref.digest), ref.weight) for ref in adapters)
    seed = (sampling.seed or 0) + choice
    seq = Sequence("", 0, b"", list(prompt), len(prompt), sampling, seed)
    entry = 0
    for token in prompt:
        entry = _mix(entry, token, mixed)
    while seq.num_generated < sampling.max_tokens:
        seq.tokens.append(_next_token(entry, seq, vocab_size))
        entry = _mix(entry, seq.tokens[-1], mixed)
        if seq.num_generated > sampling.min_tokens and seq.tokens[-1] in sampling.stop_token_ids:
            break
    return seq.tokens[seq.num_prompt :]


class OutOfMemoryError(RuntimeError):
    """Called as torch's is."""


class SimulatedRunner:
    """core.Runner over pages of integers. `digest_of(row)` is what lies in a row of the arena's table now."""

    def __init__(
        self,
        pool: PagePool,
        digest_of: Callable[[int], str],
        options: Options,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self._clock = clock
        self._sleep = sleep
        self._device_until = 0.0
        """When the device has done all that was launched."""
        self._drawn: dict[Sequence, int] = {}
        """By the last launch."""
        self._told: list[tuple[Sequence, int, TokenLogprob]] = []
        """Log-probabilities of prompts' tokens, by position, that the last launch has computed."""
        self.batches: list[int] = []
        """Tokens of each step, for tests."""
        self._size = pool.page_size
        self._digest_of = digest_of
        self._entries = [[0] * pool.page_size for _ in range(pool.num_pages)]

    @property
    def ahead(self) -> bool:
        return self.options.ahead

    def launch(self, batch: Batch) -> Collect:
        if not self.ahead:
            self._work(self.seconds(batch))
        self.batches.append(batch.num_tokens)
        every = self.options.out_of_memory_every
        if every and len(self.batches) % every == 0:
            raise OutOfMemoryError("CUDA out of memory (simulated)")
        failure, drawn = None, {}
        results: list[Sampled | None] = []
        told = self._told = []
        for item in batch.items:
            try:
                result = self._run(item)
            except RuntimeError as error:  # what a device says, it says late
                if not self.ahead:
                    raise
                failure, result = error, Sampled(0)
            if result is not None:
                drawn[item.seq] = result.token_id
            results.append(result)
        self._drawn = drawn
        ready = self._device_until = max(self._clock(), self._device_until) + self.seconds(batch)

        def collect() -> list[Sampled | None]:
            if self.ahead:
                self._work(ready - self._clock())
            if failure is not None:
                raise failure
            for seq, position, entry in told:
                if seq.prompt_logprobs is not None and len(seq.prompt_logprobs) == position:
                    seq.prompt_logprobs.append(entry)
            return results

        return collect

    def _work(self, seconds: float) -> None:
        if seconds > 0:
            self._sleep(seconds)
        until = time.perf_counter() + self.options.busy_s
        while time.perf_counter() < until:
            pass

    def seconds(self, batch: Batch) -> float:
        """What the step takes."""
        options, items = self.options, batch.items
        decoding = sum(item.count == 1 and item.seq.num_computed >= item.seq.num_prompt for item in items)
        each = options.token_s if options.decode_token_s is None else options.decode_token_s
        return options.step_s + options.token_s * (batch.num_tokens - decoding) + each * decoding

    def _run(self, item: Scheduled) -> Sampled | None:
        seq = item.seq
        mixed = _mix_of_adapters((self._digest_of(row), weight) for row, weight in seq.rows)
        entry = self._entry(seq, seq.num_computed - 1) if seq.num_computed else 0
        for position in range(seq.num_computed, seq.num_computed + item.count):
            token = seq.tokens[position]
            if token == PENDING:
                token = self._drawn[seq]
            if token == self.options.poison:
                raise RuntimeError(f"token {token} is poison")
            if token == self.options.out_of_memory:
                raise MemoryError
            if seq.prompt_logprobs is not None and 0 < position < seq.num_prompt:
                self._told.append((seq, position, TokenLogprob(token, _logprob(entry, token), [])))
            entry = _mix(entry, token, mixed)
            self._entries[seq.pages[position // self._size]][position % self._size] = entry
        if not item.samples:
            return None
        token = _next_token(entry, seq, self.options.vocab_size)
        asked = seq.sampling.logprobs is not None
        return Sampled(token, TokenLogprob(token, _logprob(entry, token), []) if asked else None)

    def _entry(self, seq: Sequence, position: int) -> int:
        return self._entries[seq.pages[position // self._size]][position % self._size]


def _logprob(entry: int, token: int) -> float:
    return -float(_mix(entry, token) % 1000) / 100


# ---------------------------------------------------------------- the "adapters"


class SimulatedArena:
    """tiers.ArenaTier whose memory is, per region, the digest of the adapter that was copied there."""

    def __init__(self, nbytes: int, rows: int) -> None:
        self.rows = rows
        self.generation = np.zeros(rows, np.int64)
        self.contents: dict[Region, str] = {}
        self._allocator = RegionAllocator(nbytes)
        self._regions: list[Region | None] = [None] * rows

    @property
    def capacity(self) -> int:
        return self._allocator.capacity

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_bytes

    @property
    def fragmentation(self) -> float:
        free = self._allocator.free_bytes
        return 1.0 - self._allocator.largest_free / free if free else 0.0

    def allocate(self, nbytes: int) -> Region | None:
        return self._allocator.allocate(nbytes)

    def free(self, region: Region) -> None:
        self.contents.pop(region, None)
        self._allocator.free(region)

    def bind(self, row: int, region: Region, entries: RowEntries) -> None:
        self._regions[row] = region
        self.generation[row] += 1

    def unbind(self, row: int) -> None:
        self._regions[row] = None
        self.generation[row] += 1

    def compact(self, max_bytes: int, want: int | None = None) -> int:
        """All regions that rows name, to the front."""
        moved, cursor = 0, 0
        for region in self._allocator.regions():
            if region in self._regions and region.offset > cursor:
                self._allocator.relocate(region, cursor)
                moved += region.nbytes
            cursor = region.end
        return moved

    def fence(self) -> Fence | None:
        return None

    def region_of(self, row: int) -> Region | None:
        return self._regions[row]

    def check_integrity(self) -> None:
        self._allocator.check_integrity()

    def digest_of(self, row: int) -> str:
        """What a kernel would find in this row."""
        region = self._regions[row]
        if region is None:
            raise IntegrityError(f"row {row} holds no adapter")
        return self.contents[region]


class SimulatedLoader:
    """tiers.Loader for which any adapter exists; reading one takes `options.load_s`."""

    def __init__(
        self,
        arena: SimulatedArena,
        host_bytes: int,
        options: Options,
        clock: Callable[[], float],
        notify: Callable[[], None] | None = None,
    ) -> None:
        """notify: see loader.BlockLoader. To be left out where `clock` is of a time of its own."""
        self.host_bytes = host_bytes
        self._notify = notify
        self._arena = arena
        self._options = options
        self._clock = clock
        self._jobs: list[tuple[float, Completion, Region | None]] = []

    def prepare(self, digest: str) -> None:
        if digest.startswith(self._options.broken):
            self._start(Completion("prepare", digest, error=AdapterUnavailable(digest, "it is broken")), seconds=0.0)
            return
        nbytes = self._options.adapter_bytes * (1 + _mix(*digest_of(digest).encode()) % 3)
        info = BlockInfo(Path(digest), 0, nbytes, b"", RowEntries.of((), 1))
        self._start(Completion("prepare", digest, info), seconds=0.0)

    def read(self, digest: str, info: BlockInfo, host: Region) -> None:
        self._start(Completion("read", digest), self._options.load_s)

    def copy(self, digest: str, info: BlockInfo, host: Region, device: Region, after: Fence | None) -> None:
        self._start(Completion("copy", digest), 0.0, device)

    def stream(self, digest: str, info: BlockInfo, device: Region, after: Fence | None) -> None:
        self._start(Completion("stream", digest), self._options.load_s, device)

    def discard(self, digest: str) -> None:
        self._start(Completion("discard", digest), 0.0)

    def completions(self) -> list[Completion]:
        now = self._clock()
        done = [job for job in self._jobs if job[0] <= now]
        self._jobs = [job for job in self._jobs if job[0] > now]
        for _, completion, device in done:
            if device is not None:
                self._arena.contents[device] = digest_of(completion.digest)
        return [completion for _, completion, _ in done]

    def _start(self, completion: Completion, seconds: float, device: Region | None = None) -> None:
        self._jobs.append((self._clock() + seconds, completion, device))
        if self._notify is not None:
            timer = threading.Timer(seconds, self._notify)
            timer.daemon = True
            timer.start()


# ---------------------------------------------------------------- the engine


def manifest(options: Options, max_positions: int) -> Manifest:
    """One layer with two linears, so that small uploads can be validated against it."""
    modules = (
        Module("model.embed_tokens", "embedding", options.vocab_size, 16),
        Module("model.layers.0.self_attn.q_proj", "linear", 16, 16),
        Module("model.layers.0.mlp.down_proj", "linear", 32, 16),
        Module("lm_head", "output", 16, options.vocab_size),
    )
    return Manifest(
        fingerprint="simulated",
        architecture="Simulated",
        model_type="simulated",
        dtype="float32",
        vocab_size=options.vocab_size,
        max_positions=max_positions,
        modules=modules,
    )


def build_engine(
    config: EngineConfig,
    send: Callable[[bytes, FromEngine], None],
    options: Options,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    wake: Callable[[], None] | None = None,
) -> tuple[Engine, dict[str, str]]:
    """A whole engine around the simulation, and the versions to report. `clock` and `sleep`: of a time of its own.
    `wake`: called whenever a load has come a stage further."""
    pool = PagePool(config.kv_pages or 1024, config.page_size, prefix_caching=config.prefix_caching)
    arena = SimulatedArena(config.arena_bytes or 64 * options.adapter_bytes, config.max_resident_adapters)
    loader = SimulatedLoader(arena, config.host_cache_bytes or 4 * arena.capacity, options, clock, wake)
    residency = Residency(arena, loader, clock=clock)
    limits = Limits(
        max_positions=config.max_positions or 4096,
        max_sequences=config.max_sequences,
        max_queue=config.max_queue,
        page_size=config.page_size,
        pages=pool.num_pages,
        max_adapters_per_request=8,
        max_rank=512,
        arena_bytes=arena.capacity,
    )
    runner = SimulatedRunner(pool, arena.digest_of, options, sleep, clock)
    # An adapter is to the base what one of rank 16 is to a model of 8 billion parameters.
    prices = Prices(base_bytes=170.0 * options.adapter_bytes)
    base = manifest(options, limits.max_positions)
    engine = Engine(config, base, limits, runner, pool, residency, send, prices=prices, backlog=True, clock=clock)
    return engine, {"simulated": "1"}
