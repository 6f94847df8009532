"""Processes killed in the middle of merges: the merge is done all the same or fails clearly, once, and nothing is left
behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.crash.merge_world import FLAGS, JOB, MERGER, Client, Q, delta, mergeable
from tests.crash.world import World
from tests.service.launch import wait_for

pytestmark = [pytest.mark.xdist_group("merges"), pytest.mark.timeout(900)]

KILLER = Path(__file__).parent / "killer"


class Killed:
    """A service whose merges can be killed at a moment (killer/sitecustomize.py)."""

    def __init__(self, make: Callable[..., World]) -> None:
        self.world = mergeable(make(*FLAGS))
        self.plan = self.world.folder / "plan.json"
        self.start()
        self.client = Client(self.world)
        self.content = self.client.upload("a", 1)

    def start(self) -> None:
        path = os.pathsep.join(filter(None, [str(KILLER), os.environ.get("PYTHONPATH", "")]))
        self.world.start(PYTHONPATH=path, KILL_PLAN=str(self.plan))

    def kill(self, module: str, event: str, part: str, nth: int = 1, *, times: int = 1, service: bool = False) -> None:
        """From now on."""
        plan = {"module": module, "event": event, "part": part, "nth": nth, "times": times}
        new = self.plan.with_suffix(".made")
        new.write_text(json.dumps({**plan, "whom": "service" if service else "self"}))
        new.replace(self.plan)

    def ended(self, identity: str) -> dict[str, Any]:
        """The merge at its end, after whoever was to be killed has been, and the service is back."""
        wait_for(lambda: not self.plan.exists(), 240)
        if self.world.running.process.poll() is not None:
            wait_for(lambda: not self.world.running.survivors(), 30)
            self.world._ended()
            self.start()
        return self.client.ended(identity)

    def check(self, adapters: set[str], checkpoints: set[str]) -> None:
        """Nothing is there but these and what they need."""
        http = self.client.http
        wait_for(lambda: {path.split("/")[0] for path in self.client.folders()} == checkpoints, 60)
        listed = {each["name"] for each in http.get("/v1/adapters", params={"limit": 1000}).json()["data"]}
        assert listed == adapters
        for name in adapters:
            assert http.get(f"/v1/adapters/{name}").json()["versions"] == [1]
        for identity in checkpoints:
            merged = self.client.weights_of(identity)
            assert merged[f"{Q}.weight"].shape == (16, 16)
        wait_for(lambda: self.world.leftovers() == [], 60)


@pytest.fixture
def killed(make_world: Callable[..., World]) -> Iterator[Killed]:
    made = Killed(make_world)
    yield made
    made.client.http.close()


ADAPTER = {
    "claimed": (MERGER, "open", "/task.json", 1, False),
    "writing": (JOB, "open", "/out/", 2, False),
    "storing": (MERGER, "os.rename", "/out/", 2, False),
    "storing, the whole service": (MERGER, "os.rename", "/out/", 1, True),
    "committed": (MERGER, "shutil.rmtree", "/work/merge-", 1, False),
}
CHECKPOINT = {
    "reading, with its merger": (JOB, "open", "/blobs/", 1, True),
    "writing": (JOB, "open", "/out/model-", 2, False),
    "moved": (MERGER, "open", "/data/merges$", 1, True),
    "committed": (MERGER, "shutil.rmtree", "/work/merge-", 1, False),
}


def test_an_adapter_is_published_once_whatever_is_killed(killed: Killed) -> None:
    client, names = killed.client, {"a"}
    for phase, (module, event, part, nth, service) in ADAPTER.items():
        name = f"m{len(names)}"
        killed.kill(module, event, part, nth, service=service)
        job = killed.ended(client.submit(name, {"a": 1.0 + len(names)}, method="cat"))
        assert (job["state"], job.get("adapter")) == ("succeeded", f"{name}@1"), (phase, job)
        np.testing.assert_allclose(client.adapter_delta(name, 1), (1.0 + len(names)) * delta(killed.content), atol=1e-4)
        names.add(name)
        killed.check(names, set())


def test_a_checkpoint_is_whole_or_not_there_whatever_is_killed(killed: Killed) -> None:
    client, made = killed.client, set()
    for phase, (module, event, part, nth, service) in CHECKPOINT.items():
        killed.kill(module, event, part, nth, service=service)
        identity = client.submit(f"c{len(made)}", {"a": 1.0}, into="checkpoint", max_shard_bytes=1 << 20)
        job = killed.ended(identity)
        assert job["state"] == "succeeded", (phase, job)
        made.add(identity)
        killed.check({"a"}, made)
        for file in job["files"]:
            assert (killed.world.data / "merges" / identity / file["name"]).stat().st_size == file["bytes"]
    folder = killed.world.data / "merges"
    killed.world.stop()
    (folder / "merge-half").mkdir()  # as a crash between two renames would
    (folder / "merge-half" / "model.safetensors").write_bytes(b"half")
    killed.start()
    killed.check({"a"}, made)


def test_a_merge_that_is_killed_each_time_fails_clearly(killed: Killed) -> None:
    killed.kill(MERGER, "open", "/task.json", times=3)
    job = killed.ended(killed.client.submit("never", {"a": 1.0}))
    assert job["state"] == "failed"
    assert "interrupted 3 times" in job["error"]
    killed.check({"a"}, set())
    assert killed.client.ended(killed.client.submit("ever", {"a": 1.0}))["state"] == "succeeded"  # the others go on


def test_a_stop_is_no_failed_attempt(killed: Killed) -> None:
    """The service is stopped in the middle of a merge and started again: it is done then."""
    identity = killed.client.submit("later", {"a": 1.0})
    job = killed.client.job()
    assert killed.client.get(identity)["state"] == "running"
    assert killed.world.stop() == 0
    assert not job.is_running()
    killed.start()
    assert killed.client.ended(identity)["adapter"] == "later@1"
    killed.check({"a", "later"}, set())
