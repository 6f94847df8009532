"""/v1/adapters over HTTP: the whole API process in uvicorn, a simulated engine, adapters that PEFT wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from adapters.manifest import Manifest, Module
from tests.ports import unused_port

from .adapter_helpers import BASE, Engine, Server, files_of, make_peft_adapter, vary
from .launch import wait_for


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(tmp_path_factory.mktemp("peft") / "a", targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder with an engine; gives the folder."""
    data = tmp_path_factory.mktemp("service") / "data"
    started = Engine(data)
    yield data
    started.stop()


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[Server]:
    started = Server(engine, unused_port()).start()
    yield started
    started.close()


@pytest.fixture
def api(server: Server) -> Iterator[httpx.Client]:
    yield server.client
    assert server.spooled() == []


@pytest.fixture
def variant(peft: Path, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Uploads of other weights of the same shapes."""

    def make(seed: int) -> list[Any]:
        folder = tmp_path / f"variant{seed}"
        return files_of(folder if folder.exists() else vary(peft, folder, seed))

    return make


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}, body
    assert {"message", "type", "code", "param"} <= body["error"].keys()
    return body["error"]


def test_an_upload_from_first_to_last(api: httpx.Client, server: Server, peft: Path) -> None:
    files = files_of(peft)
    response = api.post(
        "/v1/adapters", data={"name": "first", "description": "a test", "labels": '{"team": "red"}'}, files=files
    )
    assert response.status_code == 201, response.text
    assert response.headers["location"] == "/v1/adapters/first"
    body = response.json()
    tensors = load_file(peft / "adapter_model.safetensors")
    assert body["spec"]["rank"] == 4
    assert body["spec"]["alpha"] == 8
    assert body["spec"]["targets"] == ["down_proj", "q_proj"]
    assert body["spec"]["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert body["spec"]["bytes"] == sum(len(data) for _, (_, data) in files)
    assert (body["name"], body["versions"], body["default_version"]) == ("first", [1], 1)
    assert (body["description"], body["labels"], body["owner"]) == ("a test", {"team": "red"}, "default")
    assert (body["compatible"], body["state"]) == (True, "ready")

    got = api.get(response.headers["location"])
    assert got.headers["etag"] == response.headers["etag"]
    wait_until(lambda: api.get("/v1/adapters/first").json()["residency"] == "device")  # it was fetched unasked

    listed = api.get("/v1/adapters/first/versions/1/files").json()["data"]
    assert [entry["id"] for entry in listed] == ["adapter_config.json", "adapter_model.safetensors"]
    for entry, (_, (_, data)) in zip(listed, files, strict=True):
        file = api.get(f"/v1/adapters/first/versions/1/files/{entry['id']}")
        assert file.content == data
        assert file.headers["content-length"] == str(len(data)) == str(entry["bytes"])
        assert file.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"' == f'"{entry["sha256"]}"'
        assert entry["id"] in file.headers["content-disposition"]
        again = api.get(file.url, headers={"If-None-Match": file.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        ranged = api.get(file.url, headers={"Range": "bytes=10-19"})
        assert (ranged.status_code, ranged.content) == (206, data[10:20])
        none = api.get(file.url, headers={"Range": "bytes=5-2"})
        assert (none.status_code, none.content) == (200, data)
        assert error_of(api.get(file.url, headers={"Range": "bytes=99999999999-"}))["code"] == "range_not_satisfiable"
    assert error_of(api.get("/v1/adapters/first/versions/1/files/other"))["code"] == "file_not_found"
    assert api.get("/v1/adapters/first/versions/1/files/..%2f..%2fcatalogue.sqlite3").status_code == 404
    assert api.get("/resolve", params={"model": "first"}).json()["digest"] == body["spec"]["sha256"]
    assert api.get("/probe").json() == {"ready": True, "torch": False}


def test_same_name_again(api: httpx.Client, peft: Path, variant: Callable[[int], list[Any]]) -> None:
    first = api.post("/v1/adapters", data={"name": "again"}, files=files_of(peft))
    same = api.post("/v1/adapters", data={"name": "again", "description": "ignored"}, files=files_of(peft))
    assert (first.status_code, same.status_code) == (201, 200)
    assert same.json() | {"residency": ""} == first.json() | {"residency": ""}
    other = api.post("/v1/adapters", data={"name": "again"}, files=variant(1))
    assert other.status_code == 409
    assert error_of(other)["code"] == "adapter_exists"


def test_versions(api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    for number in (1, 2, 3):
        put = api.put("/v1/adapters/many", files=variant(number))
        assert (put.status_code, put.json()["version"], put.json()["default_version"]) == (201, number, number)
    put = api.put("/v1/adapters/many?default=false", files=variant(4), data={"name": "many"})
    assert (put.status_code, put.json()["version"], put.json()["default_version"]) == (201, 4, 3)
    assert put.headers["location"] == "/v1/adapters/many/versions/4"
    same = api.put("/v1/adapters/many", files=variant(1))
    assert (same.status_code, same.json()["version"], same.json()["default_version"]) == (200, 1, 3)
    assert same.headers["etag"] == put.headers["etag"]
    mistyped = api.put("/v1/adapters/many?deflt=false", files=variant(5))
    assert (mistyped.status_code, error_of(mistyped)["param"]) == (400, "deflt")
    back = api.put("/v1/adapters/many?default=true", files=variant(1))
    assert (back.status_code, back.json()["version"], back.json()["default_version"]) == (200, 1, 1)

    page = api.get("/v1/adapters/many/versions", params={"limit": 3}).json()
    assert [page["first_id"], page["last_id"], page["has_more"]] == ["many@1", "many@3", True]
    page = api.get("/v1/adapters/many/versions", params={"after": page["last_id"]}).json()
    assert ([entry["version"] for entry in page["data"]], page["has_more"]) == ([4], False)
    for version in page["data"]:
        assert api.get(f"/v1/adapters/many/versions/{version['version']}").json() == version
    assert error_of(api.get("/v1/adapters/many/versions/9"))["code"] == "version_not_found"
    assert error_of(api.get("/v1/adapters/none/versions/1"))["code"] == "adapter_not_found"
    assert api.get("/v1/adapters/many/versions", params={"after": "x"}).status_code == 400


def test_conditions(api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    only_new = {"If-None-Match": "*"}
    assert api.put("/v1/adapters/cond", files=variant(1), headers={"If-Match": "*"}).status_code == 412
    assert api.put("/v1/adapters/cond", files=variant(1), headers=only_new).status_code == 201
    assert api.put("/v1/adapters/cond", files=variant(2), headers=only_new).status_code == 412
    etag = api.get("/v1/adapters/cond").headers["etag"]
    changed = api.patch("/v1/adapters/cond", json={"description": "x"}, headers={"If-Match": f'"zzz", {etag}'})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag
    stale = {"If-Match": etag}
    for response in (
        api.patch("/v1/adapters/cond", json={"description": "y"}, headers=stale),
        api.put("/v1/adapters/cond", files=variant(2), headers=stale),
        api.put("/v1/adapters/cond/aliases/a", json={"version": 1}, headers=stale),
        api.delete("/v1/adapters/cond/versions/1", headers=stale),
        api.delete("/v1/adapters/cond", headers=stale),
    ):
        assert response.status_code == 412
        assert error_of(response)["code"] == "precondition_failed"
    assert api.get("/v1/adapters/cond").json()["versions"] == [1]
    assert api.put("/v1/adapters/cond", files=variant(2), headers={"If-Match": "*"}).status_code == 201


def test_lists(api: httpx.Client, peft: Path, variant: Callable[[int], list[Any]]) -> None:
    for i in range(5):
        labels = json.dumps({"suite": "lists", "odd": str(i % 2)})
        api.post("/v1/adapters", data={"name": f"list-{i}", "labels": labels}, files=variant(i)).raise_for_status()
    names: list[str] = []
    query: dict[str, Any] = {"limit": 2, "label": "suite=lists"}
    while True:
        page = api.get("/v1/adapters", params=query).json()
        assert page["object"] == "list"
        names += [entry["name"] for entry in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        query["after"] = page["last_id"]
        if not page["has_more"]:
            break
    assert names == [f"list-{i}" for i in range(5)]
    assert len(api.get("/v1/adapters", params={"label": "odd=1"}).json()["data"]) == 2
    everything = api.get("/v1/adapters", params={"limit": 1000}).json()["data"]
    assert api.get("/v1/adapters", params={"limit": 1000, "owner": "default"}).json()["data"] == everything
    assert api.get("/v1/adapters", params={"owner": "somebody"}).json()["data"] == []
    assert len(api.get("/v1/adapters", params={"limit": 1000, "state": "ready"}).json()["data"]) == len(everything)
    assert api.get("/v1/adapters", params={"state": "incompatible"}).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    for query in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"state": "strange"}):
        assert api.get("/v1/adapters", params=query).status_code == 400


def test_changes(api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    api.put("/v1/adapters/chg", files=variant(1), data={"description": "one", "labels": '{"a": "1"}'})
    api.put("/v1/adapters/chg", files=variant(2), data={"labels": '{"b": "2"}'})
    body = api.get("/v1/adapters/chg").json()
    assert (body["description"], body["labels"]) == ("one", {"b": "2"})
    body = api.patch("/v1/adapters/chg", json={"default_version": 1, "pinned": True, "labels": {}}).json()
    assert (body["description"], body["labels"], body["default_version"], body["pinned"]) == ("one", {}, 1, True)
    assert api.get("/resolve", params={"model": "chg"}).json()["version"] == 1
    before = api.get("/v1/adapters/chg").headers["etag"]
    for change, param in (
        ({"visibility": "public"}, "visibility"),
        ({"traffic": {"1": 50}}, "traffic"),
        ({"labels": {"a": 1}}, "labels"),
        ({"labels": {"a=b": "1"}}, "labels"),
        ({"pinned": "yes"}, "pinned"),
        ({"description": None}, "description"),
        ({"default_version": 0}, "default_version"),
        ({"surprise": 1}, "surprise"),
    ):
        response = api.patch("/v1/adapters/chg", json=change | {"description": "half"} if param[0] != "d" else change)
        assert response.status_code == 400, change
        assert error_of(response)["param"] == param
    assert (
        error_of(api.patch("/v1/adapters/chg", json={"traffic": {}}))["message"]
        == "'traffic' is not available yet (value {})."
    )
    assert api.patch("/v1/adapters/chg", json={"default_version": 9}).status_code == 404
    assert api.patch("/v1/adapters/none", json={"description": "x"}).status_code == 404
    assert api.get("/v1/adapters/chg").headers["etag"] == before


def test_aliases(api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    for number in (1, 2):
        api.put("/v1/adapters/ali", files=variant(number))
    assert api.put("/v1/adapters/ali/aliases/prod", json={"version": 1}).status_code == 201
    assert api.get("/resolve", params={"model": "ali@prod"}).json()["version"] == 1
    assert api.put("/v1/adapters/ali/aliases/prod", json={"version": 2}).status_code == 200
    assert api.get("/resolve", params={"model": "ali@prod"}).json()["version"] == 2
    assert api.get("/v1/adapters/ali/versions/prod").json()["version"] == 2
    assert api.get("/v1/adapters/ali").json()["aliases"] == {"prod": 2}
    for alias in ("1st", "-a", "a b", "a" * 97):
        assert api.put(f"/v1/adapters/ali/aliases/{alias}", json={"version": 1}).status_code == 400
    assert api.put("/v1/adapters/ali/aliases/x", json={"version": 3}).status_code == 404
    assert api.put("/v1/adapters/none/aliases/x", json={"version": 1}).status_code == 404
    assert api.delete("/v1/adapters/ali/aliases/prod").json()["deleted"] is True
    assert error_of(api.delete("/v1/adapters/ali/aliases/prod"))["code"] == "alias_not_found"
    assert api.get("/resolve", params={"model": "ali@prod"}).status_code == 404


def test_deletion(api: httpx.Client, server: Server, variant: Callable[[int], list[Any]]) -> None:
    before = server.blobs()
    for number in (101, 102, 103):
        api.put("/v1/adapters/del", files=variant(number)).raise_for_status()
    api.put("/v1/adapters/del-twin", files=variant(102)).raise_for_status()
    api.put("/v1/adapters/del/aliases/old", json={"version": 1})
    for number in (1, 3):
        assert error_of(api.delete(f"/v1/adapters/del/versions/{number}"))["code"] == "version_in_use"
    api.delete("/v1/adapters/del/aliases/old")
    weights = {number: dict(variant(number))["weights"][1] for number in (101, 102, 103)}
    gone = api.delete("/v1/adapters/del/versions/1")
    assert gone.status_code == 200
    assert (gone.json()["deleted"], gone.json()["adapter_deleted"]) == (True, False)
    assert gone.json()["freed"] == {"files": 1, "bytes": len(weights[101])}
    assert api.get("/v1/adapters/del/versions/1").status_code == 404
    wait_until(lambda: hashlib.sha256(weights[101]).hexdigest() not in server.blobs())
    gone = api.delete("/v1/adapters/del")
    assert gone.json()["versions"] == [2, 3]
    assert gone.json()["freed"] == {"files": 1, "bytes": len(weights[103])}  # the twin keeps the other
    assert api.delete("/v1/adapters/del").status_code == 404
    twin = api.get("/v1/adapters/del-twin/versions/1/files/adapter_model.safetensors")
    assert twin.content == weights[102]
    again = api.put("/v1/adapters/del", files=variant(101))
    assert (again.status_code, again.json()["versions"]) == (201, [4])
    assert api.delete("/v1/adapters/del/versions/4").json()["adapter_deleted"] is True
    assert api.delete("/v1/adapters/del-twin").status_code == 200
    wait_until(
        lambda: server.blobs().keys() <= before.keys() | {hashlib.sha256(dict(variant(1))["config"][1]).hexdigest()}
    )


def test_load_and_unload(api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    for number in (1, 2):
        api.put("/v1/adapters/res", files=variant(number))
    loaded = api.post("/v1/adapters/res/load?wait=true")
    assert (loaded.status_code, loaded.json()["residency"], loaded.json()["version"]) == (200, "device", 2)
    dropped = api.post("/v1/adapters/res/unload?wait=true")
    assert (dropped.status_code, dropped.json()["residency"]) == (200, "absent")
    assert api.post("/v1/adapters/res/load?version=1").status_code == 202
    wait_until(lambda: api.get("/v1/adapters/res/versions/1").json()["residency"] == "device")
    assert api.post("/v1/adapters/res/unload?version=1").status_code == 202
    wait_until(lambda: api.get("/v1/adapters/res/versions/1").json()["residency"] == "absent")
    assert api.post("/v1/adapters/res/load?version=7").status_code == 404
    assert api.post("/v1/adapters/none/load").status_code == 404


def test_refused_adapters(api: httpx.Client, server: Server, peft: Path, tmp_path: Path) -> None:
    before = server.blobs()
    config = json.loads((peft / "adapter_config.json").read_text())
    weights = (peft / "adapter_model.safetensors").read_bytes()

    def post(config: bytes, weights: bytes) -> httpx.Response:
        files = [("config", ("adapter_config.json", config)), ("weights", ("adapter_model.safetensors", weights))]
        return api.post("/v1/adapters", data={"name": "refused"}, files=files)

    response = post(json.dumps(config | {"use_dora": True, "bias": "all"}).encode(), weights)
    assert response.status_code == 422
    error = error_of(response)
    assert error["code"] == "adapter_refused"
    assert len(error["reasons"]) >= 2
    assert all(reason in error["message"] for reason in error["reasons"])
    assert any("use_dora" in reason for reason in error["reasons"])
    assert any("bias" in reason for reason in error["reasons"])

    tensors = load_file(peft / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key] = np.full_like(tensors[key], np.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    assert post(json.dumps(config).encode(), (tmp_path / "nan.safetensors").read_bytes()).status_code == 422
    for damaged in (weights[:-1], weights[:20], b"", b"PK\x03\x04" + weights):
        assert post(json.dumps(config).encode(), damaged).status_code == 422
    assert post(b"not json", weights).status_code == 422
    assert api.get("/v1/adapters/refused").status_code == 404
    assert server.blobs() == before


def test_shards(api: httpx.Client, peft: Path, tmp_path: Path) -> None:
    tensors = load_file(peft / "adapter_model.safetensors")
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {}
    for i, key in enumerate(tensors):
        weight_map[key] = names[i % 2]
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, tmp_path / name)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    config = ("config", ("c.json", (peft / "adapter_config.json").read_bytes()))
    shards = [("weights", (f"some/folder/{name}", (tmp_path / name).read_bytes())) for name in names]
    whole = [config, *shards, ("index", ("i.json", index))]
    response = api.post("/v1/adapters", data={"name": "shards"}, files=whole)
    assert response.status_code == 201, response.text
    listed = api.get("/v1/adapters/shards/versions/1/files").json()["data"]
    assert [entry["id"] for entry in listed] == [
        "adapter_config.json", *names, "adapter_model.safetensors.index.json"
    ]  # fmt: skip
    got = api.get("/v1/adapters/shards/versions/1/files/adapter_model.safetensors.index.json")
    assert got.content == index
    for files, status in (
        ([config, *shards], 422),  # no index
        (whole[:1] + whole[2:], 422),  # a shard is missing
        ([config, shards[0], shards[0], whole[-1]], 400),  # twice the same name
    ):
        assert api.post("/v1/adapters", data={"name": "shards2"}, files=files).status_code == status


def test_wrong_requests(api: httpx.Client, peft: Path) -> None:
    files = files_of(peft)
    for name in ("", ".hidden", "a b", "a/b", "a@1", "x" * 97, "ä"):
        response = api.post("/v1/adapters", data={"name": name}, files=files)
        assert (response.status_code, error_of(response)["param"]) == (400, "name"), name
    for response in (
        api.post("/v1/adapters", data={"name": BASE}, files=files),
        api.put(f"/v1/adapters/{BASE}", files=files),
    ):
        assert (response.status_code, error_of(response)["code"]) == (409, "name_reserved")
    assert api.put("/v1/adapters/.hidden", files=files).status_code == 400
    assert api.put("/v1/adapters/this", files=files, data={"name": "that"}).status_code == 400
    assert error_of(api.post("/v1/adapters", files=files))["param"] == "name"
    assert error_of(api.post("/v1/adapters", data={"name": "x"}, files=files[:1]))["param"] == "weights"
    assert error_of(api.put("/v1/adapters/x", files=files[1:]))["param"] == "config"
    assert api.post("/v1/adapters", data={"name": "x", "extra": "y"}, files=files).status_code == 400
    for labels in ("no json", "[]", '{"a": 1}', '{"": "x"}', "[" * 10_000):
        response = api.post("/v1/adapters", data={"name": "x", "labels": labels}, files=files)
        assert (response.status_code, error_of(response)["param"]) == (400, "labels"), labels[:20]
    assert api.post("/v1/adapters", data={"name": "x"}).status_code == 415
    assert api.post("/v1/adapters", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    response = api.post("/v1/adapters", json={"name": "x", "source": "hf://org/repo"})
    assert (response.status_code, error_of(response)["code"]) == (403, "sources_disabled")
    assert "not enabled" in error_of(response)["message"]
    for body in (b"{", b"[]", b'{"name": "x"}'):
        assert api.post(
            "/v1/adapters", content=body, headers={"Content-Type": "application/json"}
        ).status_code == 400  # fmt: skip
    assert api.get("/v1/adapters/x").status_code == 404


def test_two_uploads_of_one_name(api: httpx.Client, server: Server, variant: Callable[[int], list[Any]]) -> None:
    """Exactly one wins; what lost leaves no bytes."""
    for turn in range(4):
        name = f"race-{turn}"
        uploads = [variant(1000 + turn * 10 + i) for i in range(3)] + [variant(1000 + turn * 10)]
        with ThreadPoolExecutor(4) as pool:
            responses = list(
                pool.map(lambda files, name=name: httpx.post(  # type: ignore[misc]
                    f"{server.url}/v1/adapters", data={"name": name}, files=files, timeout=60
                ), uploads)
            )  # fmt: skip
        statuses = sorted(response.status_code for response in responses)
        assert statuses in ([201, 409, 409, 409], [200, 201, 409, 409])
        winner = next(i for i, response in enumerate(responses) if response.status_code == 201)
        stored = api.get(f"/v1/adapters/{name}/versions/1/files/adapter_model.safetensors").content
        assert stored == dict(uploads[winner])["weights"][1]
        assert api.get(f"/v1/adapters/{name}").json()["versions"] == [1]
        # What the others have stored goes in the background, once they are refused.
        weights = {hashlib.sha256(dict(files)["weights"][1]).hexdigest() for files in uploads}
        wait_for(lambda: weights & server.blobs().keys() == {hashlib.sha256(stored).hexdigest()})  # noqa: B023


def test_a_client_that_leaves_in_the_middle(server: Server, api: httpx.Client) -> None:
    boundary = "XXXX"
    head = (
        "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    ).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(head + b"x" * 3_000_000)
        wait_until(lambda: len(server.spooled()) == 2)
    wait_until(lambda: server.spooled() == [])


def test_expect_continue(server: Server, peft: Path, api: httpx.Client) -> None:
    request = httpx.Request("POST", f"{server.url}/v1/adapters", data={"name": "expect"}, files=files_of(peft))
    body = request.read()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        head = "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
        head += f"Content-Length: {len(body)}\r\nContent-Type: {request.headers['content-type']}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 201 ")


def test_a_killed_worker_is_replaced(server: Server, api: httpx.Client, variant: Callable[[int], list[Any]]) -> None:
    api.put("/v1/adapters/work", files=variant(1)).raise_for_status()

    def workers() -> list[psutil.Process]:
        found = []
        for child in psutil.Process(server.pid).children():
            with contextlib.suppress(psutil.Error):  # one that has ended is not yet, or no longer, in the table
                if any("spawn_main" in part for part in child.cmdline()):
                    found.append(child)
        return found

    started = workers()
    assert started
    niceness = min(19, psutil.Process(server.pid).nice() + 10)
    wait_until(lambda: all(worker.nice() == niceness for worker in started))  # one may only just have started
    for worker in started:
        assert not any("libtorch" in region.path for region in worker.memory_maps())
    for worker in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # when one dies, its pool ends the others
            worker.kill()
    assert api.put("/v1/adapters/work", files=variant(2)).status_code == 201
    wait_until(lambda: bool(workers()))


def test_another_base(
    server: Server, engine: Path, variant: Callable[[int], list[Any]], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """After a change of the base, old adapters are listed as incompatible and refused by name."""
    server.client.put("/v1/adapters/old", files=variant(1)).raise_for_status()
    response = server.client.get("/v1/adapters/old/versions/1")
    modules = (
        Module("model.layers.0.self_attn.q_proj", "linear", 16, 16),
        Module("model.layers.0.mlp.down_proj", "linear", 32, 8),
    )
    other = Manifest("other", "Other", "other", "float32", 10, 100, modules)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(other))
    second = Server(engine, free_port(), manifest=tmp_path / "manifest.json").start()
    try:
        assert second.client.get("/v1/adapters/old").json()["state"] == "incompatible"
        assert second.client.get("/v1/adapters/old").json()["compatible"] is False
        assert second.client.get("/v1/adapters/old/versions/1").json()["base_fingerprint"] == "simulated"
        for refused in (second.client.get("/resolve?model=old"), second.client.post("/v1/adapters/old/load")):
            assert (refused.status_code, error_of(refused)["code"]) == (409, "adapter_incompatible")
        listed = second.client.get("/v1/adapters", params={"state": "incompatible", "limit": 1000}).json()["data"]
        assert "old" in [entry["name"] for entry in listed]
        assert second.client.get("/v1/adapters", params={"state": "ready"}).json()["data"] == []
        assert second.client.put("/v1/adapters/old", files=variant(2)).status_code == 422
    finally:
        second.close()
    assert response.json()["compatible"] is True


def test_a_base_that_an_upgrade_knows_by_another_fingerprint(
    tmp_path: Path, variant: Callable[[int], list[Any]], free_port: Callable[[], int]
) -> None:
    """Adapters stored under a former one go on as before, and soon have the new one."""

    def server(*former: str) -> Server:
        module = Module("model.layers.0.self_attn.q_proj", "linear", 16, 16)
        known = Manifest(*("renewed", "X", "x", "float32", 10, 100, (module,)), former)
        path = tmp_path / f"manifest{len(former)}.json"
        path.write_bytes(msgspec.json.encode(known))
        return Server(tmp_path / "data", free_port(), manifest=path).start()

    engine = Engine(tmp_path / "data")
    before = Server(tmp_path / "data", free_port()).start()
    after = None
    try:
        before.client.put("/v1/adapters/old", files=variant(1)).raise_for_status()
        before.close()
        after = server("simulated", "older still")
        assert after.client.get("/resolve?model=old").status_code == 200
        assert after.client.get("/v1/adapters/old").json()["state"] == "ready"
        listed = after.client.get("/v1/adapters", params={"state": "ready"}).json()["data"]
        assert [entry["name"] for entry in listed] == ["old"]
        of_version = "/v1/adapters/old/versions/1"
        client = after.client
        wait_until(lambda: client.get(of_version).json()["base_fingerprint"] == "renewed")
        assert client.get(of_version).json()["compatible"] is True
        after.close()
        after = server()
        assert after.client.get("/resolve?model=old").status_code == 200
    finally:
        for each in (before, after, engine):
            if isinstance(each, Engine):
                each.stop()
            elif each is not None:
                each.close()


def test_without_an_engine(tmp_path: Path, peft: Path, free_port: Callable[[], int]) -> None:
    server = Server(tmp_path / "data", free_port()).start(ready=False)
    try:
        response = server.client.post("/v1/adapters", data={"name": "x"}, files=files_of(peft))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "engine_unavailable"
        assert server.client.get("/v1/adapters").json()["data"] == []
        assert server.client.get("/v1/adapters?state=ready").status_code == 503
    finally:
        server.close()


def test_upload_limit(tmp_path: Path, peft: Path, free_port: Callable[[], int]) -> None:
    data = tmp_path / "data"
    engine = Engine(data)
    server = Server(data, free_port(), max_upload_bytes=100_000).start()
    try:
        files = [files_of(peft)[0], ("weights", ("w.safetensors", b"x" * 200_000))]
        response = server.client.post("/v1/adapters", data={"name": "x"}, files=files)
        assert (response.status_code, error_of(response)["code"]) == (413, "upload_too_large")

        def chunks() -> Iterator[bytes]:  # no Content-Length that would tell
            yield b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
            for _ in range(50):
                yield b"x" * 10_000

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        response = server.client.post("/v1/adapters", content=chunks(), headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (413, "upload_too_large")
        assert server.spooled() == []
        assert server.client.post("/v1/adapters", data={"name": "x"}, files=files_of(peft)).status_code == 201
    finally:
        server.close()
        engine.stop()


def test_a_large_upload_is_not_held_in_memory(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """300 MB through the API process, there and back: its anonymous memory grows by less than 100 MB."""
    modules = tuple(Module(f"model.layers.{i}.self_attn.q_proj", "linear", 2048, 2048) for i in range(36))
    manifest = Manifest("large", "Large", "llama", "float32", 10, 100, modules)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    config = {"peft_type": "LORA", "r": 512, "lora_alpha": 512, "target_modules": ["q_proj"]}
    generator = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{module.name}.lora_{side}.weight": generator.random((512, 2048)[::step], dtype=np.float32)
        for module in modules
        for side, step in (("A", 1), ("B", -1))
    }
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, tmp_path / "large.safetensors")
    weights = tmp_path / "large.safetensors"
    size = weights.stat().st_size
    assert size > 140e6
    data = tmp_path / "data"
    engine = Engine(data)
    server = Server(data, free_port(), manifest=tmp_path / "manifest.json").start()
    try:
        process = psutil.Process(server.pid)

        def anonymous() -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            return int(line.split()[1]) * 1024

        before = peak = anonymous()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.01):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with weights.open("rb") as stream:
                files = [("config", ("c", json.dumps(config).encode())), ("weights", ("w.safetensors", stream))]
                response = server.client.post("/v1/adapters", data={"name": "large"}, files=files, timeout=240)
            assert response.status_code == 201, response.text
            digest = hashlib.sha256()
            with server.client.stream("GET", "/v1/adapters/large/versions/1/files/adapter_model.safetensors") as got:
                assert got.headers["content-length"] == str(size)
                for chunk in got.iter_bytes():
                    digest.update(chunk)
        finally:
            done.set()
            watcher.join()
        with weights.open("rb") as stream:
            assert digest.hexdigest() == hashlib.file_digest(stream, "sha256").hexdigest()
        assert peak - before < 100e6
    finally:
        server.close()
        engine.stop()


def test_stopping_ends_every_process(tmp_path: Path, peft: Path, free_port: Callable[[], int]) -> None:
    data = tmp_path / "data"
    engine = Engine(data)
    server = Server(data, free_port())
    try:
        for end in (server.kill, server.stop):
            server.start()
            server.client.put("/v1/adapters/x", files=files_of(peft)).raise_for_status()
            children = psutil.Process(server.pid).children(recursive=True)
            assert children
            end()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert alive == []
        assert list((data / "uploads").iterdir()) == []
    finally:
        server.close()
        engine.stop()
