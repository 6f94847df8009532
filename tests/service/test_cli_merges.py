"""Merges by the commands and by the client: the whole service with a simulated engine, and merges of real files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from service import client as api
from service.cli import app
from tests.crash.merge_world import TEMPLATE, Client, Q, delta, merge_service
from tests.crash.world import World
from tests.service.client_helpers import Both
from tests.service.inference_helpers import ROOT
from tests.service.test_cli import ENVIRONMENT, LORAPLEX, Terminal

pytestmark = [pytest.mark.xdist_group("cli-merges"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with merge_service() as made:
        made.start()
        yield made


@pytest.fixture
def direct(world: World) -> Iterator[Client]:
    """Uploads, and looks at the merger from outside."""
    made = Client(world)
    made.merger()
    yield made
    made.http.close()


@pytest.fixture
def cli(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("LORAPLEX_URL", world.url)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@contextlib.contextmanager
def paused(merger: psutil.Process) -> Iterator[None]:
    """What is queued stays queued."""
    merger.suspend()
    try:
        yield
    finally:
        merger.resume()


def waits(*arguments: str, url: str) -> subprocess.Popen[str]:
    """A `loraplex merge` that has said that its merge is queued."""
    command = [*LORAPLEX, *arguments, "--url", url]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().endswith(": queued\n")
    return process


def test_into_an_adapter(cli: Callable[..., Any], direct: Client) -> None:
    a, b = direct.upload("a", 1), direct.upload("b", 2)
    done = cli("merge", "ab", "a=0.5", "b@1=-2", "--method", "cat", "--description", "half a, less b")
    assert (done.exit_code, done.stdout) == (0, "ab@1  merged\n"), done.output
    states = [line.rpartition(": ")[2] for line in done.stderr.splitlines()]
    assert states[-1] == "succeeded"
    assert states == [state for state in ("queued", "running", "succeeded") if state in states]
    np.testing.assert_allclose(direct.adapter_delta("ab", 1), 0.5 * delta(a) - 2 * delta(b), atol=1e-5)

    job = json.loads(cli("merges", "--json").stdout)[0]
    rows = [line.split("\t") for line in cli("merges").stdout.splitlines()]
    assert rows[0] == [job["id"], "ab", "succeeded", "100%", "adapter", "cat", "a@1=0.5, b@1=-2"]
    shown = cli("merges", "show", job["id"]).stdout
    assert "state: succeeded\n" in shown
    assert "adapter: ab@1\n" in shown
    assert cli("merges", "delete", job["id"]).stdout == f"{job['id']}  deleted\n"
    gone = cli("merges", "show", job["id"])
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert job["id"] in gone.stderr


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_into_a_checkpoint(cli: Callable[..., Any], direct: Client, tmp_path: Path) -> None:
    content = direct.upload("whole-source", 3, rank=8)
    output = tmp_path / "merged"
    done = cli(
        "merge", "whole", "whole-source=0.5", "--into", "checkpoint", "--max-shard-bytes", 1 << 20, "--output", output
    )
    assert done.exit_code == 0, done.output
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert sorted(paths) == files_below(output)
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in paths}
    base = load_file(direct.world.base / "model.safetensors")
    merged: dict[str, np.ndarray] = {}
    for path in output.glob("*.safetensors"):
        merged |= load_file(path)
    assert merged.keys() == base.keys()
    np.testing.assert_allclose(merged[f"{Q}.weight"], base[f"{Q}.weight"] + 0.5 * delta(content), rtol=1e-5, atol=1e-5)

    (row,) = (line.split("\t") for line in cli("merges").stdout.splitlines() if "\twhole\t" in line)
    identity = row[0]
    listed = [line for line in cli("merges", "show", identity).stdout.splitlines() if line.startswith("file: ")]
    assert len(listed) == len(paths)
    # Cut files are completed, damaged ones are not taken for whole.
    largest = max(paths, key=lambda path: path.stat().st_size)
    good = largest.read_bytes()
    largest.unlink()
    (output / f".{largest.name}.{hashlib.sha256(good).hexdigest()[:16]}.part").write_bytes(good[:1000])
    assert cli("merges", "download", identity, output).exit_code == 0
    assert files_below(output) == sorted(paths)
    assert largest.read_bytes() == good
    largest.write_bytes(b"mine")
    assert cli("merges", "download", identity, output).exit_code == 2
    assert cli("merges", "download", identity, output, "--force").exit_code == 0
    assert hashlib.sha256(largest.read_bytes()).digest() == hashlib.sha256(good).digest()
    assert cli("merges", "delete", identity).stdout == f"{identity}  deleted\n"
    assert cli("merges", "download", identity, output).exit_code == 1


def test_what_is_refused_and_what_is_cancelled(cli: Callable[..., Any], direct: Client) -> None:
    direct.upload("x", 4)
    direct.upload("wide", 5, rank=8)
    for arguments, words in (
        (["y", "x", "wide"], "rank"),
        (["y", "x", "--method", "ties"], "density"),
        (["y", "x", "--into", "checkpoint", "--method", "cat"], "cat"),
        (["y", "nobody"], "nobody"),
        (["y", "x", "--method", "magic"], "magic"),
    ):
        refused = cli("merge", *arguments)
        assert (refused.exit_code, refused.stdout) == (1, ""), arguments
        assert refused.stderr.startswith("loraplex: ")
        assert words in refused.stderr
    with paused(direct.merger()):
        queued = cli("merge", "never", "x", "--no-wait")
        identity = queued.stdout.strip()
        as_json = json.loads(cli("merge", "never-2", "x", "--no-wait", "--json").stdout)
        assert (as_json["object"], as_json["state"]) == ("merge", "queued")
        assert cli("merges", "delete", as_json["id"]).exit_code == 0
        assert (queued.exit_code, queued.stdout) == (0, f"{identity}\n")
        assert "state: queued\n" in cli("merges", "show", identity).stdout
        assert cli("merges", "delete", identity).stdout == f"{identity}  cancelled\n"
    assert "state: cancelled\n" in cli("merges", "show", identity).stdout
    assert cli("show", "never").exit_code == 1


def test_one_that_fails_says_why(cli: Callable[..., Any], direct: Client) -> None:
    content = direct.upload("lost", 6)
    with paused(direct.merger()):
        waiting = waits("merge", "hopeless", "lost", url=direct.world.url)
        (path,) = (direct.world.data / "blobs").glob(f"??/{hashlib.sha256(content.weights).hexdigest()}")
        path.unlink()
    out, err = waiting.communicate(timeout=240)
    assert (waiting.returncode, out) == (1, "")
    (job,) = (each for each in direct.http.get("/v1/merges").json()["data"] if each["name"] == "hopeless")
    assert job["error"]
    assert err.splitlines()[-1] == f"loraplex: the merge 'hopeless' ({job['id']}) failed: {job['error']}"
    shown = cli("merges", "show", job["id"]).stdout
    assert f"state: failed\nprogress: {job['progress']:.0%}\n" in shown
    assert f"error: {job['error']}\n" in shown
    with api.Loraplex(direct.world.url) as client, pytest.raises(api.MergeFailed) as failed:
        client.merges.wait(job["id"])
    assert failed.value.merge.state == "failed"


def test_whoever_stops_to_wait_is_told_that_it_goes_on(direct: Client) -> None:
    direct.upload("patient", 7)
    with paused(direct.merger()):
        waiting = Terminal("merge", "later", "patient", url=direct.world.url)
        waiting.read_until("queued")
        os.killpg(waiting.process.pid, signal.SIGINT)
        assert waiting.finish() == 130
        (job,) = (each for each in direct.http.get("/v1/merges").json()["data"] if each["name"] == "later")
        assert f"`loraplex merges delete {job['id']}` cancels it" in waiting.text
        assert "Traceback" not in waiting.text
    assert direct.ended(job["id"])["state"] == "succeeded"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_client(kind: str, direct: Client, tmp_path: Path) -> None:
    direct.upload("c", 8)
    with contextlib.closing(Both(kind, direct.world.url)) as both:
        _client_merges(kind, both, direct, tmp_path)


def _client_merges(kind: str, both: Both, direct: Client, tmp_path: Path) -> None:
    merges = both.client.merges
    seen: list[api.Merge] = []
    with paused(direct.merger()):
        job = both.do(merges.create(f"c-{kind}", {"c": 2.0}, into="checkpoint", idempotency_key=f"mine-{kind}"))
        assert (job.state, job.sources[0].adapter, job.sources[0].weight) == ("queued", "c", 2.0)
        again = both.do(merges.create(f"c-{kind}", {"c": 2.0}, into="checkpoint", idempotency_key=f"mine-{kind}"))
        assert again.id == job.id
        with pytest.raises(api.TimedOut):
            both.do(merges.wait(job.id, timeout_s=0.1))
        with pytest.raises(api.Conflict):
            both.do(merges.create(f"c-{kind}", {"c": 1.0}, into="checkpoint"))
    done = both.do(merges.wait(job.id, progress=seen.append))
    assert done.finished
    assert done.progress == 1.0
    assert [each.progress for each in seen] == sorted(each.progress for each in seen)
    assert seen[-1].state == "succeeded"
    files = both.do(merges.files(job.id))
    assert {file.name for file in files} == {file.name for file in done.files or ()}
    down = tmp_path / "down"
    paths = both.do(merges.download(job.id, down))
    sizes = {path.relative_to(down).as_posix(): path.stat().st_size for path in paths}
    assert sizes == {file.name: file.bytes for file in files}
    assert (down / TEMPLATE).read_bytes() == (direct.world.base / TEMPLATE).read_bytes()
    assert both.all(merges.list(state="succeeded"))[0].id == job.id
    assert both.do(merges.delete(job.id)) is None
    with pytest.raises(api.NotFound):
        both.do(merges.get(job.id))
    with paused(direct.merger()):
        job = both.do(merges.create(f"d-{kind}", ["c"]))
        assert both.do(merges.cancel(job.id)).state == "cancelled"
    with pytest.raises(api.MergeFailed, match="cancelled"):
        both.do(merges.wait(job.id))


def test_a_restart_of_the_service_is_waited_for(world: World, direct: Client) -> None:
    """`loraplex merge` goes on waiting while the service is away."""
    direct.upload("r", 9)
    direct.merger().suspend()
    waiting = waits("merge", "over", "r", url=world.url)
    world.kill_everything()
    world.start()
    out, err = waiting.communicate(timeout=240)
    assert (waiting.returncode, out) == (0, "over@1  merged\n"), err
