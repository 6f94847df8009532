"""The Python client, blocking and in an event loop, against the real application with a simulated engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import client as api
from tests.service.client_helpers import Both, peft_folder
from tests.service.inference_helpers import BASE, ROOT, InferenceServer

PROMPT = "The sea is"


@pytest.fixture(scope="module", params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(kind: str, server: InferenceServer) -> Iterator[Both]:
    both = Both(kind, server.url)
    yield both
    both.close()


def test_the_life_of_an_adapter(both: Both, kind: str, tmp_path: Path) -> None:
    adapters, name = both.client.adapters, f"life-{kind}"
    folder = peft_folder(tmp_path / "one", 11)
    steps: list[tuple[int, int]] = []
    done = both.do(
        adapters.upload(
            name, folder, description="first", labels={"team": "sea"}, progress=lambda a, b: steps.append((a, b))
        )
    )
    assert (done.id, done.created, done.adapter.description) == (f"{name}@1", True, "first")
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert [a for a, _ in steps] == sorted(a for a, _ in steps)
    assert steps[-1][0] == steps[-1][1] > total
    again = both.do(adapters.upload(name, folder))
    assert (again.version, again.created) == (1, False)
    with pytest.raises(api.Conflict) as conflict:
        both.do(adapters.create(name, peft_folder(tmp_path / "two", 12, shards=2)))
    assert conflict.value.status == 409
    sharded = both.do(adapters.upload(name, tmp_path / "two", default=False))
    assert (sharded.id, sharded.adapter.default_version) == (f"{name}@2", 1)

    found = both.do(adapters.get(name))
    assert (found.versions, found.labels, found.spec.rank) == ((1, 2), {"team": "sea"}, 4)
    assert found.etag
    assert found.raw["object"] == "adapter"
    changed = both.do(adapters.update(name, description="changed", default_version=2, if_match=found.etag))
    assert (changed.description, changed.default_version) == ("changed", 2)
    with pytest.raises(api.Conflict):
        both.do(adapters.update(name, description="too late", if_match=found.etag))
    assert both.do(adapters.update(name, labels={})).labels == {}

    alias = both.do(adapters.set_alias(name, "old", 1))
    assert (alias.alias, alias.version) == ("old", 1)
    assert both.do(adapters.version(f"{name}@old")).version == 1
    assert both.do(adapters.version(name)).version == 2
    assert [version.id for version in both.all(adapters.versions(name))] == [f"{name}@1", f"{name}@2"]
    assert len(both.do(adapters.files(f"{name}@2"))) == 4  # configuration, two shards, index
    both.do(adapters.delete_alias(name, "old"))
    with pytest.raises(api.NotFound):
        both.do(adapters.version(f"{name}@old"))

    assert both.do(adapters.load(f"{name}@1")).residency == "device"
    assert both.do(adapters.unload(f"{name}@1")).version == 1
    removed = both.do(adapters.delete_version(name, 1))
    assert removed.versions
    assert removed.freed.bytes > 0
    assert both.do(adapters.delete(name)).adapter_deleted
    with pytest.raises(api.NotFound) as missing:
        both.do(adapters.get(name))
    assert (missing.value.status, missing.value.code) == (404, "adapter_not_found")
    assert missing.value.request_id


def test_download_gives_the_bytes_back(both: Both, kind: str, tmp_path: Path) -> None:
    folder, name = peft_folder(tmp_path / "up", 21, shards=2), f"down-{kind}"
    both.do(both.client.adapters.upload(name, folder))
    steps: list[tuple[int, int]] = []
    down = tmp_path / "new" / "folder"

    def fetch(**options: bool) -> list[Path]:
        steps.clear()
        progress = lambda a, b: steps.append((a, b))  # noqa: E731
        return list(both.do(both.client.adapters.download(name, down, progress=progress, **options)))

    paths = fetch()
    assert {path.name: path.read_bytes() for path in paths} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert sorted(down.iterdir()) == sorted(paths)  # nothing half is left
    total = sum(path.stat().st_size for path in paths)
    assert steps[-1] == (total, total)
    # What is there is not fetched again; what is there and differs is not lost unless told so.
    fetch()
    (down / "adapter_config.json").write_text("mine")
    with pytest.raises(api.LocalFileError, match="exists with other content"):
        fetch()
    assert (down / "adapter_config.json").read_text() == "mine"
    fetch(overwrite=True)
    assert (down / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    both.do(both.client.adapters.delete(name))


def test_lists_page_by_themselves(
    both: Both, kind: str, server: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peft_folder(tmp_path / "a", 31)
    names = [f"page-{kind}-{number}" for number in range(5)]
    for name in names:
        both.do(both.client.adapters.upload(name, folder, labels={"page": kind}))
    monkeypatch.setattr("service.wire.adapters.PAGE", 2)
    found = both.all(both.client.adapters.list(label=f"page={kind}"))
    assert [adapter.name for adapter in found] == names
    behind = both.all(both.client.adapters.list(label=f"page={kind}", after=names[2]))
    assert [adapter.name for adapter in behind] == names[3:]
    assert both.all(both.client.adapters.list(label="page=none")) == []
    models = both.all(both.client.models())
    assert (models[0].id, models[0].parent) == (BASE, None)
    assert set(names) <= {model.id for model in models if model.parent == BASE}
    for name in names:
        both.do(both.client.adapters.delete(name))


def test_answers_and_streams(both: Both, server: InferenceServer, adapters: dict[str, str]) -> None:
    client = both.client
    text = server.expected_text(PROMPT, 12)
    answer = both.do(client.complete(PROMPT, temperature=0, max_tokens=12))
    assert (answer.text, answer.model, answer.adapter) == (text, BASE, None)
    assert answer.usage.completion_tokens == 12
    first = server.expected_text(PROMPT, 12, {adapters["first@2"]: 1.0})
    answer = both.do(client.complete(PROMPT, model="first", temperature=0, max_tokens=12))
    assert (answer.text, answer.adapter, answer.choices[0].finish_reason) == (first, "first@2", "length")

    with_old = {"first@old": 0.5, "second": -1.5}
    mixed = server.expected_text(PROMPT, 12, {adapters["first@1"]: 0.5, adapters["second@1"]: -1.5})
    assert both.do(client.complete(PROMPT, adapters=with_old, temperature=0, max_tokens=12)).text == mixed
    stream = both.do(client.complete_stream(PROMPT, adapters=with_old, temperature=0, max_tokens=12))
    assert stream.adapter == "first@1, second@1"
    chunks = both.all(stream)
    assert "".join(chunk.text for chunk in chunks) == mixed
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12

    options = {"temperature": 0, "max_tokens": 8, "model": "second", "system": "Be brief."}
    whole = both.do(client.chat("Hello", **options))
    assert whole.choices[0].message == {"role": "assistant", "content": whole.text, "refusal": None}
    pieces = both.all(both.do(client.chat_stream("Hello", **options)))
    assert "".join(chunk.text for chunk in pieces) == whole.text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert both.do(client.chat(messages, model="second", temperature=0, max_tokens=8)).text == whole.text

    two = both.do(client.complete(["one", "two"], n=2, max_tokens=3, logprobs=1, extra={"user": "me"}))
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert len(two.choices[0].logprobs["tokens"]) == 3


def test_a_stream_that_is_left_ends_its_generation(kind: str, slow: InferenceServer) -> None:
    both = Both(kind, slow.url)
    stream = both.do(both.client.chat_stream("Tell me", max_tokens=400, ignore_eos=True))

    if kind == "sync":
        with stream:
            assert next(iter(stream)) is not None
    else:

        async def leave() -> None:
            async with stream:
                async for _ in stream:
                    break

        both.do(leave())
    slow.wait_until_idle()
    both.close()


def test_what_the_server_refuses(both: Both, tmp_path: Path) -> None:
    client = both.client
    with pytest.raises(api.NotFound) as missing:
        both.do(client.chat("Hello", model="nobody"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(api.NotFound):
        both.do(client.chat_stream("Hello", model="nobody"))
    with pytest.raises(api.BadRequest) as bad:
        both.do(client.chat("Hello", model=BASE, temperature=7))
    assert (bad.value.status, bad.value.param) == (400, "temperature")
    folder = peft_folder(tmp_path / "wrong", 41)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True, "bias": "all"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(api.Refused) as refused:
        both.do(client.adapters.upload("wrong", folder))
    assert refused.value.status == 422
    assert len(refused.value.reasons) >= 2
    # Of nobody's adapter one of the same name is not shown, nor changed.
    both.do(client.adapters.upload("own", peft_folder(tmp_path / "own", 42)))
    for call in (
        lambda: client.adapters.get("nobody/own"),
        lambda: client.adapters.upload("nobody/own", tmp_path / "own", description="x"),
        lambda: client.adapters.create("nobody/own", tmp_path / "own", description="x"),
        lambda: client.adapters.version("nobody/own@1"),
        lambda: client.adapters.update("nobody/own", description="x"),
        lambda: client.adapters.delete_version("nobody/own", 1),
        lambda: client.adapters.delete("nobody/own"),
        lambda: client.adapters.load("nobody/own"),
        lambda: client.adapters.unload("nobody/own"),
        lambda: client.adapters.set_alias("nobody/own", "prod", 1),
        lambda: client.adapters.delete_alias("nobody/own", "prod"),
    ):
        with pytest.raises(api.NotFound) as other:
            both.do(call())
        assert other.value.code == "single_user"
    assert both.do(client.adapters.get("default/own")).description == ""
    # A name is never another path.
    for name in ("..", "a/b", "x?y=1#z"):
        with pytest.raises(api.ApiError) as odd:
            both.do(client.adapters.get(name))
        assert odd.value.status in (400, 404)
    for name in ("../adapters", "../adapters/own", "./../adapters", "own/../own"):
        with pytest.raises(api.NotFound) as odd:
            both.do(client.model(name))
        assert odd.value.code == "model_not_found"


def test_a_version_in_a_name_is_never_dropped(both: Both, kind: str, tmp_path: Path) -> None:
    adapters, name = both.client.adapters, f"whole-{kind}"
    folder, other = peft_folder(tmp_path / "one", 51), peft_folder(tmp_path / "two", 52)
    both.do(adapters.upload(name, folder))
    both.do(adapters.upload(name, other))
    both.do(adapters.set_alias(name, "old", 1))
    before = both.do(adapters.get(name)).raw
    for full in (f"{name}@1", f"{name}@999", f"{name}@old", f"{name}@", f"default/{name}@1", "@1"):
        calls: list[tuple[Callable[[], Any], str]] = [
            (lambda full=full: adapters.delete(full), "`delete_version` is for one version"),
            (lambda full=full: adapters.delete_version(full, 2), "an argument of its own"),
            (lambda full=full: adapters.delete_alias(full, "old"), "an argument of its own"),
            (lambda full=full: adapters.set_alias(full, "new", 2), "an argument of its own"),
            (lambda full=full: adapters.update(full, description="x"), "all versions share"),
            (lambda full=full: adapters.upload(full, folder), "its number"),
            (lambda full=full: adapters.create(full, folder), "its number"),
            (lambda full=full: adapters.get(full), "`version` is for one version"),
        ]
        for call, instead in calls:
            with pytest.raises(api.BadRequest, match=instead) as refused:
                both.do(call())
            assert repr(full) in refused.value.message
            assert (refused.value.status, refused.value.param) == (400, "name")
        with pytest.raises(api.BadRequest, match="`version` is for one version"):
            both.all(adapters.versions(full))
    for call in (adapters.version, adapters.files, adapters.load, adapters.unload):
        with pytest.raises(api.BadRequest, match=f"version is empty in '{name}@'"):
            both.do(call(f"{name}@"))
    with pytest.raises(api.BadRequest, match="version is empty"):
        both.do(adapters.download(f"{name}@", tmp_path / "down"))
    assert not (tmp_path / "down").exists()
    after = both.do(adapters.get(name)).raw
    assert {key: after[key] for key in ("versions", "aliases", "description", "default_version")} == {
        key: before[key] for key in ("versions", "aliases", "description", "default_version")
    }
    both.do(adapters.delete(name))


def test_tokens_and_operation(both: Both, server: InferenceServer) -> None:
    client = both.client
    tokens = both.do(client.tokenize(PROMPT, return_token_strs=True))
    assert list(tokens.tokens) == server.tokenizer.encode_now([PROMPT])[0]
    assert (tokens.count, len(tokens.token_strs)) == (len(tokens.tokens), len(tokens.tokens))
    assert both.do(client.detokenize(tokens.tokens)) == PROMPT
    chat = both.do(client.tokenize(messages=[{"role": "user", "content": PROMPT}]))
    assert chat.count > tokens.count
    assert both.do(client.ready()) is True
    assert both.do(client.wait_until_ready(60)) is None
    assert both.do(client.base_model()) == BASE
    assert both.do(client.model(BASE)).max_model_len > 0
    version = both.do(client.version())
    assert (version.model, version.version) == (BASE, "0.1.0")


def test_several_threads_share_a_client(server: InferenceServer, adapters: dict[str, str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = server.expected_text(PROMPT, 6)
    with api.Loraplex(server.url) as client, ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda _: client.complete(PROMPT, model=BASE, temperature=0, max_tokens=6).text, range(32))
        assert set(texts) == {expected}


ALONE = """
import sys
allowed = {"httpx", "httpcore", "anyio", "certifi", "idna", "h11", "sniffio", "typing_extensions"}

class OnlyHttpx:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and name not in ("service", "service.client"):
            if not name.startswith("service.wire"):
                raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, OnlyHttpx())
from service.client import Loraplex
with Loraplex(sys.argv[1]) as client:
    answer = client.complete("The sea is", temperature=0, max_tokens=4)
    with client.chat_stream("Hello", max_tokens=3) as chunks:
        count = sum(1 for _ in chunks)
loaded = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(answer.text, count, sorted(name for name in loaded if name[0] != "_"), sep="\\n")
"""


def test_it_needs_httpx_alone(server: InferenceServer) -> None:
    """Every other package that is installed here is hidden from the interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, server.url], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(server.expected_text(PROMPT, 4))
    assert not {"torch", "numpy", "pydantic", "fastapi", "rich", "typer"} & set(eval(done.stdout.splitlines()[-1]))
