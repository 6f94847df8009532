"""The table of launch configurations: what it knows is used, what it does not know has a default that is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.kernels import tuning
from adapters.kernels.device_plan import RANK_BUCKETS, WALKED, rank_block
from adapters.kernels.tuning import ExpandConfig, ShrinkConfig


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "TUNED", tmp_path / "tuned.json")
    tuning.forget()
    yield tuning.TUNED
    tuning.forget()


def test_a_measured_case_is_used_whatever_the_model_s_shapes(table: Path) -> None:
    config = ShrinkConfig(16, 256, 1024, 8, 5, 3)
    tuning.save({tuning.key("shrink", 64, 16, 16): config}, {"device": "test"})
    assert tuning.shrink_config(64, 16, 16, 2) == config
    assert tuning.shrink_config(100, 16, 16, 2) == config
    # Few entries, another rank bucket, large tiles and float32 are other cases.
    assert tuning.shrink_config(4, 16, 16, 2) != config
    assert tuning.shrink_config(64, 32, 16, 2) != config
    assert tuning.shrink_config(2048, 16, 64, 2) != config
    assert tuning.shrink_config(64, 16, 16, 4) != config


def test_saving_keeps_what_was_known(table: Path) -> None:
    first, second = ExpandConfig(16, 128, 256, 4, 3, 4), ExpandConfig(16, 256, 256, 4, 3, 4)
    few, many = tuning.key("expand", 1, 16, 16), tuning.key("expand", 64, 16, 16)
    tuning.save({few: first}, {"device": "one"})
    tuning.save({many: second}, {"device": "another"})
    assert tuning.expand_config(1, 16, 16, 2) == first
    assert tuning.expand_config(64, 16, 16, 2) == second
    assert json.loads(table.read_text())["measured"] == {few: {"device": "one"}, many: {"device": "another"}}


def test_of_each_that_is_kept_it_is_said_where_it_was_measured() -> None:
    kept = json.loads(tuning.TUNED.read_text())
    assert kept["measured"].keys() == kept["configs"].keys()
    assert all(note.keys() == {"device", "torch", "triton"} for note in kept["measured"].values())


def check(shrink: ShrinkConfig, expand: ExpandConfig, block_m: int, element_size: int) -> None:
    """Triton wants powers of two, of at least 16 in products; a multiprocessor of Hopper has 227 KiB to share out."""
    for size in (shrink.block_r, shrink.block_k, expand.block_r, expand.block_n):
        assert size >= 16
        assert size & (size - 1) == 0
    assert expand.chunk % expand.block_n == 0
    assert all(1 <= shrink.splits(k) <= max(1, k // shrink.block_k) for k in (64, 576, 14336))
    tiles = (block_m + shrink.block_r) * shrink.block_k * shrink.num_stages
    assert tiles * element_size <= 227 << 10
    assert expand.block_r * expand.block_n * expand.num_stages * element_size <= 227 << 10


def check_walked(shrink: ShrinkConfig, expand: ExpandConfig, block_m: int, element_size: int) -> None:
    """Where expand walks the ranks, all splits of a block and all of a chunk's columns lie in shared memory, also with
    the inner size of a model of 72B."""
    assert expand.chunk & (expand.chunk - 1) == 0
    splits = max(shrink.splits(k) for k in (4096, 14336, 29568))
    stage = splits * block_m * expand.block_r * 4 + expand.block_r * expand.chunk * element_size
    assert stage * expand.num_stages <= 99 << 10
    assert shrink.block_r == rank_block(block_m)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("entries", "block_m"), [(1, 16), (8, 16), (64, 16), (512, 16), (513, 64), (8192, 64)])
@pytest.mark.parametrize("bucket", RANK_BUCKETS)
def test_defaults_are_valid(table: Path, bucket: int, entries: int, block_m: int, element_size: int) -> None:
    shrink = tuning.shrink_config(entries, bucket, block_m, element_size)
    expand = tuning.expand_config(entries, bucket, block_m, element_size)
    check(shrink, expand, block_m, element_size)
    if bucket > WALKED:
        check_walked(shrink, expand, block_m, element_size)


@pytest.mark.parametrize(("entries", "block_m"), [(1, 16), (64, 16), (513, 64)])
@pytest.mark.parametrize("bucket", RANK_BUCKETS)
def test_what_was_measured_is_valid(bucket: int, entries: int, block_m: int) -> None:
    shrink = tuning.shrink_config(entries, bucket, block_m, 2)
    expand = tuning.expand_config(entries, bucket, block_m, 2)
    check(shrink, expand, block_m, 2)
    if bucket > WALKED:
        check_walked(shrink, expand, block_m, 2)
