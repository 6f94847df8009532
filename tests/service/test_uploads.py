"""The spool: any body, cut anywhere, ends as files or as a clear refusal, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from service import uploads
from service.api.failure import ApiError
from service.library import FIELDS
from service.uploads import FieldRule, Form, Spool, safe_basename

from .adapter_helpers import ROOT

LIMIT = 1 << 20
RULES = {
    "name": FieldRule(64),
    "config": FieldRule(1000, file=True),
    "weights": FieldRule(0, file=True, repeatable=True),
}
BOUNDARY = b"----boundary1234"


def part(name: str, data: bytes, filename: str | None = None, *more: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        disposition += f'; filename="{filename}"'
    return b"\r\n".join([b"--" + BOUNDARY, disposition.encode(), *more, b"", data, b""])


END = b"--" + BOUNDARY + b"--\r\n"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "uploads", LIMIT)
    yield opened
    opened.close()
    assert list((tmp_path / "uploads").iterdir()) == []


def left(spool: Spool) -> list[Path]:
    return [path for path in spool._home.rglob("*") if path.name != uploads.LOCK_FILE]


def request_of(pieces: list[bytes | None], **headers: str) -> Request:
    """A request whose body comes in these pieces; None: the client goes away."""
    messages: Iterator[Message] = iter(
        [
            {"type": "http.disconnect"} if piece is None else {"type": "http.request", "body": piece, "more_body": True}
            for piece in pieces
        ]
        + [{"type": "http.request", "body": b"", "more_body": False}]
    )

    async def receive() -> Message:
        return next(messages)

    all_headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(key.encode(), value.encode()) for key, value in all_headers.items()],
    }
    return Request(scope, receive)


@asynccontextmanager
async def received(spool: Spool, pieces: list[bytes | None], **headers: str) -> AsyncIterator[Form]:
    async with spool.receive(request_of(pieces, **headers), RULES) as form:
        yield form
    assert left(spool) == []


async def refused(spool: Spool, *pieces: bytes | None, **headers: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        async with spool.receive(request_of(list(pieces), **headers), RULES):
            pytest.fail("it was accepted")
    assert left(spool) == []
    return caught.value


async def test_bytes_arrive_unchanged_however_they_are_cut(spool: Spool) -> None:
    draw = random.Random(5)
    # Data that is full of what looks like the beginning of a boundary.
    near = b"\r\n--" + BOUNDARY
    tricky = b"".join(near[: draw.randrange(1, len(near))] + draw.randbytes(draw.randrange(3)) for _ in range(300))
    body = (
        part("name", "häus".encode())
        + part("weights", tricky, "a.safetensors", b"Content-Type: application/octet-stream")
        + part("config", b"", "adapter_config.json")
        + part("weights", tricky[::-1], "../../etc/passwd")
        + END
        + b"epilogue"
    )
    for _ in range(30):
        cuts = sorted(draw.randrange(len(body)) for _ in range(draw.randrange(40)))
        pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        async with received(spool, list(pieces)) as form:
            assert form.fields == {"name": "häus"}
            assert [(f.filename, f.path.read_bytes(), f.bytes) for f in form.files["weights"]] == [
                ("a.safetensors", tricky, len(tricky)),
                ("../../etc/passwd", tricky[::-1], len(tricky)),
            ]
            assert form.files["config"][0].path.read_bytes() == b""
            inside = spool._home
            assert all(f.path.resolve().is_relative_to(inside) for fs in form.files.values() for f in fs)


async def test_pieces_larger_than_the_writing_buffer(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "uploads", 64 << 20)
    data = random.Random(1).randbytes(5 << 20)
    async with received(spool, [part("weights", data), END]) as form:
        assert form.files["weights"][0].path.read_bytes() == data
    spool.close()


@pytest.mark.parametrize("keep", [0, 10, 40, 90, 100, 130, -1, -3, -20])
async def test_a_body_that_was_cut_off(spool: Spool, keep: int) -> None:
    body = part("name", b"x") + part("weights", b"y" * 50, "a") + END.rstrip()
    error = await refused(spool, body[:keep] if keep else b"")
    assert (error.status, error.code) == (400, "invalid_multipart")


async def test_a_client_that_goes_away(spool: Spool) -> None:
    with pytest.raises(ClientDisconnect):
        async with received(spool, [part("weights", b"y" * 5000, "a")[:4000], None]):
            pytest.fail("it was accepted")
    assert left(spool) == []


async def test_a_cancelled_upload_leaves_nothing(spool: Spool) -> None:
    inside = asyncio.Event()

    async def upload() -> None:
        async with received(spool, [part("weights", b"y" * 5000, "a"), END]):
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(upload())
    await inside.wait()
    assert left(spool) != []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    spool._threads.submit(int).result()
    assert left(spool) == []


async def test_a_client_that_stalls(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "IDLE_TIMEOUT_S", 0.05)
    request = request_of([part("weights", b"y" * 5000, "a")])
    first = True

    async def receive() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": part("weights", b"y", "a"), "more_body": True}
        await asyncio.sleep(60)
        raise RuntimeError("the timeout did not hold")

    stalled = Request(request.scope, receive)
    with pytest.raises(ApiError) as caught:
        async with spool.receive(stalled, RULES):
            pytest.fail("it was accepted")
    assert caught.value.status == 408
    assert left(spool) == []


async def test_size_limits(spool: Spool) -> None:
    error = await refused(spool, part("weights", b"y" * LIMIT, "a") + END)
    assert (error.status, error.code) == (413, "upload_too_large")
    error = await refused(spool, content_length=str(LIMIT + 1))  # before a byte was read
    assert (error.status, error.code) == (413, "upload_too_large")
    error = await refused(spool, part("name", b"y" * 65) + END)
    assert (error.status, error.code, error.param) == (413, "field_too_large", "name")
    error = await refused(spool, part("config", b"y" * 1001, "c") + END)
    assert (error.status, error.param) == (413, "config")
    async with received(spool, [part("config", b"y" * 1000, "c") + part("name", b"n" * 64) + END]) as form:
        assert form.files["config"][0].bytes == 1000


async def test_too_many_parts_and_headers(spool: Spool) -> None:
    error = await refused(spool, part("weights", b"", "a") * (uploads.MAX_PARTS + 1) + END)
    assert error.status == 400
    assert "parts" in error.message
    for more in ([b"X-%d: y" % i for i in range(30)], [b"X-Long: " + b"y" * 5000]):
        error = await refused(spool, part("weights", b"", "a", *more) + END)
        assert error.status == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (part("surprise", b"x") + END, "surprise"),
        (part("name", b"x") + part("name", b"y") + END, "name"),
        (part("config", b"x", "c") + part("config", b"y", "c") + END, "config"),
        (part("name", b"\xff\xfe") + END, "name"),
        (b"--" + BOUNDARY + b"\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END, None),
        (part("weights", b"x", "a", b"Content-Transfer-Encoding: base64") + END, None),
        (b"--" + BOUNDARY + b"\r\nbad header\r\n\r\nx\r\n" + END, None),
        (b"this is no multipart body", None),
    ],
)
async def test_malformed_forms(spool: Spool, body: bytes, param: str | None) -> None:
    error = await refused(spool, body)
    assert (error.status, error.code, error.param) == (400, "invalid_multipart", param)


async def test_content_types(spool: Spool) -> None:
    for kind in ("text/plain", "application/octet-stream", "multipart/mixed; boundary=x", ""):
        assert (await refused(spool, content_type=kind)).status == 415
    assert (await refused(spool, content_encoding="gzip")).status == 415
    assert (await refused(spool, content_type="multipart/form-data")).status == 400
    assert (await refused(spool, content_type=f"multipart/form-data; boundary={'x' * 300}")).status == 400


@pytest.mark.parametrize("seed", range(60))
async def test_damaged_bodies_are_refused_or_received(spool: Spool, seed: int) -> None:
    """Random damage never ends in anything but a form or an ApiError below 500."""
    draw = random.Random(seed)
    body = bytearray(part("name", b"x") + part("weights", b"y" * 200, "a") + part("config", b"{}", "c") + END)
    for _ in range(draw.randrange(1, 6)):
        position = draw.randrange(len(body))
        match draw.randrange(3):
            case 0:
                body[position] = draw.randrange(256)
            case 1:
                del body[position : position + draw.randrange(20)]
            case 2:
                body[position:position] = draw.randbytes(draw.randrange(10))
    status = 200
    try:
        async with received(spool, [bytes(body)]) as form:
            assert form.fields.keys() | form.files.keys() <= RULES.keys()
    except ApiError as error:
        status = error.status
    assert status in (200, 400, 413)
    assert left(spool) == []


def test_the_sweep_spares_the_living(tmp_path: Path) -> None:
    root = tmp_path / "uploads"
    code = (
        "import sys, time; from pathlib import Path; from service.uploads import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 1); (spool._home / 'upload').mkdir(); print('up', flush=True)\n"
        "input(); spool.serve(); print('serving', flush=True); time.sleep(60)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, root], cwd=ROOT, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            (root / "stray file").write_bytes(b"x")
            spool = Spool(root, LIMIT)
            assert spool.sweep() == 1
            assert spool.alone(), "the other one has not begun to serve"
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "serving\n"
            assert not spool.alone()
            assert len(list(root.iterdir())) == 2
        finally:
            process.kill()
            process.wait()
    deadline = time.monotonic() + 60
    while spool.sweep() != 1:
        assert time.monotonic() < deadline
    assert spool.alone()
    assert list(root.iterdir()) == [spool._home]
    spool.close()
    shutil.rmtree(root)


def test_a_sweep_may_meet_a_process_that_closes(tmp_path: Path) -> None:
    """Both delete the folder of the one that closes: the lock is let go of before the folder is gone."""
    spool = Spool(tmp_path, LIMIT)
    for _ in range(20):
        closing = Spool(tmp_path, LIMIT)
        for number in range(300):
            (closing._home / f"upload-{number}").mkdir()
        with ThreadPoolExecutor(1) as threads:
            closed = threads.submit(closing.close)
            while not closed.done():
                spool.sweep()
            closed.result()
        assert list(tmp_path.iterdir()) == [spool._home]
    spool.close()


def test_client_file_names() -> None:
    assert safe_basename("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    assert safe_basename("C:\\x\\a.safetensors") == "a.safetensors"
    assert safe_basename("../../a.safetensors") == "a.safetensors"
    for name in ("", "..", ".hidden", "a b", "a\0b", "ä.safetensors", "x" * 300, "dir/"):
        assert safe_basename(name) is None


def test_every_field_of_an_upload_is_bounded() -> None:
    assert [name for name, rule in FIELDS.items() if rule.max_bytes == 0] == ["weights"]
