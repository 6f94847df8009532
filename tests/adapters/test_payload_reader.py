"""Real files and real threads, with pieces of 4096 bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from adapters import block
from adapters.errors import BlobDamaged
from adapters.payload_reader import PayloadReader
from adapters.tiers import BlockInfo, RowEntries

PIECE = 4096
START = 8192
"""Of the payload in the file."""
DIGEST = "0" * 64
SECONDS = 60
"""Far more than anything here takes; only a failing test waits so long."""
SENTINEL = 0xA5

WithReaders = Callable[[int], PayloadReader]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loraplex-reads")]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "CHECKED_BYTES", PIECE)


@pytest.fixture
def on_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[WithReaders]:
    """The reader of a process that may use so many cores."""
    made: list[PayloadReader] = []

    def build(cores: int) -> PayloadReader:
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
            made.append(PayloadReader())
        return made[-1]

    yield build
    for reader in made:
        reader.close()
    assert threads() == []


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[int], tuple[BlockInfo, bytes]]:
    """A payload of so many bytes behind a header, and what is in it."""

    def write(nbytes: int) -> tuple[BlockInfo, bytes]:
        payload = np.random.default_rng(nbytes).bytes(nbytes)
        path = tmp_path / f"{DIGEST}.block"
        path.write_bytes(bytes(START) + payload)
        entries = RowEntries.of((), 0)
        return BlockInfo(path, START, nbytes, block.checksums(memoryview(payload)), entries), payload

    return write


def buffer(nbytes: int) -> memoryview:
    """With a piece on both sides which nobody may touch: `[PIECE:-PIECE]` is for the payload."""
    return memoryview(bytearray([SENTINEL]) * (nbytes + 2 * PIECE))


def untouched(memory: memoryview) -> bool:
    return bytes(memory[:PIECE]) == bytes(memory[-PIECE:]) == bytes([SENTINEL]) * PIECE


@pytest.mark.parametrize(("cores", "readers"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (16, 4), (64, 4)])
def test_half_of_the_cores_read_and_no_more_than_four(on_cores: WithReaders, cores: int, readers: int) -> None:
    on_cores(cores)
    assert len(threads()) == readers - 1, "one is who asks"


@pytest.mark.parametrize("cores", [1, 4, 6, 8])
@pytest.mark.parametrize("nbytes", [0, 8, PIECE - 8, PIECE, PIECE + 8, 3 * PIECE, 4 * PIECE + 16, 11 * PIECE - 24])
def test_every_byte_comes_to_its_place(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], cores: int, nbytes: int
) -> None:
    reader, (info, payload) = on_cores(cores), stored(nbytes)
    for _ in range(3):
        memory = buffer(nbytes)
        reader.read(info, memory[PIECE : PIECE + nbytes], DIGEST)
        assert bytes(memory[PIECE : PIECE + nbytes]) == payload
        assert untouched(memory)


def test_four_pieces_are_read_at_the_same_time(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, (info, payload), memory = on_cores(8), stored(4 * PIECE), buffer(4 * PIECE)
    together, preadv = threading.Barrier(4), os.preadv

    def met(descriptor: int, buffers: list[memoryview], position: int) -> int:
        together.wait(SECONDS)
        return preadv(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", met)
    reader.read(info, memory[PIECE:-PIECE], DIGEST)
    assert bytes(memory[PIECE:-PIECE]) == payload


def test_what_the_kernel_gives_in_small_parts_is_put_together(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, (info, payload), memory = on_cores(8), stored(5 * PIECE + 8), buffer(5 * PIECE + 8)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: preadv(descriptor, [buffers[0][:1000]], at))
    reader.read(info, memory[PIECE:-PIECE], DIGEST)
    assert bytes(memory[PIECE:-PIECE]) == payload


@pytest.mark.parametrize("cores", [1, 4, 8])
def test_a_wrong_bit_in_any_piece_is_found(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], cores: int
) -> None:
    reader, (info, payload) = on_cores(cores), stored(10 * PIECE + 24)
    good = info.path.read_bytes()
    for number in range(11):
        begin, end = number * PIECE, min((number + 1) * PIECE, info.nbytes)
        for position in (begin, (begin + end) // 2, end - 1):
            damaged = bytearray(good)
            damaged[START + position] ^= 1
            info.path.write_bytes(damaged)
            memory = buffer(info.nbytes)
            with pytest.raises(BlobDamaged, match="the payload of its block file is damaged") as caught:
                reader.read(info, memory[PIECE:-PIECE], DIGEST)
            assert caught.value.digest == DIGEST
            assert untouched(memory)
    # Two pieces in each other's place, each of them sound.
    info.path.write_bytes(good[:START] + payload[PIECE : 2 * PIECE] + payload[:PIECE] + payload[2 * PIECE :])
    with pytest.raises(BlobDamaged, match="damaged"):
        reader.read(info, buffer(info.nbytes)[PIECE:-PIECE], DIGEST)
    # The reader is none the worse for all this.
    info.path.write_bytes(good)
    memory = buffer(info.nbytes)
    reader.read(info, memory[PIECE:-PIECE], DIGEST)
    assert bytes(memory[PIECE:-PIECE]) == payload


@pytest.mark.parametrize("cores", [1, 4, 8])
@pytest.mark.parametrize("missing", [1, 24, PIECE, PIECE + 24, 5 * PIECE, 10 * PIECE + 23, 10 * PIECE + 24])
def test_what_is_missing_at_the_end_is_told_to_the_byte(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], cores: int, missing: int
) -> None:
    """Whoever finds it first: several readers come to the end of such a file."""
    reader, (info, _) = on_cores(cores), stored(10 * PIECE + 24)
    os.truncate(info.path, START + info.nbytes - missing)
    for _ in range(5):
        with pytest.raises(BlobDamaged, match=f"its block file ends {missing} bytes too early"):
            reader.read(info, buffer(info.nbytes)[PIECE:-PIECE], DIGEST)


@pytest.mark.parametrize("cores", [1, 8])
def test_files_that_cannot_be_read(
    on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]], cores: int
) -> None:
    reader, (info, _) = on_cores(cores), stored(6 * PIECE)
    memory = buffer(info.nbytes)[PIECE:-PIECE]
    info.path.unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(info, memory, DIGEST)
    info.path.symlink_to("/proc/self/mem")  # reading its first pages is EIO, as a bad sector is
    with pytest.raises(BlobDamaged, match=r"its block file cannot be read: .*Errno 5"):
        reader.read(info, memory, DIGEST)
    info.path.unlink()
    info.path.mkdir()
    with pytest.raises(IsADirectoryError):
        reader.read(info, memory, DIGEST)


@pytest.mark.parametrize("slow", [0, 3])
def test_a_failure_is_told_when_nobody_writes_any_more(
    on_cores: WithReaders,
    stored: Callable[[int], tuple[BlockInfo, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    slow: int,
) -> None:
    """Both when the caller's own piece is the slow one, and when a helper's is; the other of the two is damaged."""
    reader, (info, _) = on_cores(8), stored(4 * PIECE)
    damaged = 3 - slow
    data = bytearray(info.path.read_bytes())
    data[START + damaged * PIECE] ^= 1
    info.path.write_bytes(data)
    entered, may_go_on, order, preadv = threading.Event(), threading.Event(), [], os.preadv

    def held(descriptor: int, buffers: list[memoryview], position: int) -> int:
        if position == START + slow * PIECE:
            entered.set()
            assert may_go_on.wait(SECONDS)
            count = preadv(descriptor, buffers, position)
            order.append("written")
            return count
        assert entered.wait(SECONDS)
        return preadv(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", held)
    memory = buffer(info.nbytes)

    def ask() -> None:
        try:
            reader.read(info, memory[PIECE:-PIECE], DIGEST)
        except BlobDamaged:
            order.append("told")

    asking = threading.Thread(target=ask)
    asking.start()
    assert entered.wait(SECONDS)
    # Long enough for the failure to be told too early, if that were possible.
    asking.join(0.3)
    may_go_on.set()
    asking.join(SECONDS)
    assert order == ["written", "told"]


def test_several_may_read_at_once(on_cores: WithReaders, stored: Callable[[int], tuple[BlockInfo, bytes]]) -> None:
    reader, (info, payload) = on_cores(8), stored(9 * PIECE)
    found: list[bytes] = []

    def ask() -> None:
        for _ in range(20):
            memory = buffer(info.nbytes)
            reader.read(info, memory[PIECE:-PIECE], DIGEST)
            found.append(bytes(memory[PIECE:-PIECE]))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    assert found == [payload] * 60
