"""The client where things go wrong: refusals, retries, connections that are cut, files that are not what they were."""

from __future__ import annotations

import hashlib
import json
import pickle
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import client as api
from service.wire import errors
from service.wire.sse import Decoder
from tests.service.client_helpers import Both, Exchange, adapter_json, peft_folder, scripted
from tests.service.inference_helpers import ROOT

Connect = Callable[..., Both]
OK = {"object": "list", "data": [], "has_more": False, "last_id": None}


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    made: list[Both] = []

    def to(url: str, **options: Any) -> Both:
        made.append(Both(request.param, url, **options))
        return made[-1]

    yield to
    for both in made:
        both.close()


# ---------------------------------------------------------------- the tree of errors


def leaves(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*map(leaves, kind.__subclasses__()))


def test_every_error_is_drawn_and_exported() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or "")) | {"LoraplexError"}
    assert drawn == {kind.__name__ for kind in leaves(errors.LoraplexError)}
    assert drawn <= set(api.__all__)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, api.BadRequest), (401, api.Unauthorized), (403, api.Forbidden), (404, api.NotFound), (409, api.Conflict),
        (412, api.Conflict), (413, api.TooLarge), (415, api.BadRequest), (422, api.Refused), (429, api.RateLimited),
        (500, api.ServerError), (502, api.Unavailable), (503, api.Unavailable), (504, api.Unavailable),
        (507, api.ServerError),
    ],
)  # fmt: skip
def test_every_status_has_its_error(status: int, kind: type[api.ApiError]) -> None:
    def no(exchange: Exchange) -> None:
        headers = {"X-Request-Id": "r1"}
        exchange.refuse(status, headers, message="because", code="c", param="p", reasons=["one", "two"])

    with scripted(no) as (url, seen), api.Loraplex(url) as client:
        with pytest.raises(api.ApiError) as caught:
            client.version()
        error = caught.value
        assert type(error) is kind
        assert (error.status, error.message, error.code, error.param) == (status, "because", "c", "p")
        assert (error.reasons, error.request_id, error.retry_after) == (("one", "two"), "r1", None)
        assert len(seen) == 1  # no Retry-After: it is not tried again
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.reasons, str(copy)) == (kind, error.reasons, "because")


def test_answers_of_another_server(connect: Connect) -> None:
    pages: list[tuple[Callable[[Exchange], None], type[Exception], str]] = [
        (lambda x: x.answer(200, b"<html>hello"), api.ProtocolError, "is this a loraplex server"),
        (lambda x: x.answer(200, [1]), api.ProtocolError, "in place of a ServerVersion"),
        (lambda x: x.answer(200, {"python": "3"}), api.ProtocolError, "'version'"),
        (lambda x: x.answer(502, b"<html>Bad  Gateway"), api.Unavailable, "HTTP 502: <html>Bad Gateway"),
        (lambda x: x.answer(301, b"", {"Location": "https://there/"}), api.ApiError, "redirect to https://there/"),
        (lambda x: x.answer(418, {"error": "text"}), api.BadRequest, "HTTP 418"),
    ]
    for answer, kind, message in pages:
        with scripted(answer) as (url, _):
            both = connect(url)
            with pytest.raises(kind, match=re.escape(message)):
                both.do(both.client.version())


def test_where_no_server_is(connect: Connect, free_port: Callable[[], int]) -> None:
    both = connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(api.ConnectionFailed, match="cannot reach http://127"):
        both.do(both.client.version())
    assert both.do(both.client.ready()) is False
    with pytest.raises(api.TimedOut, match=r"not ready after 0\.3 s: cannot reach"):
        both.do(both.client.wait_until_ready(0.3))


def test_a_server_that_does_not_answer_in_time(connect: Connect) -> None:
    silent = threading.Event()
    with scripted(lambda x: silent.wait(30) and None) as (url, _):
        both = connect(url, timeout_s=0.2)
        with pytest.raises(api.TimedOut, match="no answer"):
            both.do(both.client.version())
        silent.set()


