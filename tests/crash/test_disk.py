"""The data folder at its worst: a full disk, one that cannot be written, damaged files, a clock that jumps."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.crash.confined import Disk
from tests.crash.world import BASE, WEIGHTS, Content, World, wait_for
from tests.docs.conftest import ADDRESS, STRICT
from tests.docs.markdown import bash_under
from tests.real_parts import missing
from tests.service.launch import PLAIN, ROOT, run

WorldMaker = Callable[..., World]
CONTENTS = [Content.make(seed, rank=256) for seed in range(4)]


@pytest.fixture
def http(make_world: WorldMaker) -> Any:
    """Not bound to an address: a client for whichever world."""
    with httpx.Client(timeout=60, **PLAIN) as client:
        yield client


def upload(http: httpx.Client, world: World, name: str, content: Content) -> httpx.Response:
    return http.put(f"{world.url}/v1/adapters/{name}", files=content.form)


def download(http: httpx.Client, world: World, name: str, version: int = 1, filename: str = WEIGHTS) -> httpx.Response:
    return http.get(f"{world.url}/v1/adapters/{name}/versions/{version}/files/{filename}")


def complete(http: httpx.Client, world: World, model: str, digest: str | None = None) -> None:
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = http.post(f"{world.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"].strip() == world.answer([1, 2, 3], 5, digest)


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def metric(http: httpx.Client, world: World, name: str) -> float:
    lines = http.get(f"{world.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def confined(how: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.crash.confined", how, str(folder), "--"]


# ---------------------------------------------------------------- full


@pytest.mark.parametrize("how", ["tmpfs=67108864", "limits"])
def test_a_full_disk_refuses_uploads_and_nothing_else(how: str, make_world: WorldMaker, http: httpx.Client) -> None:
    """A disk of 64 MB that something else fills, and (where such a disk cannot be mounted, always as well) processes
    that may not make files longer."""
    world = make_world()
    world.start(confined(how, world.data) if how != "limits" else ())
    assert upload(http, world, "before", CONTENTS[0]).status_code == 201
    disk = Disk(world.data, world.running.family())
    assert disk.mounted or how == "limits" or not _can_mount()
    disk.fill()
    for name in ("before", "other"):
        refused = upload(http, world, name, CONTENTS[1])
        assert (refused.status_code, code(refused)) == (507, "insufficient_storage"), refused.text
    chunked = http.post(f"{world.url}/v1/adapters", content=iter([b"x" * 100]), headers={
        "Content-Type": "multipart/form-data; boundary=b"
    })  # fmt: skip
    assert chunked.status_code in (400, 507)
    listed = http.get(f"{world.url}/v1/adapters").json()["data"]
    assert [(entry["name"], entry["versions"]) for entry in listed] == [("before", [1])]
    assert download(http, world, "before").content == CONTENTS[0].weights
    complete(http, world, "before", CONTENTS[0].digest)
    complete(http, world, BASE)
    changed = http.patch(f"{world.url}/v1/adapters/before", json={"description": "x" * 10_000})
    assert changed.status_code in (200, 507), changed.text
    described = http.get(f"{world.url}/v1/adapters/before").json()["description"]
    assert described == ("x" * 10_000 if changed.status_code == 200 else "")
    spool = [path for path in (disk.folder / "uploads").glob("*/*") if path.name != "lock"]
    assert spool == []

    disk.free()
    assert upload(http, world, "other", CONTENTS[1]).status_code == 201
    assert http.delete(f"{world.url}/v1/adapters/before").status_code == 200
    assert download(http, world, "other").content == CONTENTS[1].weights
    wait_for(lambda: {path.name for path in (disk.folder / "blobs").glob("??/*")} == CONTENTS[1].blobs, 30)


def _can_mount() -> bool:
    probe = [*confined("tmpfs=4096", Path("/tmp")), "grep", "-q", " /tmp tmpfs rw.*size=4k", "/proc/mounts"]
    return subprocess.run(probe, cwd=ROOT, check=False).returncode == 0


def test_an_upload_that_would_fill_the_disk_is_refused_before_it_is_sent(make_world: WorldMaker) -> None:
    world = make_world("--max-upload-bytes", "2000TiB")
    world.start()
    client = HTTPConnection("127.0.0.1", world.port, timeout=60)
    client.putrequest("POST", "/v1/adapters")
    client.putheader("Content-Type", "multipart/form-data; boundary=b")
    client.putheader("Content-Length", str(2**50))
    client.endheaders()
    refused = client.getresponse()
    assert (refused.status, json.load(refused)["error"]["code"]) == (507, "insufficient_storage")
    client.close()


# ---------------------------------------------------------------- not writable


@pytest.mark.parametrize(
    ("how", "problem", "used"),
    [("readonly", "Read-only file system", True), ("denied", "Permission denied", True), ("denied", "", False)],
)
def test_a_folder_that_cannot_be_written_is_one_line_and_a_hint(
    how: str, problem: str, used: bool, make_world: WorldMaker
) -> None:
    world = make_world()
    if used:
        world.start()
        assert world.stop() == 0
    refused = subprocess.run(
        [*confined(how, world.data), sys.executable, "-m", "service", "--port", "0", "--data-dir", str(world.data),
         "--simulated", "{}", "--model", str(world.base)],
        cwd=ROOT, text=True, timeout=60, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert refused.returncode == 1, refused.stdout
    line, hint = refused.stdout.splitlines()
    assert line.startswith(f"loraplex: LORAPLEX_DATA_DIR={world.data}: ")
    assert problem in line or not _can_mount()
    assert "--data-dir" in hint


def test_a_second_service_is_refused_by_whatever_name_the_folder_has(make_world: WorldMaker, tmp_path: Path) -> None:
    world = make_world()
    world.start()
    (tmp_path / "alias").symlink_to(world.data)
    for folder in (world.data, tmp_path / "alias"):
        second = run("--data-dir", str(folder), "--port", "0", "--simulated", "{}", "--model", str(world.base))
        assert second.returncode == 1
        line, hint = second.stdout.splitlines()
        assert line == f"loraplex: {folder} is in use by another loraplex (process {world.running.process.pid})"
        assert "--data-dir" in hint
    assert world.ready()


# ---------------------------------------------------------------- damaged


def test_a_damaged_file_is_said_and_never_served_until_it_is_repaired(
    make_world: WorldMaker, http: httpx.Client
) -> None:
    world = make_world()
    world.start()
    for name, content in zip("abc", CONTENTS, strict=False):
        assert upload(http, world, name, content).status_code == 201
    flipped, cut, gone = (_weights(world, content) for content in CONTENTS[:3])
    data = bytearray(flipped.read_bytes())
    data[-7] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    for name, path in zip("abc", (flipped, cut, gone), strict=True):
        for headers in ({}, {"Range": "bytes=0-9"}):
            refused = http.get(f"{world.url}/v1/adapters/{name}/versions/1/files/{WEIGHTS}", headers=headers)
            assert (refused.status_code, code(refused)) == (500, "file_damaged")
            assert path.name in refused.json()["error"]["message"]
        assert download(http, world, name, filename="adapter_config.json").status_code == 200
        log = world.running.log.read_text()
        assert f"{WEIGHTS} of {name}@1 is damaged" in log
        assert str(path) in log
    assert metric(http, world, "loraplex_damaged_blobs_total") == 6
    (repair,) = bash_under("operations.md", "A damaged file")
    for name, content in zip("abc", CONTENTS, strict=False):
        for filename, data in content.files.items():
            (world.folder / filename).write_bytes(data)
        command = repair.replace(ADDRESS, f"127.0.0.1:{world.port}").replace("/NAME", f"/{name}")
        subprocess.run(["bash", "-c", STRICT + command], cwd=world.folder, check=True, capture_output=True)
        assert download(http, world, name).content == content.weights
        assert http.get(f"{world.url}/v1/adapters/{name}").json()["versions"] == [1]


def _weights(world: World, content: Content) -> Path:
    return next(path for path in (world.data / "blobs").glob("??/*") if path.read_bytes() == content.weights)


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 2048] = bytes(2048)
    path.write_bytes(data)


def test_a_damaged_catalogue_is_one_line_and_can_be_restored_as_documented(
    make_world: WorldMaker, http: httpx.Client
) -> None:
    world = make_world()
    world.start()
    assert upload(http, world, "kept", CONTENTS[0]).status_code == 201
    assert world.stop() == 0
    world.start()  # and with this start into the backup
    assert upload(http, world, "newer", CONTENTS[1]).status_code == 201
    assert world.stop() == 0
    catalogue = world.data / "catalogue.sqlite3"
    whole = catalogue.read_bytes()
    flags = "--data-dir", str(world.data), "--port", "0", "--simulated", "{}", "--model", str(world.base)
    for damage in (_garbage, _cut, _zero_pages):
        catalogue.write_bytes(whole)
        damage(catalogue)
        refused = run(*flags)
        assert refused.returncode == 1, refused.stdout
        line, hint = refused.stdout.splitlines()
        assert line.startswith(f"loraplex: {catalogue} is damaged: ")
        assert "docs/operations.md" in hint
        assert world.blobs() == CONTENTS[0].blobs | CONTENTS[1].blobs

    (steps,) = bash_under("operations.md", "A damaged catalogue")
    subprocess.run(["bash", "-euc", steps], cwd=world.folder, check=True)
    world.start()
    listed = http.get(f"{world.url}/v1/adapters").json()["data"]
    assert [entry["name"] for entry in listed] == ["kept"]
    assert download(http, world, "kept").content == CONTENTS[0].weights
    assert {path.name for path in (world.data / "damaged" / "blobs").glob("??/*")} >= CONTENTS[1].blobs
    assert upload(http, world, "newer", CONTENTS[1]).status_code == 201


def test_a_backup_of_a_running_service_is_restored_as_documented(make_world: WorldMaker, http: httpx.Client) -> None:
    """Files, catalogue, files: with an upload and a deletion after each of the first two."""
    if shutil.which("sqlite3") is None:
        missing("sqlite3")
    backup, restore = bash_under("operations.md", "Backup of the data folder")
    prepare, files, catalogue, files_again = backup.splitlines()

    def shell(folder: Path, *commands: str) -> None:
        subprocess.run(["bash", "-euc", "\n".join(commands)], cwd=folder, check=True)

    world = make_world()
    world.start()
    for name, content in (("kept", CONTENTS[0]), ("gone", CONTENTS[1])):
        assert upload(http, world, name, content).status_code == 201
    shell(world.folder, prepare, files)
    assert upload(http, world, "new", CONTENTS[2]).status_code == 201
    shell(world.folder, catalogue)
    assert http.delete(f"{world.url}/v1/adapters/gone").status_code == 200
    assert upload(http, world, "later", CONTENTS[3]).status_code == 201
    unused = CONTENTS[1].blobs - CONTENTS[0].blobs - CONTENTS[2].blobs - CONTENTS[3].blobs
    wait_for(lambda: not unused & world.blobs(), 30)
    shell(world.folder, files_again)
    assert world.stop() == 0

    again = make_world()
    again.data.rmdir()
    (again.folder / "backup").symlink_to(world.folder / "backup")
    shell(again.folder, restore)
    again.start()
    assert {entry["name"] for entry in http.get(f"{again.url}/v1/adapters").json()["data"]} == {"kept", "gone", "new"}
    for name, content in zip(("kept", "gone", "new"), CONTENTS, strict=False):
        for filename, data in content.files.items():
            assert download(http, again, name, filename=filename).content == data
        complete(http, again, name, content.digest)
    assert upload(http, again, "later", CONTENTS[3]).status_code == 201


def test_the_data_folder_is_its_users_alone(make_world: WorldMaker) -> None:
    """One that is made; one that is there stays as it is."""
    world = make_world()
    world.data.rmdir()
    refused = run("--data-dir", str(world.data), "--port", "0", "--simulated", "not JSON", "--model", str(world.base))
    assert refused.returncode == 1
    assert stat.S_IMODE(world.data.stat().st_mode) == 0o700
    for folder in ("blobs", "run", "uploads"):
        assert stat.S_IMODE((world.data / folder).stat().st_mode) == 0o700
    world.data.chmod(0o750)
    world.start()
    assert stat.S_IMODE(world.data.stat().st_mode) == 0o750


def test_blobs_without_a_catalogue_are_not_swept(make_world: WorldMaker, http: httpx.Client) -> None:
    world = make_world()
    world.start()
    assert upload(http, world, "kept", CONTENTS[0]).status_code == 201
    assert world.stop() == 0
    kept = world.folder / "catalogue"
    shutil.move(world.data / "catalogue.sqlite3", kept)
    refused = run("--data-dir", str(world.data), "--port", "0", "--simulated", "{}", "--model", str(world.base))
    assert refused.returncode == 1
    line, hint = refused.stdout.splitlines()
    assert line == f"loraplex: {world.data / 'blobs'} holds adapters, but {world.data / 'catalogue.sqlite3'} is gone"
    assert "docs/operations.md" in hint
    assert world.blobs() == CONTENTS[0].blobs
    shutil.move(kept, world.data / "catalogue.sqlite3")
    world.start()
    assert download(http, world, "kept").content == CONTENTS[0].weights


# ---------------------------------------------------------------- the clock

CLOCK = """
import os, pathlib, time
_file, _time, _time_ns = pathlib.Path(os.environ["CLOCK_OFFSET"]), time.time, time.time_ns
def _offset():
    try:
        return int(_file.read_text())
    except (OSError, ValueError):
        return 0
