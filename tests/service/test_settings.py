"""Settings come from flags, then variables, then defaults; what is wrong is named with its value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, detect_device, parse_size
from service.startup_checks import StartError, check_address

from .launch import run


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("LORAPLEX_"):
            monkeypatch.delenv(key)


def test_flags_win_over_variables_and_none_means_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "9001")
    monkeypatch.setenv("LORAPLEX_HOST", "0.0.0.0")
    settings = Settings.load(port=9002, host=None, device=None)
    assert (settings.port, settings.host, settings.device) == (9002, "0.0.0.0", "auto")
    assert not settings.is_loopback
    assert Settings.load(host="localhost").is_loopback
    assert Settings.load(host="::1").is_loopback


def test_an_empty_variable_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "")
    assert Settings.load().port == 8000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LORAPLEX_PORT", "70000"),
        ("LORAPLEX_PORT", "http"),
        ("LORAPLEX_DEVICE", "tpu"),
        ("LORAPLEX_DTYPE", "int8"),
        ("LORAPLEX_API_WORKERS", "0"),
        ("LORAPLEX_ARENA_BYTES", "-1"),
        ("LORAPLEX_ARENA_BYTES", "8 gallons"),
        ("LORAPLEX_SERVED_NAME", "no spaces"),
        ("LORAPLEX_DETERMINISTIC", "perhaps"),
    ],
)
def test_a_wrong_variable_is_one_line_with_key_and_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{variable}={value}: ")
    assert "\n" not in str(caught.value)


def test_every_wrong_key_has_its_line_and_flags_are_named_as_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_DEVICE", "tpu")
    with pytest.raises(SettingsError) as caught:
        Settings.load(port=-1, colour="red")
    lines = sorted(caught.value.problems)
    assert len(lines) == 3
    assert lines[0].startswith("LORAPLEX_DEVICE=tpu: ")
    assert lines[1] == "colour: there is no such setting"
    assert lines[2].startswith("port=-1: ")


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SettingsError, match="should be a folder"):
        Settings.load(data_dir=path)


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("8GiB", 8 * 2**30), ("1.5g", 1_500_000_000), ("2 MiB", 2 * 2**20), ("3kB", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert Settings.load(arena_bytes=text).arena_bytes == size


def test_the_environment_carries_everything_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings.load(
        port=0, data_dir=tmp_path, model="/m/x", deterministic=True, prefix_caching=False, arena_bytes="2GiB"
    )
    for key, value in settings.environment().items():
        monkeypatch.setenv(key, value)
    assert Settings.load() == settings
    assert Settings.unknown_variables() == []
    monkeypatch.setenv("LORAPLEX_PROT", "1")
    assert Settings.unknown_variables() == ["LORAPLEX_PROT"]


def test_the_engine_gets_its_share(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path, device="cpu", max_queue=7, kv_pages=20, deterministic=True, threads=1)
    config = settings.engine_config("/models/x")
    assert (config.model_path, config.device, config.max_queue, config.kv_pages) == ("/models/x", "cpu", 7, 20)
    assert config.deterministic
    assert config.threads == 1
    assert config.blobs_dir == str(tmp_path / "blobs")
    assert config.socket == settings.engine_socket
    assert Settings.load(data_dir=tmp_path).engine_config("/models/x").device == detect_device()


def test_a_long_data_dir_has_a_short_socket_of_its_own(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    first, again = Settings.load(data_dir=long).engine_socket, Settings.load(data_dir=long).engine_socket
    other = Settings.load(data_dir=tmp_path / ("y" * 90)).engine_socket
    assert first == again != other
    assert len(first.removeprefix("ipc://")) <= 100
    assert Settings.load(data_dir="/d").engine_socket == "ipc:///d/run/engine.ipc"


def test_the_base_answers_to_its_folder_or_to_the_served_name() -> None:
    assert Settings.load(model="/models/SmolLM2-135M-Instruct").base_name() == "SmolLM2-135M-Instruct"
    assert Settings.load(model="/hub/models--org--tiny/snapshots/0123abc").base_name() == "tiny"
    assert Settings.load(model="/models/.odd name").base_name() == "odd-name"
    assert Settings.load(model="/models/x", served_name="assistant").base_name() == "assistant"


def test_the_admin_key_is_passed_on_but_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "an-admin-key-of-some-length"
    settings = Settings.load(admin_key=key)
    assert settings.multi_tenant
    assert not Settings.load().multi_tenant
    assert settings.environment()["LORAPLEX_ADMIN_KEY"] == key
    assert key not in repr(settings) + str(settings)
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "too-short-a-key")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert str(caught.value).startswith("LORAPLEX_ADMIN_KEY=(secret): should be at least 16 ")


def test_a_public_address_needs_a_key_or_an_explicit_word() -> None:
    with pytest.raises(StartError, match=r"LORAPLEX_HOST=0\.0\.0\.0") as caught:
        check_address(Settings.load(host="0.0.0.0"))
    assert "LORAPLEX_ADMIN_KEY" in caught.value.hint
    assert "LORAPLEX_ALLOW_PUBLIC" in caught.value.hint
    check_address(Settings.load(host="0.0.0.0", allow_public=True))
    check_address(Settings.load(host="0.0.0.0", admin_key="an-admin-key-of-some-length"))
    check_address(Settings.load(host="::1"))


def test_a_public_address_is_refused_in_two_lines(tmp_path: Path) -> None:
    done = run("--host", "0.0.0.0", "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    lines = done.stdout.strip().splitlines()
    assert "LORAPLEX_HOST=0.0.0.0" in lines[0]
    assert "LORAPLEX_ADMIN_KEY" in done.stdout
    assert len(lines) == 2, done.stdout
    assert not (tmp_path / "data").exists()
