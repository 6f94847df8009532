"""The commands for tenants, keys, sharing, use and the audit log, against a real server with tenants."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.cli import app
from service.commands.tenants import expiry, limits_of
from tests.service.client_helpers import peft_folder
from tests.service.inference_helpers import BASE
from tests.service.tenant_helpers import ADMIN, TenantServer, complete, wait_for
from tests.service.test_cli import Terminal, complete_from_server

Run = Callable[..., Any]


@pytest.fixture
def cli(tenants: TenantServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command as the admin, or with `key`."""
    monkeypatch.setenv("LORAPLEX_URL", tenants.url)

    def run(*arguments: object, key: str = ADMIN) -> Any:
        monkeypatch.setenv("LORAPLEX_KEY", key)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def rows(done: Any) -> list[list[str]]:
    assert done.exit_code == 0, done.output
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_tenants(cli: Run) -> None:
    name = "cli-acme"
    limits = ["--limit", "requests-per-minute=5k", "--limit", "stored_bytes=10G"]
    made = cli("tenants", "create", name, "--weight", "2", *limits)
    assert (made.exit_code, made.stderr) == (0, "")
    assert made.stdout.startswith(f"tenant: {name}\nweight: 2\nstate: active\nrequests_per_minute: at most 5000\n")
    again = cli("tenants", "create", name)
    assert (again.exit_code, again.stdout) == (1, "")
    assert f"There is a tenant '{name}' already." in again.stderr
    entry = [name, "2", "active", "requests_per_minute=5000, stored_bytes=10000000000"]
    assert entry in rows(cli("tenants"))
    assert entry in rows(cli("tenants", "list"))
    assert name in [each["name"] for each in json.loads(cli("tenants", "list", "--json").stdout)]
    shown = cli("tenants", "show", name).stdout
    assert "requests_per_minute: 0 of 5000\n" in shown
    assert "tokens_per_minute: 0\n" in shown
    assert "stored_bytes: 0 of 10000000000\n" in shown
    changed = cli("tenants", "set", name, "--disable", "--limit", "stored_bytes=none", "--limit", "max_rank=16").stdout
    assert "state: disabled\n" in changed
    assert "max_rank: at most 16\n" in changed
    assert "stored_bytes" not in changed
    assert "weight: 2\n" in changed
    assert json.loads(cli("tenants", "set", name, "--enable", "--json").stdout)["disabled"] is False
    unknown = cli("tenants", "set", name, "--limit", "horses=3")
    assert unknown.exit_code == 1
    assert "horses" in unknown.stderr
    assert cli("tenants", "delete", name).stdout == f"{name}  deleted (0 adapters)\n"
    missing = cli("tenants", "show", name)
    assert missing.exit_code == 1
    assert (
        missing.stderr == f"loraplex: There is no tenant '{name}'.\n  hint: `loraplex tenants` shows which there are\n"
    )


