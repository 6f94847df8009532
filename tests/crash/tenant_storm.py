"""Two tenants and an admin at work while processes of the service are killed: what of tenants, keys, limits, uploads,
use and the audit log was acknowledged is there afterwards, and neither tenant sees anything of the other.

Everything is drawn from one seed, as far as it is ours to draw. tests/crash/storm.py has the storms of a single user,
which look at adapters much harder.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.crash.storm import pages
from tests.crash.world import API, BASE, ENGINE, Content, World, send
from tests.service.launch import PLAIN, wait_for

ADMIN = "the-admin-key-of-these-tests"
WRITTEN_S = 60.0
"""Generous: what was used is written a moment after, but a busy machine may be late."""
PER_MINUTE = 40
"""Requests of the second tenant."""
TOKENS = 6
TENANTS = ("heron", "stork")
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)

State = tuple[Any, ...] | None
"""Of a tenant: (weight, a limit, disabled); of a key: (disabled, expires_at). None: there is none."""


@dataclass
class Book:
    """What may be, by what it is about; changed by the admin's thread alone."""

    possible: dict[str, list[State]] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Status by request id."""
    visible: list[tuple[str, State, str]] = field(default_factory=list)
    """Of requests that were cut off: (what about, what it would have made of it, request id)."""

    def certain(self, prefix: str) -> dict[str, State]:
        return {
            name: states[0] for name, states in self.possible.items() if name.startswith(prefix) and len(states) == 1
        }


class Member:
    """One tenant at work with a key of its own: uploads under the same names as the other's, and requests."""

    def __init__(self, storm: TenantStorm, tenant: str, seed: int) -> None:
        self.tenant = tenant
        self.key = ""
        self.contents = [Content.make(seed * 100 + number, 4) for number in range(3)]
        self.published: set[str] = set()
        self.answered: list[tuple[float, int]] = []
        """(when, tokens of the answer) of what was answered since the last check."""
        self.admitted: list[tuple[float, float]] = []
        """(sent, answered) of what counts as a request: it was counted at some moment between."""
        self.broken = 0
        self.least, self.most = 0, 0
        """Tokens that have to be in the table of usage, and that may be."""
        self._storm, self._rng = storm, random.Random(seed)

    def run(self, stop: threading.Event) -> None:
        with self._storm.client(self.key) as http:
            while not stop.is_set():
                try:
                    if self._rng.random() < 0.2:
                        self._upload(http)
                    else:
                        self._ask(http)
                    self.look(http)
                except NOT_SENT:
                    time.sleep(0.02)
                except httpx.TransportError:
                    self.broken += 1

    def _upload(self, http: httpx.Client) -> None:
        number = self._rng.randrange(3)
        began = time.monotonic()
        answer = http.put(f"/v1/adapters/x{number}", files=self.contents[number].form)
        if answer.status_code in (200, 201):
            self.admitted.append((began, time.monotonic()))  # uploads count as requests
            self.published.add(f"x{number}")
        elif answer.status_code == 429 and answer.json()["error"]["code"] == "limit_exceeded":
            time.sleep(0.05)
        elif answer.status_code != 503:
            raise AssertionError(f"{self.tenant}: {answer.status_code} {answer.text}")

    def _ask(self, http: httpx.Client) -> None:
        model = self._rng.choice([BASE, *sorted(self.published)])
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        began = time.monotonic()
        answer = http.post("/v1/completions", json=body)
        if answer.status_code == 200:
            self.admitted.append((began, time.monotonic()))
            self.answered.append((time.monotonic(), answer.json()["usage"]["completion_tokens"]))
        elif answer.status_code == 429 and answer.json()["error"]["code"] == "limit_exceeded":
            time.sleep(0.05)
        elif answer.status_code not in (429, 503):
            raise AssertionError(f"{self.tenant}: {answer.status_code} {answer.text}")

    def look(self, http: httpx.Client) -> None:
        """Nothing of the other tenant is to be seen."""
        other = TENANTS[1 - TENANTS.index(self.tenant)]
        listed = http.get("/v1/adapters")
        hidden = http.get(f"/v1/models/{other}/x0")
        for answer in (listed, hidden):
            if answer.status_code == 200 and other in answer.text:
                raise AssertionError(f"{self.tenant} sees {answer.text}")
        if hidden.status_code not in (404, 503):
            raise AssertionError(f"{self.tenant}: {hidden.status_code} {hidden.text}")

    def settle(self, struck: tuple[float, float] | None) -> None:
        """Takes what was answered into account; `struck`: from when to when it may be lost."""
        for at, tokens in self.answered:
            lost = struck is not None and struck[0] < at < struck[1]
            self.least += 0 if lost else tokens
            self.most += tokens
        self.most += self.broken * TOKENS
        self.answered, self.broken = [], 0


