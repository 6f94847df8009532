"""Pages: sharing, eviction order, and books that balance after any sequence of calls."""

from __future__ import annotations

import random

import pytest

from service.engine.errors import IntegrityError
from service.engine.kv_cache import PagePool, cache_root
from service.engine.messages import AdapterRef, SamplingParams
from service.engine.request import Sequence


def make(tokens: list[int], root: bytes = b"root", **more: object) -> Sequence:
    return Sequence("r", 0, b"", list(tokens), len(tokens), SamplingParams(), 0, cache_root=root, **more)  # type: ignore[arg-type]


def fill(pool: PagePool, seq: Sequence) -> None:
    """Allocate for, "compute" and commit all tokens."""
    assert pool.can_allocate(seq, len(seq.tokens))
    pool.allocate(seq, len(seq.tokens))
    seq.num_computed = len(seq.tokens)
    pool.commit(seq)


def test_full_pages_are_shared_and_the_partial_one_is_not() -> None:
    pool = PagePool(10, 4)
    first, second = make(list(range(10))), make(list(range(10)))
    fill(pool, first)
    pool.allocate(second, 10)
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert second.num_computed == second.cached_tokens == 8
    assert pool.num_used == 4
    pool.check_integrity([first, second])


def test_one_token_is_always_left_to_compute() -> None:
    pool = PagePool(10, 4)
    first, second = make(list(range(8))), make(list(range(8)))
    fill(pool, first)
    pool.allocate(second, 8)
    assert second.num_computed == 4
    assert len(second.pages) == 2


@pytest.mark.parametrize(
    "root",
    [
        cache_root("other", [AdapterRef("a", 1.0)]),
        cache_root("tenant", [AdapterRef("b", 1.0)]),
        cache_root("tenant", [AdapterRef("a", 0.5)]),
        cache_root("tenant", [AdapterRef("a", 1.0), AdapterRef("a", 1.0)]),
        cache_root("tenant", []),
        cache_root("tenanta", []),
        cache_root("", [AdapterRef("tenanta", 1.0)]),
    ],
)
def test_nothing_is_shared_across_tenants_adapters_or_weights(root: bytes) -> None:
    pool = PagePool(10, 4)
    fill(pool, make(list(range(9)), cache_root("tenant", [AdapterRef("a", 1.0)])))
    assert pool.match_prefix(make(list(range(9)), root)) == []
    assert len(pool.match_prefix(make(list(range(9)), cache_root("tenant", [AdapterRef("a")])))) == 2


def test_a_mix_has_the_same_root_in_any_order() -> None:
    a, b = AdapterRef("a", 0.25), AdapterRef("b", 0.75)
    assert cache_root("t", [a, b]) == cache_root("t", [b, a])
    assert cache_root("t", [a, b]) != cache_root("t", [AdapterRef("a", 0.75), AdapterRef("b", 0.25)])


def test_a_page_is_its_tokens_and_all_before_them() -> None:
    pool = PagePool(10, 4)
    fill(pool, make([1, 2, 3, 4, 5, 6, 7, 8]))
    assert len(pool.match_prefix(make([1, 2, 3, 4, 5, 6, 7, 8, 9]))) == 2
    assert len(pool.match_prefix(make([1, 2, 3, 4, 5, 6, 7, 9, 9]))) == 1
    assert pool.match_prefix(make([0, 2, 3, 4, 5, 6, 7, 8, 9])) == []
    assert pool.match_prefix(make([5, 6, 7, 8, 9])) == []


def test_wanted_prompt_logprobs_and_switched_off_caching_find_nothing() -> None:
    pool = PagePool(10, 4)
    fill(pool, make(list(range(9))))
    assert pool.match_prefix(make(list(range(9)), prompt_logprobs=[None])) == []
    off = PagePool(10, 4, prefix_caching=False)
    first = make(list(range(9)))
    fill(off, first)
    off.free(first)
    assert off.match_prefix(make(list(range(9)))) == []
    assert off.num_cached == 0


