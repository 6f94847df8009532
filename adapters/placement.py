"""The blocks in host memory and on the device, and the mechanics of bringing them in and evicting them.

Pure Python. Knows nothing of requests but their claims: a number per block, the age of the oldest request that
waits for it (adapters/waiters.py). Who is served when is decided in adapters/residency.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from adapters.accounts import Accounts
from adapters.errors import BlobDamaged, LoraplexAdapterError
from adapters.keys import account_of, digest_of
from adapters.occupancy import Occupancy
from adapters.regions import Region, RegionAllocator, align
from adapters.tiers import ArenaTier, BlockInfo, Completion, Fence, Loader, Stage


@dataclass(eq=False, slots=True)
class Unload:
    """An unload under way: `done` once the block is in no tier, or with `forget` no block of the content, and its file
    is deleted."""

    digest: str
    forget: bool
    done: bool = False
    parts: list[Unload] = field(default_factory=list)
    """Of the content's blocks, with `forget`."""


@dataclass(eq=False, slots=True)
class Block:
    """What is held of one adapter. Absent blocks have no object, unless somebody waits for them."""

    digest: str
    """Its key (adapters/keys.py)."""
    account: str
    info: BlockInfo | None = None
    """Known once prepared."""
    job: Stage | None = None
    """What the loader is doing with it."""
    job_since: float = 0.0
    host: Region | None = None
    host_ready: bool = False
    region: Region | None = None
    row: int | None = None
    """With `region`, reserved from the start of the copy; bound when it has ended."""
    on_device: bool = False
    fresh: bool = False
    """On the device, and not leased yet since it was copied there."""
    leases: int = 0
    fences: list[Fence] = field(default_factory=list)
    failure: LoraplexAdapterError | None = None
    retry_at: float = 0.0
    unloads: list[Unload] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size in the arena and in the slab; 0 while it is not known."""
        return 0 if self.info is None else align(self.info.nbytes)

    def busy(self) -> bool:
        """Whether a lease, or device work behind a released one, still uses the device copy."""
        if self.fences:
            self.fences = [fence for fence in self.fences if not fence.done()]
        return bool(self.leases or self.fences)


class Placement:
    """Both tiers, least recently used first."""

    def __init__(
        self,
        arena: ArenaTier,
        loader: Loader,
        *,
        compact_bytes: int,
        clock: Callable[[], float],
        claim: Callable[[str], int | None],
        wanted: Callable[[str], bool],
    ) -> None:
        """`claim`: order of the oldest waiter that needs a block. `wanted`: whether anybody is interested in it."""
        self.arena = arena
        self.loader = loader
        self.slab = RegionAllocator(loader.host_bytes)
        self.blocks: dict[str, Block] = {}
        self.on_device: OrderedDict[str, Block] = OrderedDict()
        self.on_host: OrderedDict[str, Block] = OrderedDict()
        self.counters = dict.fromkeys(
            (
                "loads", "load_failures", "damaged", "rebuilt", "load_seconds", "evictions_device", "evictions_host",
                "moved_bytes",
            ),
            0.0,
        )  # fmt: skip
        self.occupancy = Occupancy(clock)
        self.accounts = Accounts(self.size_of, self._is_known)
        self.deleting: set[str] = set()
        """Content whose block file is to be deleted: nobody prepares it before that is done."""
        self._free_rows = list(range(arena.rows - 1, -1, -1))
        self._compact_bytes = compact_bytes
        self._clock = clock
        self._claim = claim
        self._wanted = wanted

    def block(self, digest: str) -> Block:
        """The block's object, made if need be; see forget_if_idle()."""
        block = self.blocks.get(digest)
        if block is None:
            block = self.blocks[digest] = Block(digest, account_of(digest))
        return block

    def size_of(self, digest: str) -> int:
        block = self.blocks.get(digest)
        return 0 if block is None else block.nbytes

    def _is_known(self, digest: str) -> bool:
        block = self.blocks.get(digest)
        return block is not None and block.info is not None and not block.unloads

    def failed(self, block: Block) -> bool:
        """Whether it failed so recently that it is not tried again yet."""
        return block.failure is not None and self._clock() < block.retry_at

    def touch(self, block: Block) -> None:
        for tier in (self.on_device, self.on_host):
            if block.digest in tier:
                tier.move_to_end(block.digest)

    # ------------------------------------------------------------ bringing in

    def fetch(self, block: Block) -> None:
        """Starts preparing a block of which nothing is known yet."""
        idle = block.job is None and block.info is None and not block.unloads
        if idle and digest_of(block.digest) not in self.deleting and not self.failed(block):
            block.failure = None
            self._begin(block, "prepare")
            self.loader.prepare(block.digest)

    def wants_read(self, block: Block) -> bool:
        """Whether the next step is a read into the slab; larger blocks are streamed past it."""
        return not block.host_ready and block.nbytes <= self.slab.capacity

    def start_read(self, block: Block, claim: int | None) -> bool:
        """Makes room in the slab and starts the read. False, and nothing evicted, if there is no such room."""
        if block.info is None:
            return False
        region = self.slab.allocate(block.nbytes)
        if region is None:
            for other in self._in_the_way(block.nbytes, claim):
                self.evict_host(other)
                region = self.slab.allocate(block.nbytes)
                if region is not None:
                    break
        if region is None:
            return False
        block.host = region
        self._begin(block, "read")
        self.loader.read(block.digest, block.info, region)
        return True

    def _in_the_way(self, nbytes: int, claim: int | None) -> list[Block]:
        """Blocks that leave the slab, one after the other, until it has a hole of `nbytes`; none if they would make
        none. No more are looked at than that takes, for there may be tens of thousands."""
        victims: list[Block] = []
        candidates = self._victims(self._host_candidates(), claim)
        while more := list(islice(candidates, max(1, len(victims)))):
            victims += more
            if self.slab.fits_without(nbytes, {other.host for other in victims if other.host is not None}):
                return victims
        return []

    def beyond_limit(self, account: str, nbytes: int = 0) -> list[Block] | None:
        """The blocks of an account that have to leave the device before `nbytes` more may come, least recently used
        first; None if those that may leave now are not enough."""
        excess, chosen = self.accounts.excess(account, nbytes), []
        for other in self.on_device.values() if excess > 0 else ():
            if other.account == account and not other.busy() and self._claim(other.digest) is None:
                chosen.append(other)
                excess -= other.nbytes
                if excess <= 0:
                    break
        return chosen if excess <= 0 else None

    def trim(self, account: str) -> None:
        """Evicts what an account has beyond a limit that was lowered, as far as nobody needs it."""
        for other in list(self.on_device.values()):
            if self.accounts.excess(account) <= 0:
                return
            if other.account == account and not other.busy() and self._claim(other.digest) is None:
                self.evict_device(other)

    def make_room(self, block: Block, claim: int | None, leaving: list[Block]) -> bool:
        """Evicts from the device `leaving`, and more until a row and enough bytes are free, in one piece or not. Evicts
        nothing, and returns False, when that cannot be reached."""
        free, rows, chosen = self.arena.free_bytes, len(self._free_rows), list(leaving)
        free += sum(other.nbytes for other in leaving)
        rows += len(leaving)
        idle = ((other, self._claim(other.digest)) for other in self.on_device.values() if not other.busy())
        for victim in self._victims(idle, claim):
            if free >= block.nbytes and rows:
                break
            if victim in leaving:
                continue
            chosen.append(victim)
            free += victim.nbytes
            rows += 1
        if free < block.nbytes or not rows:
            return False
        for victim in chosen:
            self.evict_device(victim)
        return True

    def start_copy(self, block: Block) -> bool:
        """Starts the copy to the device; False without a free row, a hole long enough, or room in its account."""
        if block.info is None or not self._free_rows or self.accounts.excess(block.account, block.nbytes) > 0:
            return False
        region = self.arena.allocate(block.nbytes)
        if region is None:
            return False
        block.region = region
        block.row = self._free_rows.pop()
        self.accounts.arrives(block.account, block.nbytes)
        fence = self.arena.fence()
        if block.host_ready and block.host is not None:
            self._begin(block, "copy")
            self.loader.copy(block.digest, block.info, block.host, region, fence)
        else:
            self._begin(block, "stream")
            self.loader.stream(block.digest, block.info, region, fence)
        return True

    def compact(self, want: int) -> int:
        """Moves blocks together until a hole of `want` bytes exists, as far as one poll may; bytes moved."""
        moved = self.arena.compact(self._compact_bytes, want)
        self.counters["moved_bytes"] += moved
        return moved

    def finish(self, completion: Completion) -> Block:
        """Takes the end of a job into account, failure included (but whom it concerns is not known here)."""
        block = self.block(completion.digest)
        block.job = None
        if completion.stage != "discard":
            self.counters["load_seconds"] += self._clock() - block.job_since
            self.counters["rebuilt"] += completion.rebuilt
        if completion.error is not None:
            self._fail(block, completion.error)
        elif completion.stage == "prepare":
            block.info = completion.info
        elif completion.stage == "read":
            block.host_ready = True
            self.on_host[block.digest] = block
        elif block.region is not None and block.row is not None and block.info is not None:
            self.arena.bind(block.row, block.region, block.info.entries)
            block.on_device = block.fresh = True
            self.on_device[block.digest] = block
            self.counters["loads"] += 1
            self.occupancy.arrived(block.digest, block.nbytes)
        return block

    def _begin(self, block: Block, stage: Stage) -> None:
        block.job = stage
        block.job_since = self._clock()

    def _fail(self, block: Block, error: LoraplexAdapterError) -> None:
        self.counters["load_failures"] += 1
        self.counters["damaged"] += isinstance(error, BlobDamaged)
        if block.region is not None and block.row is not None:
            self.arena.free(block.region)
            self._free_rows.append(block.row)
            self.accounts.leaves(block.account, block.nbytes)
            block.region = block.row = None
        self.evict_host(block, count=False)
        block.info = None
        block.failure = error

    # ------------------------------------------------------------ leaving

    def _host_candidates(self) -> Iterator[tuple[Block, int | None]]:
        """A block that is on the device as well is wanted there: no claim protects its copy in the slab."""
        for block in self.on_host.values():
            if block.job is None:
                yield block, None if block.on_device else self._claim(block.digest)

    @staticmethod
    def _victims(candidates: Iterator[tuple[Block, int | None]], claim: int | None) -> Iterator[Block]:
        """Those that may leave for a block with `claim` (None: nobody's): first the unclaimed in the order given
        (least recently used first), then those claimed by younger waiters, the youngest's first. As they are asked for:
        none may leave meanwhile."""
        claimed = []
        for block, other in candidates:
            if other is None:
                yield block
            elif claim is not None and other > claim:
                claimed.append((other, block))
        for _, block in sorted(claimed, key=lambda pair: -pair[0]):
            yield block

    def evict_device(self, block: Block, count: bool = True) -> None:
        if not block.on_device or block.region is None or block.row is None:
            return
        self.arena.unbind(block.row)
        self.arena.free(block.region)
        self._free_rows.append(block.row)
        self.accounts.leaves(block.account, block.nbytes)
        del self.on_device[block.digest]
        self.occupancy.left(block.digest)
        block.region = block.row = None
        block.on_device = False
        self.counters["evictions_device"] += count
        self._settle(block)

    def evict_host(self, block: Block, count: bool = True) -> None:
        if block.host is None:
            return
        self.slab.free(block.host)
        self.on_host.pop(block.digest, None)
        block.host, block.host_ready = None, False
        self.counters["evictions_host"] += count
        self._settle(block)

    def drop(self, block: Block) -> None:
        """Leaves both tiers; the block must be idle."""
        self.evict_device(block, count=False)
        self.evict_host(block, count=False)
        block.info = None

    def discard_file(self, block: Block) -> None:
        """Deletes the block file of its content; no block of that content may have been prepared."""
        self._begin(block, "discard")
        self.loader.discard(block.digest)

    def of_content(self, digest: str) -> list[Block]:
        """All blocks of this content, of any account."""
        return [block for block in self.blocks.values() if digest_of(block.digest) == digest]

    def forget_if_idle(self, block: Block) -> None:
        """Forgets a block of which nothing is held and that nobody wants."""
        if not self._kept(block):
            self.blocks.pop(block.digest, None)

    def _settle(self, block: Block) -> None:
        """Once in no tier, a block is read from its file again, so its layout is asked for again."""
        if not block.on_device and block.host is None and block.job is None:
            self.forget_if_idle(block)

    def _kept(self, block: Block) -> bool:
        held = block.on_device or block.host is not None or block.job is not None or bool(block.unloads)
        return held or self.failed(block) or self._wanted(block.digest)

    # ------------------------------------------------------------ checks

    def problems(self, leased: Mapping[str, int]) -> Iterator[str]:
        """What is inconsistent, one sentence each. `leased`: leases that name each digest."""
        rows = list(self._free_rows)
        arena_bytes = slab_bytes = 0
        accounts: dict[str, int] = {}
        for block in self.blocks.values():
            yield from self._block_problems(block, leased.get(block.digest, 0))
            if block.row is not None:
                rows.append(block.row)
            arena_bytes += block.region.nbytes if block.region is not None else 0
            if block.region is not None and block.account:
                accounts[block.account] = accounts.get(block.account, 0) + block.nbytes
            content = self.blocks.get(digest_of(block.digest))
            if block.info is not None and content is not None and content.job == "discard":
                yield f"{block.digest}: prepared while its file is deleted"
            slab_bytes += block.host.nbytes if block.host is not None else 0
        if sorted(rows) != list(range(self.arena.rows)):
            yield "rows are lost or doubled"
        if arena_bytes != self.arena.capacity - self.arena.free_bytes or slab_bytes != self.slab.used_bytes:
            yield "regions are lost"
        yield from self.accounts.problems(accounts)
        for digest in leased.keys() - self.blocks.keys():
            yield f"{digest}: leased but unknown"

    def _block_problems(self, block: Block, leases: int) -> Iterator[str]:
        copying = block.job in ("copy", "stream")
        checks = {
            "lease count": block.leases == leases,
            "leased but not on the device": block.on_device or not block.leases,
            "device list": block.on_device == (block.digest in self.on_device),
            "host list": block.host_ready == (block.digest in self.on_host),
            "region": (block.region is not None) == (block.on_device or copying),
            "row and region": (block.row is None) == (block.region is None),
            "arena row": block.row is None or block.on_device == (self.arena.region_of(block.row) is block.region),
            "host region": (block.host is not None) == (block.host_ready or block.job == "read"),
            "job on a resident block": not block.on_device or block.job is None,
            "layout": block.info is not None or not (block.on_device or block.host is not None),
            "kept for nothing": self._kept(block) or block.failure is not None,
        }
        return (f"{block.digest}: {name}" for name, ok in checks.items() if not ok)
