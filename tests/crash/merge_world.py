"""A base that can be merged into, adapters for it, and what merges of them have to give."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from safetensors.numpy import load, load_file, save_file

from tests.crash.world import WORDS, Content, World
from tests.ports import unused_port
from tests.service.launch import PLAIN, wait_for

MERGER, JOB = "service.merger", "service.merge_job"
Q = "model.layers.0.self_attn.q_proj"
TEMPLATE = "additional_chat_templates/tool_use.jinja"
MERGE_S = 240.0
KILLER = Path(__file__).parent / "killer"
FLAGS = ("--merge-priority", "normal")
"""Beside a busy test suite a merge takes a minute otherwise, and could not be held by a signal (service/pace.py)."""


def mergeable(world: World) -> World:
    """Gives its base the weights of the simulated engine's manifest, a large tensor that no adapter changes, and a chat
    template in a folder of its own."""
    rng = np.random.default_rng(7)
    shapes = {
        "model.embed_tokens.weight": (WORDS, 16), f"{Q}.weight": (16, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 32), "model.other.weight": (1024, 1024),
        "lm_head.weight": (WORDS, 16),
    }  # fmt: skip
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, world.base / "model.safetensors", metadata={"format": "pt"})
    template = world.base / TEMPLATE
    template.parent.mkdir(exist_ok=True)
    template.write_text("{{ tools }}")
    return world


def delta(content: Content) -> np.ndarray:
    """[16, 16]: alpha / r · B A."""
    tensors = load(content.weights)
    a, b = (tensors[f"base_model.model.{Q}.lora_{which}.weight"] for which in "AB")
    return 8 / a.shape[0] * b @ a


class Client:
    """Merges of one running service."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.http = httpx.Client(base_url=world.url, timeout=60, **PLAIN)

    def upload(self, name: str, seed: int, rank: int = 4) -> Content:
        content = Content.make(seed, rank)
        answer = self.http.put(f"/v1/adapters/{name}", files=content.form)
        assert answer.status_code in (200, 201), answer.text
        return content

    def post(self, name: str, sources: dict[str, float], key: str | None = None, **options: Any) -> httpx.Response:
        body = {"name": name, "sources": [{"adapter": a, "weight": w} for a, w in sources.items()], **options}
        return self.http.post("/v1/merges", json=body, headers={"Idempotency-Key": key} if key else {})

    def submit(self, name: str, sources: dict[str, float], **options: Any) -> str:
        answer = self.post(name, sources, **options)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/v1/merges/{answer.json()['id']}"
        return str(answer.json()["id"])

    def get(self, identity: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/merges/{identity}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def seen(self, identity: str) -> dict[str, Any] | None:
        """The merge, or None while nobody answers: the service is being restarted."""
        try:
            answer = self.http.get(f"/v1/merges/{identity}")
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def wait(self, identity: str, condition: Callable[[], bool]) -> None:
        """Until it is true of a merge."""
        try:
            wait_for(condition, MERGE_S)
        except TimeoutError:
            raise AssertionError(f"{self.seen(identity)}\n{self.world.running.log.read_text()}") from None

    def ended(self, identity: str) -> dict[str, Any]:
        """The merge at its end."""
        self.wait(identity, lambda: (self.seen(identity) or {}).get("state") in ("succeeded", "failed", "cancelled"))
        return self.get(identity)

    def merger(self) -> psutil.Process:
        """The merger, once it is there."""
        wait_for(lambda: self.world.pids(MERGER), 60)
        return psutil.Process(self.world.pids(MERGER)[0])

    def folders(self) -> set[str]:
        """What lies in the folder of merges, but for empty folders of the merger's own."""
        root = self.world.data / "merges"
        while True:
            try:
                return {str(path.relative_to(root)) for path in root.rglob("*")} - {"work"}
            except FileNotFoundError:
                continue  # a folder has gone while it was looked into

    def weights_of(self, identity: str) -> dict[str, np.ndarray]:
        """All tensors of a finished checkpoint."""
        tensors: dict[str, np.ndarray] = {}
        for path in sorted((self.world.data / "merges" / identity).glob("*.safetensors")):
            tensors |= load_file(path)
        return tensors

    def adapter_delta(self, name: str, version: int) -> np.ndarray:
        """[16, 16], of a merged adapter."""
        root = f"/v1/adapters/{name}/versions/{version}/files"
        config = json.loads(self.http.get(f"{root}/adapter_config.json").content)
        tensors = load(self.http.get(f"{root}/adapter_model.safetensors").content)
        a, b = (tensors[f"base_model.model.{Q}.lora_{which}.weight"] for which in "AB")
        return config["lora_alpha"] / config["r"] * b @ a


def at(
    process: str, event: str, part: str, *, nth: int = 1, whom: str = "self", number: signal.Signals = signal.SIGKILL
) -> dict[str, Any]:
    """A moment, and who is then sent what (killer/sitecustomize.py)."""
    return {"process": process, "event": event, "part": part, "nth": nth, "whom": whom, "signal": number}


class Moments:
    """A service whose merges can be killed or held at moments. `prefix`: a command that runs the service's."""

    def __init__(self, world: World, prefix: Sequence[str] = ()) -> None:
        self.world = world
        self.plan = world.folder / "plan.json"
        self._prefix = prefix
        self.start()
        self.client = Client(world)

    def start(self) -> None:
        path = os.pathsep.join(filter(None, [str(KILLER), os.environ.get("PYTHONPATH", "")]))
        self.world.start(self._prefix, PYTHONPATH=path, KILL_PLAN=str(self.plan))

    def at(self, *moments: dict[str, Any]) -> None:
        """From now on, one after the other."""
        new = self.plan.with_suffix(".made")
        new.write_text(json.dumps(moments))
        new.replace(self.plan)

    def held(self, identity: str) -> psutil.Process:
        """The process of the job, which has stopped itself."""
        found: list[psutil.Process] = []

        def stopped() -> bool:
            found[:] = [job for job in self.world.running.children(JOB) if job.status() == psutil.STATUS_STOPPED]
            state = self.client.get(identity)["state"]
            assert state in ("queued", "running"), f"{state}, and never came to {self.plan.read_text()}"
            return bool(found)

        self.client.wait(identity, stopped)
        return found[0]

    def close(self) -> None:
        self.client.http.close()


@contextmanager
def merge_service(*, merger: bool = True, **options: Any) -> Iterator[World]:
    """A world for merges, not started yet, on a folder of its own. `merger`: it is there from the start, since there is
    something left over for it to sweep, rather than from the first merge on."""
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory(prefix="lp-merge-") as folder:
        made = mergeable(World(Path(folder), unused_port(), *FLAGS, **options))
        if merger:
            (made.data / "merges" / "work" / "left-over").mkdir(parents=True)
        try:
            yield made
        finally:
            made.close()