time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + _offset() * 10**9
"""


def test_a_clock_that_jumps_changes_nothing_but_timestamps(
    make_world: WorldMaker, http: httpx.Client, tmp_path: Path
) -> None:
    """Every Python process of the service sees the clock go back by five hours, and forward by a month."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    offset = tmp_path / "offset"
    offset.write_text("0")
    world = make_world()
    clock = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CLOCK_OFFSET": str(offset)}
    world.start(**clock)
    processes = world.running.family()
    times: list[tuple[int, int]] = []
    for number, hours in enumerate((0, -5, 24 * 30, -10, 3)):
        offset.write_text(str(hours * 3600))
        content = CONTENTS[number % 3]
        answer = upload(http, world, "a", content)
        assert answer.status_code in (200, 201)
        entry = answer.json()
        times.append((entry["created"], entry["updated"]))
        complete(http, world, f"a@{entry['version']}", content.digest)
        assert http.get(f"{world.url}/ready").status_code == 200
    created, updated = zip(*times, strict=True)
    assert len(set(created)) == 1
    assert list(updated) == sorted(updated)
    assert min(updated) >= created[0]
    assert updated[-1] - created[0] > 24 * 29 * 3600, "the processes must have seen the jump"
    assert set(processes) <= set(world.running.family()), "no process was taken for hung"
    for name in ("request_seconds", "time_to_first_token_seconds"):
        assert 0 <= metric(http, world, f"loraplex_{name}_sum") < 60
    assert http.delete(f"{world.url}/v1/adapters/a/versions/1").status_code == 200
    offset.write_text(str(-48 * 3600))  # what is to be swept now lies in the future
    world.kill_everything()
    world.start(**clock)
    assert world.blobs() == CONTENTS[1].blobs | CONTENTS[2].blobs
    assert world.leftovers() == []
