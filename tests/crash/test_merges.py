"""Processes killed in the middle of merges, and a disk that is full then: the merge is done all the same or fails
clearly, once, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.crash.confined import Disk
from tests.crash.merge_world import JOB, MERGER, Moments, Q, at, delta, merge_service
from tests.crash.world import Content, World
from tests.service.launch import wait_for

pytestmark = [pytest.mark.xdist_group("merges"), pytest.mark.timeout(900)]

WORKER = "spawn_main"
"""Of the merger: it inspects a finished adapter, and hashes it."""


class Killed(Moments):
    """A service whose processes end at moments, with an adapter a, and what it has made since."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.content: Content = self.client.upload("a", 1)
        self.adapters, self.checkpoints = {"a"}, set[str]()

    def ended(self, identity: str) -> dict[str, Any]:
        """The merge at its end, after all that was to be killed has been; the service is started again if need be."""

        def over() -> bool:
            self.revive()
            job = self.client.seen(identity)
            return job is not None and job["state"] in ("succeeded", "failed", "cancelled")

        self.client.wait(identity, over)
        # The last moment may come after the end. What has not come now never will.
        wait_for(lambda: not self.plan.exists(), 30)
        return self.client.get(identity)

    def revive(self) -> None:
        """Starts the service again if it was killed."""
        if self.world.running.process.poll() is not None:
            wait_for(lambda: not self.world.running.survivors(), 60)
            self.world._ended()
            self.start()

    def adapter(self, name: str, weight: float) -> None:
        """Merges a with a weight, whatever is killed."""
        job = self.ended(self.client.submit(name, {"a": weight}, method="cat"))
        assert (job["state"], job.get("adapter")) == ("succeeded", f"{name}@1"), job
        np.testing.assert_allclose(self.client.adapter_delta(name, 1), weight * delta(self.content), atol=1e-4)
        self.adapters.add(name)
        self.check()

    def checkpoint(self, name: str) -> None:
        """Merges a into the base, whatever is killed."""
        identity = self.client.submit(name, {"a": 1.0}, into="checkpoint", max_shard_bytes=1 << 20)
        job = self.ended(identity)
        assert job["state"] == "succeeded", job
        for file in job["files"]:
            path = self.world.data / "merges" / identity / file["name"]
            assert path.stat().st_size == file["bytes"]
        assert self.client.weights_of(identity)[f"{Q}.weight"].shape == (16, 16)
        self.checkpoints.add(identity)
        self.check()

    def check(self) -> None:
        """Nothing is there but what was made, once, and what that needs."""
        http = self.client.http
        wait_for(lambda: {path.split("/")[0] for path in self.client.folders()} == self.checkpoints, 60)
        listed = {each["name"] for each in http.get("/v1/adapters", params={"limit": 1000}).json()["data"]}
        assert listed == self.adapters
        for name in self.adapters:
            assert http.get(f"/v1/adapters/{name}").json()["versions"] == [1]
        wait_for(lambda: self.world.leftovers() == [], 60)


@pytest.fixture(scope="module")
def service() -> Iterator[Killed]:
    with merge_service() as world:
        made = Killed(world)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def killed(service: Killed) -> Iterator[Killed]:
    service.revive()
    yield service
    service.plan.unlink(missing_ok=True)


def test_an_adapter_killed_when_claimed_and_when_written(killed: Killed) -> None:
    killed.at(at(MERGER, "open", "/task.json"), at(JOB, "open", "/out/adapter_model"))
    killed.adapter("written", 2.0)


def test_an_adapter_killed_when_hashed_stored_and_committed(killed: Killed) -> None:
    """The merger, then the whole service, then the merger again, which has just committed."""
    killed.at(
        at(WORKER, "open", "/out/adapter_model", whom="parent"),
        at(MERGER, "os.rename", "/out/", nth=2, whom="parent"),
        at(MERGER, "shutil.rmtree", ".3$"),
    )
    killed.adapter("stored", 3.0)