def test_freed_pages_stay_findable_and_go_leaf_first_oldest_first() -> None:
    pool = PagePool(6, 2)
    old, new = make([1, 2, 3, 4, 5, 6]), make([7, 8, 9, 10])
    fill(pool, old)
    fill(pool, new)
    pool.free(old)
    pool.free(new)
    assert pool.num_available == 6
    assert pool.num_cached == 5
    other = make([20] * 4)
    fill(pool, other)  # one free page, then the oldest leaf
    assert len(pool.match_prefix(make([1, 2, 3, 4, 5, 6, 0]))) == 2
    fill(pool, make([30] * 2))
    assert len(pool.match_prefix(make([1, 2, 3, 4, 5, 6, 0]))) == 1
    assert len(pool.match_prefix(make([7, 8, 9, 10, 0]))) == 2


def test_a_hit_revives_idle_pages_which_then_cannot_be_evicted() -> None:
    pool = PagePool(4, 2)
    first = make([1, 2, 3, 4, 5])
    fill(pool, first)
    pool.free(first)
    again = make([1, 2, 3, 4, 6, 7])
    assert pool.can_allocate(again, 6)
    assert pool.can_allocate(again, 6, reserve=1)
    assert not pool.can_allocate(again, 6, reserve=2)
    pool.allocate(again, 6)
    assert not pool.can_allocate(make([9] * 4), 4)
    assert pool.can_allocate(make([9] * 2), 2)
    pool.check_integrity([again])


def test_pages_computed_twice_become_one_when_they_are_full() -> None:
    pool = PagePool(8, 4)
    first, second = make(list(range(9))), make(list(range(9)))
    pool.allocate(first, 9)
    pool.allocate(second, 9)
    assert pool.num_used == 6
    seen = second.pages
    was = list(seen)
    for seq in (first, second):
        seq.num_computed = 9
        pool.commit(seq)
    assert first.pages[:2] == second.pages[:2]
    assert second.pages is not seen == was, "a list of pages only grows"
    assert pool.num_used == 4
    pool.check_integrity([first, second])
    pool.free(first)
    pool.check_integrity([second])


def test_a_pool_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pages"):
        PagePool(0, 16)


def test_integrity_notices_a_page_held_in_secret() -> None:
    pool = PagePool(4, 4)
    seq = make(list(range(6)))
    fill(pool, seq)
    with pytest.raises(IntegrityError, match="reference counts"):
        pool.check_integrity([])
    seq.tokens[0] = 99
    pool._chains.clear()
    with pytest.raises(IntegrityError, match="another prefix"):
        pool.check_integrity([seq])


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_calls_leaves_the_books_balanced(seed: int) -> None:
    """Also: what match_prefix finds holds exactly those tokens (contents are tracked beside the pool)."""
    rng = random.Random(seed)
    pool = PagePool(rng.randint(4, 24), rng.choice([1, 2, 4]))
    contents: dict[int, tuple[int, ...]] = {}
    live: list[Sequence] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.4 or not live:
            seq = make([rng.randrange(2) for _ in range(rng.randint(1, 20))], root=rng.choice([b"a", b"b"]))
            if pool.can_allocate(seq, len(seq.tokens)):
                for i, page in enumerate(pool.match_prefix(seq)):
                    assert contents[page] == (seq.cache_root[0], *seq.tokens[: (i + 1) * pool.page_size])
                pool.allocate(seq, len(seq.tokens))
                live.append(seq)
            else:
                pool.free(seq)
        elif action < 0.8:
            seq = rng.choice(live)
            if seq.num_uncomputed == 0:
                seq.tokens.append(rng.randrange(2))
            if pool.can_allocate(seq, len(seq.tokens)):
                pool.allocate(seq, len(seq.tokens))
                seq.num_computed += rng.randint(1, seq.num_uncomputed)
                for i in range(seq.num_computed // pool.page_size):
                    contents[seq.pages[i]] = (seq.cache_root[0], *seq.tokens[: (i + 1) * pool.page_size])
                pool.commit(seq)
        else:
            seq = live.pop(rng.randrange(len(live)))
            pool.free(seq)
        pool.check_integrity(live)
    for seq in live:
        pool.free(seq)
    pool.check_integrity()
    assert pool.num_available == pool.num_pages
    assert not pool._chains
