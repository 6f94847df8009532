"""Pages of the KV cache: who holds which, and which already hold the keys and values of a known prefix. No torch.

A page has room for `page_size` consecutive tokens of one sequence. Only full pages are ever shared. A full page is
found again by its hash, blake2b(hash of the page before it, its token ids), a chain that starts at the sequence's
cache root (tenant salt, adapters and weights): so equal hashes mean equal keys and values, and 256 bits keep
tenants apart even if one of them looks for collisions.

A page is in exactly one of three places:
    held      by one or more sequences (`_refs` > 0)
    idle      by none, but it holds a known prefix: found until its room is needed, least recently used first
    free      by none, and nothing worth keeping in it
Whoever holds a cached page holds its parent too, and pages of a sequence go idle last page first: hence a leaf
is always evicted before its parent, and no page is kept that the chain cannot reach.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from service.engine.errors import IntegrityError
from service.engine.messages import AdapterRef
from service.engine.request import Sequence

_HASH_BYTES = 32


def cache_root(salt: str, adapters: Iterable[AdapterRef]) -> bytes:
    """Start of a hash chain, 32 bytes: the same for the same tenant salt and the same mix in any order."""
    mix = sorted((each.digest, float(each.weight)) for each in adapters)
    return hashlib.blake2b(msgspec.msgpack.encode((salt, mix)), digest_size=_HASH_BYTES).digest()


def _page_hash(parent: bytes, tokens: list[int]) -> bytes:
    return hashlib.blake2b(parent + array.array("i", tokens).tobytes(), digest_size=_HASH_BYTES).digest()


@dataclass(slots=True)
class _Chain:
    """What the pool remembers of one sequence."""

    hashes: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as anybody asked."""
    committed: int = 0
    """Pages of it that lie in the prefix cache."""


