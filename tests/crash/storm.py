"""Clients that change and use adapters while processes of the service are killed, and the check that follows each kill.

Everything is drawn from one seed, as far as it is ours to draw: which operations, which process dies, and when.

A kill is one of
    service     SIGKILL for the supervisor, and with it for all; then a new start
    stop        SIGTERM; the service ends by itself, and is started again
    hang        SIGSTOP for the engine: it has to be found out and replaced
    engine, api, worker     SIGKILL for the engine, an API process, a process that inspects uploads: one of them, or
                two or three within a moment
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.crash import ledger as book
from tests.crash.ledger import Adapter, Ledger, State
from tests.crash.world import API, BASE, ENGINE, MERGER, WORDS, Content, World, send
from tests.service.launch import PLAIN, wait_for

BACK_S = 30.0
"""What the service may take to serve again after a kill. What a test machine adds is not taken off."""
PAUSE_S = 0.06
"""The longest pause of a client between two requests. Five that pause are enough for every kill to meet some; without,
half of the processor's time went into requests between the kills."""
CONTENTS = 12
ROUNDS = {"service": 16, "partial": 76, "stop": 6, "hang": 2}
PARTS = {"engine": 4, "api": 3, "worker": 3}
OPERATIONS = {"put": 40, "post": 8, "patch": 10, "alias": 8, "unalias": 6, "version": 18, "delete": 10}
MODULE = {"engine": ENGINE, "hang": ENGINE, "api": API}
REFUSED = (404, 429, 503)
"""What a completion may be answered with, beside 200, while processes die and adapters are deleted."""