def test_urls_and_keys(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    for wrong in ("localhost:8000", "ftp://x", "http://", "nonsense", "http://[::1"):
        with pytest.raises(ValueError, match="URL"):
            connect(wrong)
    with pytest.raises(ValueError, match="LORAPLEX_KEY") as caught:
        connect("http://x", key="secret\r\nX-Evil: 1")
    assert "secret" not in str(caught.value)
    assert connect("http://x:1/v1/").client.url == "http://x:1"  # what openai's clients are given
    seen: list[Any] = []

    def look(exchange: Exchange) -> None:
        seen.append((exchange.headers["authorization"], exchange.path, exchange.headers["user-agent"].split("/")[0]))
        exchange.answer(200, {"version": "1"})

    with scripted(look) as (url, _):
        monkeypatch.setenv("LORAPLEX_URL", f"{url}/behind/a/path")
        monkeypatch.setenv("LORAPLEX_KEY", "k-1")
        # A proxy of the environment has nothing to do with this machine's own servers.
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        for options in ({}, {"key": "k-2"}):
            both = connect(None, **options)
            both.do(both.client.version())
        assert seen == [(f"Bearer k-{n}", "/behind/a/path/version", "loraplex") for n in (1, 2)]


def test_what_is_refused_is_not_sent(connect: Connect, tmp_path: Path) -> None:
    """Each of these would be another request than the one that is meant, or none that can be written."""
    folder, nan, inf = peft_folder(tmp_path / "a", 1), float("nan"), float("inf")
    calls: list[tuple[Callable[[Any], Any], str]] = [
        (lambda c: c.adapters.delete("news@1"), "'news@1' names a version .* `delete_version`"),
        (lambda c: c.adapters.delete("owner/news@1"), "'owner/news@1' names a version"),
        (lambda c: c.adapters.upload("news@7", folder), "'news@7' names a version"),
        (lambda c: c.adapters.version("news@"), "version is empty in 'news@'"),
        (lambda c: c.adapters.load("owner/news@"), "version is empty"),
        (lambda c: c.adapters.get(""), "name is empty in ''"),
        (lambda c: c.adapters.delete("owner/"), "name is empty"),
        (lambda c: c.adapters.upload("/news", folder), "owner is empty in '/news'"),
        (lambda c: c.adapters.delete_alias("news", ""), "name or id"),
        (lambda c: c.tenants.delete(""), "/v1/tenants/ needs is empty"),
        (lambda c: c.merges.get(""), "/v1/merges/ needs is empty"),
        (lambda c: c.model(""), "id is empty"),
        (lambda c: c.chat("x", model="base", adapters={"news": nan}), "weight of 'news' is not a finite number .*nan"),
        (lambda c: c.complete_stream("x", model="base", adapters={"news": -inf}), "weight of 'news' .*-inf"),
        (lambda c: c.merges.create("ab", {"a": 1.0, "b": inf}), "weight of 'b' .*inf"),
        (lambda c: c.chat("x", model="base", temperature=nan), "cannot be written"),
        (lambda c: c.chat("\ud800", model="base"), "cannot be written"),
        (lambda c: c.chat("x", stream=True), "`chat_stream` gives a stream"),
        (lambda c: c.complete("x", extra={"stream": True}), "`complete_stream` gives a stream"),
    ]
    with scripted(lambda x: x.refuse(500)) as (url, seen):
        both = connect(url)
        for call, message in calls:
            with pytest.raises(api.BadRequest, match=message) as refused:
                both.do(call(both.client))
            assert refused.value.status == 400
        assert seen == []


# ---------------------------------------------------------------- retries


def test_a_request_that_was_put_off_is_sent_again(connect: Connect) -> None:
    later = {"Retry-After": "0"}
    with scripted([lambda x: x.refuse(429, later), lambda x: x.refuse(503, later), lambda x: x.answer(200, OK)]) as (
        url, seen,
    ):  # fmt: skip
        both = connect(url)
        assert both.all(both.client.adapters.list()) == []
        assert len(seen) == 3


@pytest.mark.parametrize(
    ("headers", "count"), [({"Retry-After": "0"}, 3), ({"Retry-After": "86400"}, 1), ({}, 1)]
)  # fmt: skip
def test_retries_are_bounded(connect: Connect, headers: dict[str, str], count: int) -> None:
    with scripted(lambda x: x.refuse(429, headers)) as (url, seen):
        both = connect(url, max_retries=2)
        with pytest.raises(api.RateLimited) as caught:
            both.do(both.client.adapters.get("a"))
        assert len(seen) == count
        assert caught.value.retry_after == (float(headers["Retry-After"]) if headers else None)


def test_a_cut_connection_is_tried_again_where_that_is_safe(connect: Connect) -> None:
    with scripted([lambda x: x.cut(), lambda x: x.answer(200, adapter_json())]) as (url, seen):
        both = connect(url)
        assert both.do(both.client.adapters.get("a")).name == "a"
        assert len(seen) == 2
    # Not where the second time would be answered otherwise: the first may have been carried out.
    calls: list[Callable[[Any], Any]] = [
        lambda client: client.adapters.delete("a"),
        lambda client: client.adapters.update("a", pinned=True, if_match='"1"'),
    ]
    for call in calls:
        with scripted(lambda x: x.cut()) as (url, seen):
            both = connect(url)
            with pytest.raises(api.StreamCut):
                both.do(call(both.client))
            assert len(seen) == 1


# ---------------------------------------------------------------- uploads


def test_an_interrupted_upload_starts_again_from_its_first_byte(connect: Connect, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "adapter_model.safetensors").write_bytes(bytes(8 << 20))
    sizes: list[int] = []

    def cut(exchange: Exchange) -> None:
        next(exchange.pieces())
        exchange.cut()

    def take(exchange: Exchange) -> None:
        sizes.append(sum(exchange.pieces()))
        exchange.answer(201, adapter_json())

    steps: list[tuple[int, int]] = []
    with scripted([cut, take]) as (url, seen):
        both = connect(url)
        upload = both.client.adapters.upload("a", folder, progress=lambda a, b: steps.append((a, b)))
        assert both.do(upload).created
        assert len(seen) == 2
    assert sizes == [steps[-1][1]]
    assert steps[-1][0] == steps[-1][1] > 8 << 20
    with scripted(cut) as (url, seen):
        both = connect(url, max_retries=1)
        with pytest.raises(api.StreamCut):
            both.do(both.client.adapters.upload("a", folder))
        assert len(seen) == 2


def test_a_refusal_ahead_of_the_body_is_seen(connect: Connect, tmp_path: Path) -> None:
    """A server need not read what it has refused."""
    folder = peft_folder(tmp_path / "a", 1)
    (folder / "adapter_model.safetensors").write_bytes(bytes(1 << 20))

    def refuse(exchange: Exchange) -> None:
        exchange.refuse(413, {"Connection": "close"}, code="upload_too_large")
        sum(exchange.pieces())  # a server that lingers, so that no reset overtakes its answer

    with scripted(refuse) as (url, _):
        both = connect(url)
        with pytest.raises(api.TooLarge) as caught:
            both.do(both.client.adapters.upload("a", folder))
        assert caught.value.code == "upload_too_large"


def test_folders_that_cannot_be_uploaded(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Said before a byte is sent; no server is needed for it."""
    client = api.Loraplex(f"http://127.0.0.1:{free_port()}")
    whole = peft_folder(tmp_path / "whole", 1, shards=2)
    index = whole / "adapter_model.safetensors.index.json"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: None, "is not a folder"),
        (lambda: (tmp_path / "x").mkdir(), "has no adapter_config.json"),
        (lambda: peft_folder(tmp_path / "x" / "inner", 1), "there is one in inner"),
        (lambda: (tmp_path / "x" / "adapter_config.json").write_text("{}"), "has no .*safetensors"),
        (lambda: (tmp_path / "x" / "adapter_model.bin").write_text(""), "safe_serialization=True"),
    ]
    for prepare, message in cases:
        prepare()
        with pytest.raises(api.LocalFileError, match=message):
            client.adapters.upload("a", tmp_path / "x")
    for text, message in [
        ('{"weight_map": {"a": "../../etc/passwd"}}', "is not a file's name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
        ("[]", "is not an index"),
    ]:
        index.write_text(text)
        with pytest.raises(api.LocalFileError, match=message):
            client.adapters.upload("a", whole)
    client.close()


def test_a_file_that_shrinks_while_it_is_sent(connect: Connect, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(bytes(4 << 20))

    def shrink(done: int, total: int) -> None:
        if weights.stat().st_size > 1 << 20:
            weights.write_bytes(b"")

    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    with scripted(lambda x: arrived.put(sum(x.pieces()))) as (url, _):
        both = connect(url)
        with pytest.raises(api.LocalFileError, match="became shorter"):
            both.do(both.client.adapters.upload("a", folder, progress=shrink))
        assert arrived.get(timeout=60) < 4 << 20, "the server waits for more"


MEMORY = """
import asyncio, resource, sys
from service.client import AsyncLoraplex, Loraplex
url, folder, out, kind = sys.argv[1:]

async def in_a_loop():
    async with AsyncLoraplex(url) as client:
        await client.adapters.upload("a", folder)
        await client.merges.download("m", out)

def blocking():
    with Loraplex(url) as client:
        client.adapters.upload("a", folder)
        client.merges.download("m", out)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
asyncio.run(in_a_loop()) if kind == "async" else blocking()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_large_files_cost_little_memory(kind: str, tmp_path: Path) -> None:
    """96 MB there and back, in a process of its own."""
    size = 96 << 20
    folder = peft_folder(tmp_path / "a", 1)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(size)
    with (folder / "adapter_model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def serve(exchange: Exchange) -> None:
        if exchange.method == "PUT":
            assert sum(exchange.pieces()) > size
            exchange.answer(201, adapter_json())
        elif exchange.path.endswith("/files"):
            exchange.answer(200, {**OK, "data": [{"name": "big", "bytes": size, "sha256": digest}]})
        else:
            exchange.answer(200, bytes(size))

    with scripted(serve) as (url, _):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, url, str(folder), str(tmp_path / "out"), kind],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 << 10  # KiB
    assert (tmp_path / "out" / "big").stat().st_size == size


# ---------------------------------------------------------------- downloads


class Files:
    """A merge's files, by the contract of /v1/merges; connections break after so many bytes of a body."""

    def __init__(self, content: bytes, breaks_after: list[int], *, ranges: bool = True) -> None:
        self.content, self.breaks, self.ranges = content, breaks_after, ranges
        self.asked: list[str | None] = []
        self.digest = hashlib.sha256(content).hexdigest()

    def __call__(self, exchange: Exchange) -> None:
        if exchange.path.endswith("/files"):
            file = {"name": "model.safetensors", "bytes": len(self.content), "sha256": self.digest}
            exchange.answer(200, {**OK, "data": [file]})
            return
        asked = exchange.headers["range"]
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        body = self.content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"} if start else {}
        if self.breaks:
            exchange.answer(206 if start else 200, body[: self.breaks.pop(0)], headers, announced=len(body))
        else:
            exchange.answer(206 if start else 200, body, headers)


CONTENT = bytes(range(256)) * 40_000  # 10 MB: a few of the pieces in which files are written


def test_a_download_goes_on_where_it_was_cut(connect: Connect, tmp_path: Path) -> None:
    files = Files(CONTENT, [3 << 20, 2 << 20])
    steps: list[int] = []
    with scripted(files) as (url, _):
        both = connect(url)
        (path,) = both.do(both.client.merges.download("m", tmp_path, progress=lambda a, b: steps.append(a)))
    assert path.read_bytes() == CONTENT
    assert files.asked == [None, f"bytes={3 << 20}-", f"bytes={5 << 20}-"]
    assert steps == sorted(steps)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_later_process_goes_on_too(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.wire.downloads.FRUITLESS", 1)
    files = Files(CONTENT, [4 << 20, 0])
    with scripted(files) as (url, _):
        both = connect(url)
        with pytest.raises(api.StreamCut):
            both.do(both.client.merges.download("m", tmp_path))
        assert not (tmp_path / "model.safetensors").exists()  # what lies under that name is whole
        (path,) = both.do(both.client.merges.download("m", tmp_path))
        assert path.read_bytes() == CONTENT
        assert files.asked[-1] == f"bytes={4 << 20}-"


def test_without_ranges_it_starts_again(connect: Connect, tmp_path: Path) -> None:
    files = Files(CONTENT, [4 << 20], ranges=False)
    with scripted(files) as (url, _):
        both = connect(url)
        (path,) = both.do(both.client.merges.download("m", tmp_path))
    assert path.read_bytes() == CONTENT


def test_damaged_and_hostile_files(connect: Connect, tmp_path: Path) -> None:
    files = Files(CONTENT, [])
    files.digest = hashlib.sha256(b"other").hexdigest()
    with scripted(files) as (url, _):
        both = connect(url)
        with pytest.raises(api.DamagedFile):
            both.do(both.client.merges.download("m", tmp_path / "out"))
        assert list((tmp_path / "out").iterdir()) == []
    for name in ("../evil", "/etc/evil", "", "..", "sub/../../evil", "sub//evil", "sub/"):
        entry = {"name": name, "bytes": 1, "sha256": "ab"}
        with scripted(lambda x, entry=entry: x.answer(200, {**OK, "data": [entry]})) as (url, seen):
            both = connect(url)
            with pytest.raises(api.LocalFileError, match="no name for a file"):
                both.do(both.client.merges.download("m", tmp_path / "out"))
            assert len(seen) == 1


# ---------------------------------------------------------------- streams


def sse(*events: str, cut: bool = False) -> Callable[[Exchange], None]:
    body = "".join(events).encode()

    def answer(exchange: Exchange) -> None:
        exchange.answer(200, body, {"Content-Type": "text/event-stream"}, announced=len(body) + 1 if cut else None)

    return answer


def piece(text: str) -> str:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"


def test_events_with_every_line_break_of_unicode_in_them(connect: Connect) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    with scripted(sse(": a comment\n\n", piece(odd), "id: 7\r\n", piece("h").replace("\n", "\r\n"), DONE)) as (url, _):
        both = connect(url)
        chunks = both.all(both.do(both.client.chat_stream("x", model="m")))
    assert "".join(chunk.text for chunk in chunks) == odd + "h"


def test_events_arrive_in_any_pieces() -> None:
    body = (piece("äöü") + "event: error\ndata: 1\ndata: 2\n\n").encode()
    for size in range(1, 9):
        decoder = Decoder()
        found = [e for start in range(0, len(body), size) for e in decoder.feed(body[start : start + size])]
        assert [event.name for event in found] == ["message", "error"]
        assert json.loads(found[0].data)["choices"][0]["delta"]["content"] == "äöü"
        assert found[1].data == "1\n2"


@pytest.mark.parametrize(
    ("events", "cut", "kind", "message"),
    [
        ([piece("a")], False, api.StreamCut, "before its end"),
        ([piece("a")], True, api.StreamCut, "was cut"),
        ([piece("a"), "data: {\n\n"], False, api.ProtocolError, "not JSON"),
        ([piece("a"), 'data: {"choices": 3}\n\n'], False, api.ProtocolError, "in place of an answer"),
        (
            [piece("a"), 'event: error\ndata: {"error": {"message": "gone", "type": "service_unavailable_error"}}\n\n'],
            False, api.Unavailable, "gone",
        ),
        ([piece("a"), "event: error\ndata: nonsense\n\n"], False, api.ProtocolError, "cannot be read"),
    ],
)  # fmt: skip
def test_streams_that_end_badly(
    connect: Connect, events: list[str], cut: bool, kind: type[Exception], message: str
) -> None:
    with scripted(sse(*events, cut=cut)) as (url, _):
        both = connect(url)
        stream = both.do(both.client.chat_stream("x", model="m"))
        with pytest.raises(kind, match=message):
            both.all(stream)


# ---------------------------------------------------------------- merges


def job(state: str, progress: float = 0.0, **more: Any) -> dict[str, Any]:
    sources = [{"adapter": "a", "version": 2, "digest": "d", "weight": -0.5}]
    return {
        "id": "m1", "object": "merge", "name": "ab", "into": "adapter", "method": "linear", "sources": sources,
        "state": state, "progress": progress, "phase": "reading", "error": None, **more,
    }  # fmt: skip


def test_a_merge_is_followed_through_an_outage(connect: Connect) -> None:
    bodies: list[Any] = []
    script = [
        lambda x: (bodies.append((json.loads(x.body()), x.headers["idempotency-key"])), x.answer(202, job("queued"))),
        lambda x: x.answer(200, job("running", 0.5)),
        lambda x: x.cut(),
        lambda x: x.refuse(503),
        lambda x: x.answer(200, job("succeeded", 1.0, adapter="ab@1")),
    ]
    with scripted(script) as (url, _):
        both = connect(url, max_retries=0)
        sources = {"a@2": -0.5, "b": 1.0}
        made = both.do(both.client.merges.create("ab", sources, method="ties", density=0.2, seed=7))
        assert (made.id, made.state, made.sources[0].weight, made.sources[0].version) == ("m1", "queued", -0.5, 2)
        seen: list[tuple[str, float]] = []
        done = both.do(both.client.merges.wait(made.id, progress=lambda m: seen.append((m.state, m.progress))))
    assert seen == [("running", 0.5), ("succeeded", 1.0)]
    assert (done.adapter, done.finished) == ("ab@1", True)
    body, key = bodies[0]
    assert body == {
        "name": "ab", "into": "adapter", "method": "ties", "density": 0.2, "seed": 7,
        "sources": [{"adapter": "a@2", "weight": -0.5}, {"adapter": "b", "weight": 1.0}],
    }  # fmt: skip
    assert len(key) >= 32


def test_merges_that_fail_or_take_too_long(connect: Connect) -> None:
    for state in ("failed", "cancelled"):
        with scripted(lambda x, state=state: x.answer(200, job(state, error="out of disk"))) as (url, _):
            both = connect(url)
            with pytest.raises(api.MergeFailed, match="out of disk") as caught:
                both.do(both.client.merges.wait("m1"))
            assert caught.value.merge.state == state
    with scripted(lambda x: x.answer(200, job("running"))) as (url, _):
        both = connect(url)
        with pytest.raises(api.TimedOut, match=r"not ended within 0\.1 s"):
            both.do(both.client.merges.wait("m1", timeout_s=0.1))