class PagePool:
    """All pages of the device's KV cache, by number. Every call is O(pages touched)."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a KV cache of {num_pages} pages of {page_size} tokens holds nothing")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.query_tokens = 0
        """Prompt tokens for which a prefix was looked up, when their sequence was first admitted."""
        self.hit_tokens = 0
        """Those of them that were found."""
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._page_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._parent_of: list[bytes | None] = [None] * num_pages
        self._chains: dict[Sequence, _Chain] = {}

    # ------------------------------------------------------------ gauges

    @property
    def num_available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages that hold a known prefix, held or idle."""
        return len(self._page_of)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # ------------------------------------------------------------ allocation

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The cached pages that hold the beginning of `seq`, which holds none yet. At least one token is left to
        compute, since its logits are wanted; a prompt whose log-probabilities are wanted is computed in full."""
        if not self.prefix_caching or seq.prompt_logprobs is not None:
            return []
        found = []
        for i in range((len(seq.tokens) - 1) // self.page_size):
            page = self._page_of.get(self._hash(seq, i))
            if page is None:
                break
            found.append(page)
        return found

    def can_allocate(self, seq: Sequence, num_tokens: int, reserve: int = 0) -> bool:
        """Whether allocate(seq, num_tokens) would succeed and leave `reserve` pages available."""
        held = seq.pages or self.match_prefix(seq)
        revived = 0 if seq.pages else sum(page in self._idle for page in held)
        return self.pages_for(num_tokens) - len(held) + revived + reserve <= self.num_available

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Give `seq` pages for its first `num_tokens` tokens. If it holds none yet, the cached prefix is among
        them, and `num_computed` and `cached_tokens` are set to its length. Ask can_allocate before."""
        if not seq.pages:
            prefix = self.match_prefix(seq)
            for page in prefix:
                self._hold(page)
            seq.pages = prefix
            seq.num_computed = len(prefix) * self.page_size
            self._chain(seq).committed = len(prefix)
            if seq.preemptions == 0:  # what a preempted sequence finds again is its own
                seq.cached_tokens = seq.num_computed
                self.query_tokens += len(seq.tokens)
                self.hit_tokens += seq.num_computed
        while len(seq.pages) < self.pages_for(num_tokens):
            seq.pages.append(self._take())

    def commit(self, seq: Sequence) -> None:
        """Make the pages of `seq` that have become full findable. Where another sequence has computed the same
        page meanwhile, that one is used and ours is given back: so the chain's pages are held together."""
        if not self.prefix_caching:
            return
        chain = self._chain(seq)
        for i in range(chain.committed, seq.num_computed // self.page_size):
            page, key = seq.pages[i], self._hash(seq, i)
            known = self._page_of.get(key)
            if known is None:
                self._page_of[key] = page
                self._hash_of[page] = key
                self._parent_of[page] = chain.hashes[i - 1] if i else None
            else:
                self._hold(known)
                self._release(page)
                seq.pages = [*seq.pages[:i], known, *seq.pages[i + 1 :]]
            chain.committed = i + 1

    def free(self, seq: Sequence) -> None:
        """Take everything from `seq`. Also for a sequence that never got pages: it is forgotten."""
        for page in reversed(seq.pages):
            self._release(page)
        seq.pages = []
        seq.num_computed = 0
        self._chains.pop(seq, None)

    # ------------------------------------------------------------ pages

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._refs[page] += 1

    def _release(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._hash_of[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page = next(iter(self._idle))
            del self._idle[page]
            key = self._hash_of[page]
            if key is not None:
                del self._page_of[key]
            self._hash_of[page] = self._parent_of[page] = None
        else:
            raise IntegrityError("a page was taken though none is available: can_allocate was not asked")
        self._refs[page] = 1
        return page

    def _chain(self, seq: Sequence) -> _Chain:
        chain = self._chains.get(seq)
        if chain is None:
            chain = self._chains[seq] = _Chain()
        return chain

    def _hash(self, seq: Sequence, i: int) -> bytes:
        hashes = self._chain(seq).hashes
        while len(hashes) <= i:
            begin = len(hashes) * self.page_size
            parent = hashes[-1] if hashes else seq.cache_root
            hashes.append(_page_hash(parent, seq.tokens[begin : begin + self.page_size]))
        return hashes[i]

    # ------------------------------------------------------------ the truth

    def check_integrity(self, sequences: Iterable[Sequence] = ()) -> None:
        """Raises IntegrityError unless the book-keeping agrees with itself and `sequences`, all that hold pages."""
        refs = [0] * self.num_pages
        for seq in sequences:
            if len(set(seq.pages)) != len(seq.pages):
                raise IntegrityError(f"{seq.request_id}/{seq.index} holds a page twice: {seq.pages}")
            if self.pages_for(seq.num_computed) > len(seq.pages):
                raise IntegrityError(f"{seq.request_id}/{seq.index} has computed more tokens than its pages hold")
            for i, page in enumerate(seq.pages):
                refs[page] += 1
                key = self._hash_of[page]
                if key is None and self._refs[page] > 1:
                    raise IntegrityError(f"page {i} of {seq.request_id}/{seq.index} is shared before it is full")
                if key is not None and key != self._hash(seq, i):
                    raise IntegrityError(f"page {i} of {seq.request_id}/{seq.index} is another prefix's")
        if refs != self._refs:
            wrong = [page for page in range(self.num_pages) if refs[page] != self._refs[page]]
            raise IntegrityError(f"reference counts of pages {wrong[:8]} differ from what sequences hold")
        unheld = [page for page in range(self.num_pages) if refs[page] == 0]
        if sorted([*self._free, *self._idle]) != unheld:
            raise IntegrityError("free and idle pages are not exactly those that nobody holds")
        if any(self._hash_of[page] is not None for page in self._free):
            raise IntegrityError("a free page is still in the prefix cache")
        if {key: page for page, key in enumerate(self._hash_of) if key is not None} != self._page_of:
            raise IntegrityError("the prefix cache and its pages disagree")
        if any(self._hash_of[page] is None for page in self._idle):
            raise IntegrityError("an idle page holds no known prefix")
        if any(parent is not None and parent not in self._page_of for parent in self._parent_of):
            raise IntegrityError("a cached page's parent is gone, so that it cannot be found")