def test_a_checkpoint_killed_when_its_sources_are_read_and_when_written(killed: Killed) -> None:
    killed.at(at(JOB, "open", "/blobs/", whom="parent"), at(JOB, "open", "/out/model-", nth=2))
    killed.checkpoint("read")


def test_a_checkpoint_killed_when_hashed_moved_and_committed(killed: Killed) -> None:
    """The last file is written and its hash is about to be said; its folder has its name but no row says so; the row
    says so but the merger has not cleaned up."""
    killed.at(
        at(JOB, "os.rename", "/out/.config.json"),
        at(MERGER, "open", "/data/merges$", whom="parent"),
        at(MERGER, "shutil.rmtree", ".3$"),
    )
    killed.checkpoint("moved")


def test_a_merge_that_is_killed_each_time_fails_clearly(killed: Killed) -> None:
    killed.at(*[at(MERGER, "open", "/task.json")] * 3)
    job = killed.ended(killed.client.submit("never", {"a": 1.0}))
    assert job["state"] == "failed"
    assert "interrupted 3 times" in job["error"]
    killed.check()


def test_a_stop_is_no_failed_attempt_and_a_start_sweeps(killed: Killed) -> None:
    """The service is stopped in the middle of a merge and started again: it is done then."""
    killed.at(at(JOB, "open", "/out/adapter_model", number=signal.SIGSTOP))
    identity = killed.client.submit("later", {"a": 1.0})
    job = killed.held(identity)
    assert killed.client.get(identity)["state"] == "running"
    assert killed.world.stop() == 0
    assert not job.is_running()
    for half in ("merge-half", "work/merge-half.1"):  # as a crash between two steps would leave them
        (killed.world.data / "merges" / half).mkdir()
        (killed.world.data / "merges" / half / "model.safetensors").write_bytes(b"half")
    killed.start()
    assert killed.ended(identity)["adapter"] == "later@1"
    killed.adapters.add("later")
    killed.check()


def test_a_process_that_may_not_write_fails_its_merge(killed: Killed) -> None:
    killed.at(at(JOB, "open", "/out/model", number=signal.SIGSTOP))
    identity = killed.client.submit("full", {"a": 1.0}, into="checkpoint")
    job = killed.held(identity)
    job.rlimit(psutil.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    job.resume()
    ended = killed.ended(identity)
    assert (ended["state"], ended["error"]) == ("failed", "The server's disk is full.")
    killed.check()


def test_a_full_disk_fails_its_merges_and_no_other() -> None:
    """A disk of 128 MB that fills up while a checkpoint is written."""
    with merge_service() as world:
        confined = [sys.executable, "-m", "tests.crash.confined", "tmpfs=134217728", str(world.data), "--"]
        moments = Moments(world, confined)
        client = moments.client
        client.upload("a", 1)
        moments.at(at(JOB, "open", "/out/model", number=signal.SIGSTOP))
        identity = client.submit("whole", {"a": 1.0}, into="checkpoint")
        job = moments.held(identity)
        disk = Disk(world.data, world.running.family()[:1])
        if not disk.mounted:
            pytest.skip("the kernel lets nobody mount here, CI or not; a process that may not write was tried instead")
        disk.fill()
        filler = disk.folder / "filler"
        os.truncate(filler, filler.stat().st_size - (1 << 20))  # the merge takes the rest, and gives it back
        refused = client.post("other", {"a": 1.0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
        job.resume()
        ended = client.ended(identity)
        assert (ended["state"], ended["error"]) == ("failed", "The server's disk is full.")
        left = Path(f"/proc/{world.running.process.pid}/root{world.data}") / "merges"
        wait_for(lambda: [path.name for path in left.rglob("*")] == ["work"], 60)
        disk.free()
        assert client.ended(client.submit("whole", {"a": 1.0}, into="checkpoint"))["state"] == "succeeded"
        moments.close()