def test_keys(cli: Run, tenants: TenantServer) -> None:
    name = tenants.tenant()
    made = cli(
        "keys", "create", name, "--scope", "infer", "--scope", "upload", "--expires", "2d", "--description", "ci"
    )
    assert (made.exit_code, made.stderr) == (0, "")
    key = made.stdout.removesuffix("\n")
    assert re.fullmatch(r"lpx_[0-9a-f]{16}_[0-9a-f]{40}", key)  # and nothing else: KEY=$(loraplex keys create ...)
    identity = key.split("_")[1]
    (row,) = rows(cli("keys", "list", name))
    assert (row[:2], row[3:]) == ([identity, "infer,upload"], ["never", "ci", "active"])
    (as_json,) = json.loads(cli("keys", "list", name, "--json").stdout)
    assert abs(as_json["expires_at"] - as_json["created"] - 2 * 86400) < 60
    assert cli("list", key=key).exit_code == 0
    refused = cli("tenants", key=key)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "hint: LORAPLEX_KEY (or --key) has to be the admin key here" in refused.stderr
    off = cli("keys", "set", name, identity, "--disable", "--expires", "never")
    assert (off.exit_code, off.stdout) == (0, f"{identity}  disabled  expires never\n")
    assert cli("list", key=key).exit_code == 1
    assert json.loads(cli("keys", "set", name, identity, "--enable", "--json").stdout)["disabled"] is False
    assert cli("list", key=key).exit_code == 0
    assert "key" in json.loads(cli("keys", "create", name, "--scope", "manage", "--json").stdout)
    assert cli("keys", "delete", name, identity).stdout == f"{identity}  deleted\n"
    assert cli("keys", "delete", name, identity, "--yes").exit_code == 1
    revoked = cli("list", key=key)
    assert revoked.exit_code == 1
    assert "hint: LORAPLEX_KEY (or --key) gives the key" in revoked.stderr

    on_terminal = Terminal("keys", "create", name, "--scope", "infer", url=tenants.url, LORAPLEX_KEY=ADMIN)
    assert on_terminal.finish() == 0
    assert "it is not shown again" in on_terminal.text

    audit = rows(cli("audit", "--limit", "5"))
    assert [each[3] for each in audit] == ["create_key", "delete_key", "delete_key", "create_key", "change_key"]
    assert audit[2][1:] == ["admin", "default", "delete_key", f"{name} {identity}", "done", "200"]
    assert audit[1][4:] == [f"{name} {identity}", "refused", "404"]
    assert json.loads(cli("audit", "--tenant", name, "--json").stdout) == []


def test_sharing(cli: Run, tenants: TenantServer, tmp_path: Path) -> None:
    one, other = tenants.tenant(), tenants.tenant()
    mine, theirs = tenants.key(one), tenants.key(other)
    assert cli("upload", "news", peft_folder(tmp_path / "news", 71), key=mine).exit_code == 0
    assert cli("share", "news", key=mine).stdout == "news  private\n"
    assert cli("show", f"{one}/news", key=theirs).exit_code == 1
    assert (
        cli("share", "news", "--with", other, "--with", "later", key=mine).stdout
        == f"news  shared with later, {other}\n"
    )
    assert f"visibility: shared with later, {other}\n" in cli("show", "news", key=mine).stdout
    assert f"visibility: shared with {other}\n" in cli("show", f"{one}/news", key=theirs).stdout
    assert rows(cli("list", "--tenant", one, key=theirs))[0][0] == f"{one}/news"
    assert cli("run", f"{one}/news", "Hello", "--max-tokens", "2", key=theirs).exit_code == 0
    assert complete_from_server(f"loraplex show {one}/n", tenants.url, LORAPLEX_KEY=theirs) == [f"{one}/news"]
    denied = cli("delete", f"{one}/news", key=theirs)
    assert denied.exit_code == 1
    assert "cannot be changed with a key of another one" in denied.stderr
    assert cli("share", "news", "--public", key=mine).stdout == "news  public\n"
    assert json.loads(cli("share", "news", "--private", "--json", key=mine).stdout)["visibility"] == "private"
    # The admin for a tenant.
    assert cli("share", "news", "--public", "--tenant", one).stdout == "news  public\n"
    assert rows(cli("list", "--tenant", one))[0][0] == "news"
    assert cli("merges", "--tenant", one).exit_code == 0
    down = tmp_path / "down"
    assert cli("download", f"{one}/news@1", down).exit_code == 0
    assert (down / "adapter_config.json").exists()
    assert cli("delete", f"{one}/news").stdout.startswith("news  deleted (")
    assert cli("list", "--tenant", "nobody-at-all").exit_code == 1