class TenantStorm:
    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.book = Book()
        self.kills: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._number = 0
        self.members = [Member(self, tenant, seed * 10 + number) for number, tenant in enumerate(TENANTS)]

    def client(self, key: str = ADMIN) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.world.url, headers=headers, timeout=60, **PLAIN)

    def run(self, kinds: list[str]) -> None:
        self.world.start(LORAPLEX_ADMIN_KEY=ADMIN)
        with self.client() as http:
            for member in self.members:
                limits = (
                    {"requests_per_minute": PER_MINUTE} if member.tenant == TENANTS[1] else {"tokens_per_minute": 10**6}
                )
                made = http.post("/v1/tenants", json={"name": member.tenant, "limits": limits})
                key = http.post(f"/v1/tenants/{member.tenant}/keys", json={"scopes": ["infer", "upload", "manage"]})
                if (made.status_code, key.status_code) != (201, 201):
                    raise AssertionError(made.text + key.text)
                member.key = key.json()["key"]
        for kind in kinds:
            self.round(kind)

    def round(self, kind: str) -> None:
        stop, struck = threading.Event(), None
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(each, stop) for each in (self._administer, *(member.run for member in self.members))]
            try:
                time.sleep(self._rng.uniform(2.3, 3.0))
                written = self._written()
                struck = self._strike(kind, written)
                time.sleep(0.3)
            finally:
                stop.set()
            for future in running:
                future.result()
        for member in self.members:
            member.settle(struck)
        with self.client() as http:
            self._check_rows(http)
            self._check_audit(http)
            self._check_use(http)

    def _written(self) -> float:
        """Waits until the use that was answered by now is in the table, while more comes: when it was answered."""
        now = time.monotonic()
        for member in self.members:
            least = member.least + sum(tokens for at, tokens in list(member.answered) if at <= now)
            with self.client(member.key) as own:
                wait_for(lambda own=own, least=least: _tokens(own) >= least, WRITTEN_S)  # type: ignore[misc]
        return now

    def _strike(self, kind: str, written: float) -> tuple[float, float] | None:
        """From when to when use may be lost: what came after `written`, until API processes that died were back."""
        if kind == "service":
            self.world.kill_everything()
            self.world.start(LORAPLEX_ADMIN_KEY=ADMIN)
        else:
            victim = self._rng.choice(list(self.world.running.children({"api": API, "engine": ENGINE}[kind])))
            send(victim, signal.SIGKILL)
            wait_for(lambda: not victim.is_running() and self.world.ready(), 120)
        self.kills[kind] += 1
        return None if kind == "engine" else (written, time.monotonic())

    # ------------------------------------------------------------ the admin

    def _administer(self, stop: threading.Event) -> None:
        with self.client() as http:
            while not stop.is_set():
                self._number += 1
                what, method, path, body, after, status = self._draw()
                request_id = f"storm-{self._number}"
                try:
                    answer = http.request(method, path, json=body, headers={"x-request-id": request_id})
                except NOT_SENT:
                    time.sleep(0.02)
                    continue
                except httpx.TransportError:
                    before = self.book.possible.get(what, [None])
                    if after not in before:  # else nobody sees whether it was done
                        self.book.visible.append((what, after, request_id))
                    self.book.possible[what] = [*before, after]
                    continue
                if answer.status_code == 503:
                    continue  # and nothing has changed
                if answer.status_code != status:
                    raise AssertionError(f"{method} {path} {body}: {answer.status_code} {answer.text}, not {status}")
                self.book.acknowledged[request_id] = status
                if status < 400:
                    self.book.possible[what] = [after]
                if "key" in answer.json():
                    self.book.secrets[what] = answer.json()["key"]

    def _draw(self) -> tuple[str, str, str, Any, State, int]:
        """(what about, method, path, body, the state after, status)"""
        rng = self._rng
        keys = {what: state for what, state in self.book.certain("key ").items() if state and what in self.book.secrets}
        tenants = {what: state for what, state in self.book.certain("tenant ").items() if state}
        match rng.choice(["key", "change key", "change key", "delete key", "tenant", "change tenant", "refused"]):
            case "change key" if keys:
                what = rng.choice(sorted(keys))
                after = (rng.random() < 0.5, rng.choice([None, 2**40 + rng.randrange(1000)]))
                body = {"disabled": after[0], "expires_at": after[1]}
                return what, "PATCH", self._path(what), body, after, 200
            case "delete key" if len(keys) > 3:
                what = rng.choice(sorted(keys))
                return what, "DELETE", self._path(what), None, None, 200
            case "tenant":
                name = f"t{self._number}"
                return f"tenant {name}", "POST", "/v1/tenants", {"name": name, "weight": 2.0}, (2.0, None, False), 201
            case "change tenant" if tenants:
                what = rng.choice(sorted(tenants))
                after = (float(rng.randrange(1, 9)), rng.randrange(1000), rng.random() < 0.5)
                body = {"weight": after[0], "limits": {"adapters": after[1]}, "disabled": after[2]}
                return what, "PATCH", f"/v1/tenants/{what.split()[1]}", body, after, 200
            case "refused":
                return "tenant heron", "POST", "/v1/tenants", {"name": "heron"}, None, 409
        name = f"key k{self._number}"
        body = {"scopes": ["infer"], "description": name}
        return name, "POST", "/v1/tenants/heron/keys", body, (False, None), 201

    def _path(self, what: str) -> str:
        return f"/v1/tenants/heron/keys/{self.book.secrets[what].split('_')[1]}"

    # ------------------------------------------------------------ the check

    def _check_rows(self, http: httpx.Client) -> None:
        seen: dict[str, State] = {}
        for tenant in pages(http, "/v1/tenants"):
            if tenant["name"] not in ("default", *TENANTS):
                values = (tenant["weight"], tenant["limits"]["adapters"], tenant["disabled"])
                seen[f"tenant {tenant['name']}"] = values
        for key in pages(http, "/v1/tenants/heron/keys"):
            if key["description"]:
                seen[key["description"]] = (key["disabled"], key["expires_at"])
        for what in seen.keys() | (self.book.possible.keys() - {"tenant heron"}):
            states = self.book.possible.get(what, [None])
            if seen.get(what) not in states:
                raise AssertionError(f"{what} is {seen.get(what)}, but it may only be one of {states}")
            self.book.possible[what] = [seen.get(what)]
        for what, secret in self.book.secrets.items():
            state = self.book.possible[what][0]
            with self.client(secret) as own:
                status = own.get("/v1/models").status_code
            if status != (200 if state is not None and not state[0] else 401):
                raise AssertionError(f"{what} is {state}, and is answered {status}")

    def _check_audit(self, http: httpx.Client) -> None:
        entries = {each["request_id"]: each for each in pages(http, "/v1/audit")}
        for request_id, status in self.book.acknowledged.items():
            entry = entries.get(request_id)
            if entry is None or entry["status"] != status:
                raise AssertionError(f"{request_id} was answered {status}, and the log has {entry}")
        for what, after, request_id in self.book.visible:
            if self.book.possible[what] == [after] and after is not None and request_id not in entries:
                raise AssertionError(f"{request_id} has made {what} {after}, and is not in the log")
        self.book.visible.clear()
        actors = {each["actor"] for each in entries.values()}
        members = {member.key.split("_")[1] for member in self.members}
        if not actors <= {"admin", *members}:
            raise AssertionError(f"who is {actors}?")

    def _check_use(self, http: httpx.Client) -> None:
        for member in self.members:
            with self.client(member.key) as own:
                member.look(own)
                names = {each["name"] for each in pages(own, "/v1/adapters")}
                if not member.published <= names <= {"x0", "x1", "x2"}:
                    raise AssertionError(f"{member.tenant} has {names}, and published {member.published}")

                def rows(group: str, own: httpx.Client = own) -> list[dict[str, Any]]:
                    return list(own.get("/v1/usage", params={"group_by": group}).json()["data"])

                wait_for(lambda own=own, least=member.least: _tokens(own) >= least, WRITTEN_S)  # type: ignore[misc]
                if _tokens(own) > member.most:
                    raise AssertionError(f"{member.tenant} has used {_tokens(own)}, but at most {member.most}")
                if {row["tenant"] for row in rows("tenant")} - {member.tenant}:
                    raise AssertionError(f"{member.tenant} sees {rows('tenant')}")
                if not {row["key"] for row in rows("key")} <= {"", member.key.split("_")[1]}:
                    raise AssertionError(f"{member.tenant} sees {rows('key')}")
            used = http.get(f"/v1/tenants/{member.tenant}").json()["used"]
            if used["concurrent_requests"] or used["tokens_reserved"]:
                raise AssertionError(f"nothing runs, and {member.tenant} uses {used}")
        # What was sent and answered within a minute was counted within it.
        times = self.members[1].admitted
        most = max((sum(first <= sent and end < first + 60 for sent, end in times) for first, _ in times), default=0)
        if most > PER_MINUTE:
            raise AssertionError(f"{most} requests in a minute, where {PER_MINUTE} are the limit")


def _tokens(own: httpx.Client) -> int:
    """What is in the table of usage for whoever asks."""
    rows = own.get("/v1/usage", params={"group_by": "day"}).json()["data"]
    return sum(row["completion_tokens"] for row in rows)