@dataclass
class Figures:
    """What a storm has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    """Seconds until the service served again, by kind of kill."""
    checked_files: int = 0

    def report(self, ledger: Ledger) -> str:
        return (
            f"{self.kills.total()} kills {dict(self.kills)}; {ledger.acknowledged} operations acknowledged, "
            f"{ledger.uncertain} cut off; {self.checked_files} files compared; completions {dict(self.answers)}; "
            f"slowest recovery in s { ({kind: round(s, 1) for kind, s in self.slowest.items()}) }"
        )


class Storm:
    """One service under fire, or several on one database and one blob store. `clients` change adapters, `readers` use
    them. `settle`: waits until what killed processes have asked of the database is done or undone."""

    def __init__(
        self,
        world: World,
        seed: int,
        *others: World,
        clients: int = 3,
        readers: int = 2,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.world = world
        self.worlds = (world, *others)
        self._settle = settle
        self.ledger = Ledger()
        self.figures = Figures()
        self._rng = random.Random(seed)
        self._contents = [Content.make(seed * 1000 + i, self._rng.choice([1, 4, 64, 256])) for i in range(CONTENTS)]
        self._by_digest = {content.digest: number for number, content in enumerate(self._contents)}
        self._clients = [_Client(self, i, random.Random(seed * 100 + i)) for i in range(clients)]
        self._readers = [_Reader(self, random.Random(seed * 100 + 50 + i)) for i in range(readers)]

    @property
    def contents(self) -> list[Content]:
        return self._contents

    def run(self, kills: int | None = None, seconds: float | None = None) -> None:
        """So many kills, or as many as fit the time; then everything is looked at once more."""
        until_s = None if seconds is None else time.monotonic() + seconds
        for world in self.worlds:
            world.start()
        while (kills is None or self.figures.kills.total() < kills) and (until_s is None or time.monotonic() < until_s):
            self.round(_draw(self._rng, ROUNDS))
        self.round("none")
        for world in self.worlds:
            self.check(world, every_file=True)
        wait_for(lambda: self.world.blobs() == self._needed(), 60)
        for world in self.worlds:
            if world.leftovers():
                raise AssertionError(f"left behind: {world.leftovers()}")

    def round(self, kind: str) -> None:
        """Traffic, a kill or some in its midst, the way back, and the check."""
        stop = threading.Event()
        everybody = [*self._clients, *self._readers]
        with ThreadPoolExecutor(len(everybody)) as pool:
            running = [pool.submit(each.run, stop) for each in everybody]
            try:
                time.sleep(self._rng.uniform(0.0, 0.5))
                self._strike(kind, stop)
            finally:
                stop.set()
            for future in running:
                future.result()
        self._settle()
        for world in self.worlds:
            self.check(world)
        if kind in ("service", "stop") and len(self.worlds) == 1:
            # The start has swept, before it took the first request.
            if self.world.blobs() != self._needed():
                raise AssertionError(f"blobs: {self.world.blobs() ^ self._needed()}")
            if self.world.leftovers():
                raise AssertionError(f"left behind: {self.world.leftovers()}")
            if len(self.world.spools()) > self.world.api_workers + len(self.world.pids(MERGER)):
                raise AssertionError(f"folders for uploads that nobody has: {self.world.spools()}")

    def _strike(self, kind: str, stop: threading.Event) -> None:
        """Kills, and waits until the service serves again. Traffic goes on meanwhile."""
        world = self._rng.choice(self.worlds)
        if kind in ("service", "stop"):
            if kind == "service":
                world.kill_everything()
            elif (code := world.stop()) != 0:
                raise AssertionError(f"exit code {code}:\n{world.logs[-1]}")
            if len(self.worlds) == 1:
                stop.set()  # or clients would count refused connections
            started = time.monotonic()
            world.start()
            self._note([kind], time.monotonic() - started)
        elif kind == "hang":
            self._strike_parts(world, ["hang"])
        elif kind == "partial":
            self._strike_parts(world, [_draw(self._rng, PARTS) for _ in range(self._rng.choice([1, 2, 3]))])

    def _strike_parts(self, world: World, kinds: list[str]) -> None:
        started, victims = time.monotonic(), []
        struck = []
        for kind in kinds:
            processes = list(world.workers() if kind == "worker" else world.running.children(MODULE[kind]))
            victim = self._rng.choice(processes) if processes else None
            if victim is not None and send(victim, signal.SIGSTOP if kind == "hang" else signal.SIGKILL):
                struck.append(kind)
                victims.append(victim)
            time.sleep(self._rng.choice([0.0, 0.0, 0.1, 0.3]))
        wait_for(lambda: not any(victim.is_running() for victim in victims) and world.ready(), 2 * BACK_S)
        self._note(struck, time.monotonic() - started)
        time.sleep(0.1)

    def _note(self, kinds: list[str], seconds: float) -> None:
        self.figures.kills.update(kinds)
        name = "+".join(sorted(set(kinds)))
        self.figures.slowest[name] = max(seconds, self.figures.slowest.get(name, 0.0))
        if seconds > BACK_S:
            raise AssertionError(f"{name}: {seconds:.0f} s without service; until then {self.figures.slowest}")

    @contextlib.contextmanager
    def connections(self) -> Iterator[list[httpx.Client]]:
        """One to each service; every request goes over any of them."""
        with contextlib.ExitStack() as stack:
            clients = [httpx.Client(base_url=world.url, timeout=60, **PLAIN) for world in self.worlds]
            yield [stack.enter_context(client) for client in clients]

    # ------------------------------------------------------------ the check

    def check(self, world: World, *, every_file: bool = False) -> None:
        """Nobody else is at work: what the service has is what the ledger says, to the byte. What several versions have
        in common is one blob, and fetched once unless `every_file` is."""
        compared: set[int] = set()
        with httpx.Client(base_url=world.url, timeout=60, **PLAIN) as http:
            listed: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in pages(http, "/v1/adapters")}
            for name in sorted(listed.keys() | self.ledger.possible.keys()):
                if every_file:
                    compared.clear()
                self.ledger.seen(name, self._observed(http, listed[name], compared) if name in listed else None)

    def _observed(self, http: httpx.Client, entry: dict[str, Any], compared: set[int]) -> Adapter:
        name = entry["name"]
        versions = []
        for version in pages(http, f"/v1/adapters/{name}/versions"):
            content = self._by_digest[version["spec"]["sha256"]]
            versions.append((version["version"], content))
            if content in compared:
                continue
            compared.add(content)
            for filename, data in self._contents[content].files.items():
                got = http.get(f"/v1/adapters/{name}/versions/{version['version']}/files/{filename}")
                if (got.status_code, got.content) != (200, data):
                    raise AssertionError(f"{name}@{version['version']}: {filename} is not what was uploaded")
                self.figures.checked_files += 1
        if sorted(entry["versions"]) != [number for number, _ in versions]:
            raise AssertionError(f"{name}: {entry['versions']} and {versions}")
        aliases = tuple(sorted(entry["aliases"].items()))
        return Adapter(tuple(versions), entry["default_version"], entry["description"], aliases)

    def _needed(self) -> set[str]:
        needed: set[str] = set()
        for states in self.ledger.possible.values():
            adapter = states[0].adapter
            for _, content in adapter.versions if adapter is not None else ():
                needed |= self._contents[content].blobs
        return needed


def pages(http: httpx.Client, path: str) -> Iterator[dict[str, Any]]:
    """All entries of a list."""
    after: dict[str, str] = {}
    while True:
        answer = http.get(path, params={"limit": "100", **after})
        if answer.status_code != 200:
            raise AssertionError(f"{path}: {answer.status_code} {answer.text}")
        page = answer.json()
        yield from page["data"]
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


class _Client:
    """Changes adapters whose names are its own. The contents are everybody's, so that they share blobs."""

    def __init__(self, storm: Storm, number: int, rng: random.Random) -> None:
        self._storm = storm
        self._rng = rng
        self._names = [f"c{number}-{i}" for i in range(3)]

    def run(self, stop: threading.Event) -> None:
        with self._storm.connections() as connections:
            while not stop.is_set():
                certain = [name for name in self._names if self._storm.ledger.certain(name) is not None]
                if not certain:
                    return
                self._act(self._rng.choice(connections), self._rng.choice(certain))
                time.sleep(self._rng.uniform(0.0, PAUSE_S))

    def _act(self, http: httpx.Client, name: str) -> None:
        ledger = self._storm.ledger
        before = ledger.certain(name)
        if before is None:
            return
        operation, method, path, options = self._draw(name, before)
        status, after = operation(before)
        ledger.sending(name, after)
        try:
            answer = http.request(method, path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return  # it was not even sent
        except httpx.TimeoutException as error:
            raise AssertionError(f"{method} {path} got no answer") from error
        except httpx.TransportError:
            ledger.broken(name, before, after)
            return
        if answer.status_code == 503:
            return  # and nothing has changed, as the check will find
        if answer.status_code != status:
            raise AssertionError(f"{method} {path} in {before}: {answer.status_code} {answer.text}, not {status}")
        ledger.answered(name, after)

    def _draw(self, name: str, state: State) -> tuple[book.Operation, str, str, dict[str, Any]]:
        """(its effect, HTTP method, path, httpx's options)"""
        rng, path = self._rng, f"/v1/adapters/{name}"
        numbers = [number for number, _ in state.adapter.versions] if state.adapter is not None else [1]
        number = rng.choice(numbers)
        content = rng.randrange(CONTENTS)
        match _draw(rng, OPERATIONS):
            case "put":
                default = rng.choice([None, None, True, False])
                options = self._form(content, {})
                query = {} if default is None else {"default": str(default).lower()}
                return book.put(content, default), "PUT", path, {**options, "params": query}
            case "post":
                text = f"text {rng.randrange(1000)}"
                options = self._form(content, {"name": name, "description": text})
                return book.post(content, text), "POST", "/v1/adapters", options
            case "patch" if rng.random() < 0.5:
                text = f"text {rng.randrange(1000)}"
                return book.change(description=text), "PATCH", path, {"json": {"description": text}}
            case "patch":
                return book.change(default=number), "PATCH", path, {"json": {"default_version": number}}
            case "alias":
                alias = rng.choice(["next", "prod"])
                return book.set_alias(alias, number), "PUT", f"{path}/aliases/{alias}", {"json": {"version": number}}
            case "unalias":
                alias = rng.choice(["next", "prod"])
                return book.remove_alias(alias), "DELETE", f"{path}/aliases/{alias}", {}
            case "version":
                return book.remove_version(number), "DELETE", f"{path}/versions/{number}", {}
        return book.remove, "DELETE", path, {}

    def _form(self, content: int, fields: dict[str, str]) -> dict[str, Any]:
        """An upload; every third one is sent in pieces with pauses, so that a kill meets it half-way."""
        form = self._storm.contents[content].form
        if self._rng.random() > 0.33:
            return {"data": fields, "files": form}
        request = httpx.Request("POST", "http://x", data=fields, files=form)
        body, pause = request.read(), self._rng.uniform(0.0, 0.05)

        def pieces() -> Iterator[bytes]:
            size = len(body) // 6 + 1
            for start in range(0, len(body), size):
                time.sleep(pause)
                yield body[start : start + size]

        return {"content": pieces(), "headers": {"Content-Type": request.headers["Content-Type"]}}


class _Reader:
    """Asks for completions of whatever there is; every answer has to be right, or to say clearly that it cannot be."""

    def __init__(self, storm: Storm, rng: random.Random) -> None:
        self._storm = storm
        self._rng = rng

    def run(self, stop: threading.Event) -> None:
        with self._storm.connections() as connections:
            while not stop.is_set():
                outcome = self._ask(self._rng.choice(connections))
                self._storm.figures.answers[outcome] += 1
                time.sleep(self._rng.uniform(0.0, PAUSE_S))

    def _ask(self, http: httpx.Client) -> str:
        model, digests = self._model()
        prompt, count = [self._rng.randrange(WORDS) for _ in range(5)], self._rng.randint(1, 12)
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        right = {self._storm.world.answer(prompt, count, digest) for digest in digests}
        try:
            if self._rng.random() < 0.5:
                return self._stream(http, body, right)
            answer = http.post("/v1/completions", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return "refused connection"
        except httpx.TimeoutException as error:
            raise AssertionError(f"{model} got no answer") from error
        except httpx.TransportError:
            return "broken connection"
        if answer.status_code == 200:
            _compare(model, answer.json()["choices"][0]["text"], right)
        elif answer.status_code not in REFUSED:
            raise AssertionError(f"{model}: {answer.status_code} {answer.text}")
        return str(answer.status_code)

    def _stream(self, http: httpx.Client, body: dict[str, Any], right: set[str]) -> str:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                text = answer.read().decode()
                if answer.status_code not in REFUSED:
                    raise AssertionError(f"{body['model']}: {answer.status_code} {text}")
                return str(answer.status_code)
            said, events = (
                "",
                [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")],
            )
        for event in events[:-1]:
            said += json.loads(event)["choices"][0]["text"]
        if events[-1] == "[DONE]":
            _compare(body["model"], said, right)
            return "200"
        error = json.loads(events[-1])["error"]
        if error["code"] not in ("engine_unavailable", "shutting_down"):
            raise AssertionError(f"{body['model']}: {error}")
        if not any(whole.startswith(said.strip()) for whole in right):
            raise AssertionError(f"{body['model']} began with {said!r}, not as one of {right}")
        return "error event"

    def _model(self) -> tuple[str, list[str | None]]:
        """A model, and the digests that it may mean."""
        ledger = self._storm.ledger
        known = list(ledger.published if self._rng.random() < 0.2 else ledger.current())
        if not known or self._rng.random() < 0.3:
            return BASE, [None]
        name, number = self._rng.choice(known)
        contents = ledger.contents_of(name, number)
        return f"{name}@{number}", [self._storm.contents[content].digest for content in contents]


def _compare(model: str, said: str, right: set[str]) -> None:
    if said.strip() not in right:  # a completion goes on from its prompt, so it begins with a space
        raise AssertionError(f"{model} said {said!r}, not one of {right}")


def _draw(rng: random.Random, odds: dict[str, int]) -> str:
    return rng.choices(list(odds), list(odds.values()))[0]