def test_usage(cli: Run, tenants: TenantServer) -> None:
    with tenants.member() as (name, client):
        key = client.headers["Authorization"].removeprefix("Bearer ")
        for tokens in (2, 3):
            assert complete(client, BASE, max_tokens=tokens, ignore_eos=True).status_code == 200
        wait_for(lambda: rows(cli("usage", "--group-by", "", key=key))[0][0] == "2")
        (row,) = rows(cli("usage", key=key))
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row[0])
        assert (row[1], row[4]) == ("2", "5")
        (row,) = rows(cli("usage", "--tenant", name, "--group-by", "tenant,adapter"))
        assert (row[:3], row[5]) == ([name, "", "2"], "5")
        text = cli("usage", "--csv", "--group-by", "adapter", "--from", "2026-01-01", key=key).stdout
        (entry,) = csv.DictReader(io.StringIO(text))
        assert (entry["requests"], entry["completion_tokens"]) == ("2", "5")
        before = ["--from", "2025-01-01", "--to", "2025-01-02T00:00"]
        assert json.loads(cli("usage", *before, "--json", "--group-by", "day", key=key).stdout) == []
        assert cli("usage", "--tenant", "default", key=key).exit_code == 1
        wrong = cli("usage", "--group-by", "weekday", key=key)
        assert wrong.exit_code == 1
        assert "'weekday'" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tenants", "set", "a"], "one of them is needed"),
        (["tenants", "set", "a", "--enable", "--disable"], "only one of them"),
        (["tenants", "create", "a", "--limit", "adapters=many"], "is not NAME=NUMBER"),
        (["keys", "create", "a"], "--scope"),
        (["keys", "create", "a", "--scope", "all"], "all"),
        (["keys", "create", "a", "--scope", "infer", "--expires", "soon"], "is not like 90d"),
        (["keys", "list"], "TENANT"),
        (["keys", "set", "a", "b"], "--disable"),
        (["keys", "set", "a", "b", "--disable", "--enable"], "only one"),
        (["share", "a", "--public", "--private"], "only one of them"),
        (["share", "a", "--with", "b", "--public"], "only one of them"),
        (["usage", "--csv", "--json"], "only one of them"),
        (["tenants", "lst"], "Did you mean 'list'"),
    ],
)
def test_wrong_usage_is_2(cli: Run, arguments: list[str], message: str) -> None:
    done = cli(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert message in re.sub(r"\s+", " ", done.stderr)


def test_a_server_with_one_user_says_so(monkeypatch: pytest.MonkeyPatch, server: Any, adapters: dict[str, str]) -> None:
    monkeypatch.setenv("LORAPLEX_URL", server.url)
    for command in (["tenants"], ["keys", "list", "a"]):
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "has one user and no tenants" in done.stderr
    assert CliRunner().invoke(app, ["share", "first"]).stdout == "first  this server has one user\n"


def test_limits_and_expiries() -> None:
    given = ["adapters=0", "stored-bytes=2T", "tokens_per_minute=15k", "resident_bytes=3M", "max_rank=none"]
    assert limits_of(given) == {
        "adapters": 0, "stored_bytes": 2 * 10**12, "tokens_per_minute": 15000, "resident_bytes": 3 * 10**6,
        "max_rank": None,
    }  # fmt: skip
    assert limits_of(None) is None
    for wrong in ("", "adapters", "adapters=", "adapters=-1", "adapters=1.5", "adapters=1K", "=3", "adapters=٣"):
        with pytest.raises(typer.BadParameter):
            limits_of([wrong])
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert expiry("90d", now) == now + timedelta(days=90)
    assert expiry("12h", now) == now + timedelta(hours=12)
    assert expiry("2027-01-31", now) == datetime(2027, 1, 31, tzinfo=UTC)
    assert expiry("2027-01-31T12:00+02:00", now) == datetime(2027, 1, 31, 10, tzinfo=UTC)
    for wrong in ("", "0d", "d", "9999999d", "2027-31-01", "-1d", "tomorrow"):
        with pytest.raises(typer.BadParameter):
            expiry(wrong, now)
