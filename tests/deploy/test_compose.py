"""docker-compose.yml: valid by Compose's own schema, consistent with what it names, and safe as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from service.settings import Settings
from tests.deploy.files import COMPOSE, DEPLOY, ROOT, stages

SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("loraplex", "cpu")


def test_it_is_valid_by_the_schema_of_compose() -> None:
    """check-jsonschema brings the schema of https://github.com/compose-spec/compose-spec."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_starts_by_default_is_the_gpu_server_alone() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" not in service] == ["loraplex"]
    assert SERVICES["loraplex"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["cpu"]
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["full"]} == {
        "postgres", "s3", "prometheus", "grafana",
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_built_from_its_own_stage_and_keeps_its_state_in_volumes(name: str) -> None:
    service = SERVICES[name]
    target = service["build"]["target"]
    assert target in stages()
    assert service["image"] == f"loraplex:{target}"
    volumes = dict(reversed(volume.split(":")) for volume in service["volumes"])
    declared = next(rest for instruction, rest in stages()["runtime"] if instruction == "VOLUME")
    assert set(volumes) == set(re.findall(r'"(/\w+)"', declared))
    assert set(volumes.values()) <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_without_keys_is_published_on_this_machine_only(name: str) -> None:
    (port,) = SERVICES[name]["ports"]
    default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port)
    assert default == f"127.0.0.1:8000:{Settings.model_fields['port'].default}"
    assert SERVICES[name]["read_only"] is True
    assert SERVICES[name]["cap_drop"] == ["ALL"]


def test_every_file_that_is_mounted_is_there() -> None:
    mounted = [v.split(":")[0] for service in SERVICES.values() for v in service.get("volumes", []) if v[0] == "."]
    assert len(mounted) >= 3
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_new_secrets_every_time_and_all_that_the_full_profile_reads() -> None:
    def new() -> dict[str, str]:
        done = subprocess.run([sys.executable, DEPLOY / "new-env.py"], capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if not line.startswith("#"))

    first, second = new(), new()
    assert first["COMPOSE_PROFILES"] == "full"
    for name in ("LORAPLEX_ADMIN_KEY", "POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GRAFANA_PASSWORD"):
        assert len(first[name]) >= 16
        assert first[name] != second[name]
    assert first["POSTGRES_PASSWORD"] in first["LORAPLEX_DATABASE_URL"]
    read = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = {line.split("=")[0] for line in (DEPLOY / "env.example").read_text().splitlines() if "=" in line}
    assert set(first) <= example
    assert read <= example


def test_the_settings_of_the_full_profile_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, DEPLOY / "new-env.py"], capture_output=True, text=True, check=True)
    given = dict(line.split("=", 1) for line in done.stdout.splitlines() if not line.startswith("#"))
    for name, value in given.items():
        if name.startswith("LORAPLEX_"):
            monkeypatch.setenv(name, value)
    settings = Settings.load(host="0.0.0.0")
    assert settings.multi_tenant
    assert settings.log_format == "json"
    assert settings.database_url.get_secret_value().startswith("postgresql://loraplex:")
    assert settings.blobs_url.get_secret_value() == "s3://loraplex/adapters?endpoint=http://s3:8333"
    # The hosts that the URLs name are services of the profile.
    assert {"postgres", "s3"} <= set(SERVICES)
    assert "-bucket=loraplex" in SERVICES["s3"]["command"]
