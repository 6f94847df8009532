"""A machine on which the engine cannot run: one line and a hint, before anything slow begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service.engine import build
from service.engine.build import build_engine, check_machine, host_memory_available, needed_bytes
from service.engine.config import EngineConfig
from service.engine.errors import CannotStart
from tests.service.launch import run


def config_for(folder: Path, weights: int, device: str = "cpu", **options: object) -> EngineConfig:
    """Of a bfloat16 model of so many bytes, of which the disk holds none."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "model_type": "llama"}))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    return EngineConfig(
        model_path=str(folder), blobs_dir="/none", cache_dir="/none", socket="ipc:///none", device=device, **options
    )  # fmt: skip


def test_a_model_that_does_not_fit_in_memory_is_refused_by_its_size(tmp_path: Path) -> None:
    config = config_for(tmp_path / "Huge-900B", host_memory_available())  # doubled, since CPU means float32
    with pytest.raises(CannotStart) as caught:
        build_engine(config, lambda *_: None)
    assert str(caught.value).startswith("not enough memory on cpu: the weights of Huge-900B take about ")
    assert str(caught.value).endswith(" GiB are free")
    assert "--model" in caught.value.hint


def test_what_is_free_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path / "base", 3 << 20)
    assert needed_bytes(config) == 6 << 20
    monkeypatch.setattr(build, "host_memory_available", lambda: 6 << 20)
    check_machine(config)
    monkeypatch.setattr(build, "host_memory_available", lambda: (6 << 20) - 1)
    with pytest.raises(CannotStart, match="not enough memory on cpu"):
        check_machine(config)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_memory_that_runs_out_while_the_model_is_loaded(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: EngineConfig) -> None:
        raise error

    monkeypatch.setattr(build, "load_model", load)
    with pytest.raises(CannotStart) as caught:
        build_engine(config_for(tmp_path / "base", 1 << 20), lambda *_: None)
    assert str(caught.value) == "not enough memory on cpu: the weights of base take about 0.0 GiB"


@pytest.mark.parametrize(
    "message",
    [
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "Found no NVIDIA driver on your system.\nPlease check that you have an NVIDIA GPU",
    ],
)
def test_a_driver_that_torch_cannot_use(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch says then; a machine with such a driver is no part of the tests."""

    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(CannotStart) as caught:
        build_engine(config_for(tmp_path / "base", 1, "cuda", eager=True), lambda *_: None)
    first = message.partition("\n")[0]
    assert str(caught.value) == f"LORAPLEX_DEVICE=cuda, but the GPU cannot be used: {first}"
    assert "CUDA 13.0" in caught.value.hint
    assert "nvidia-smi" in caught.value.hint
    assert "--device cpu" in caught.value.hint


def test_a_device_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    check_machine(config_for(tmp_path / "fits", 3 << 30, "cuda"))
    with pytest.raises(CannotStart) as caught:
        check_machine(config_for(tmp_path / "base", 4 << 30, "cuda"))
    problem = "not enough memory on cuda: the weights of base take about 4.0 GiB, and 3.0 GiB are free"
    assert str(caught.value) == problem


@pytest.mark.parametrize(("budget", "fits"), [(0, True), (1, True), (2, False), (8, False), (9, True), (256, True)])
def test_a_budget_whose_steps_would_not_all_give_the_same_bits(
    budget: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    config = config_for(tmp_path / "base", 1 << 20, "cuda", deterministic=True, max_tokens_per_step=budget)
    if fits:
        check_machine(config)
        return
    with pytest.raises(CannotStart, match=f"LORAPLEX_MAX_TOKENS_PER_STEP={budget}: "):
        check_machine(config)


def test_the_service_says_it_in_one_line_and_a_hint(tmp_path: Path, base_model_dir: Path) -> None:
    """A model of 8 TiB, of which the disk holds the small files alone."""
    model = tmp_path / "Huge-4T"
    model.mkdir()
    for file in base_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).symlink_to(file)
    weights = model / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(8 << 40)
    done = run("--data-dir", str(tmp_path / "data"), "--port", "0", "--model", str(model), timeout=180)
    assert done.returncode == 1, done.stdout
    problem, hint = done.stdout[done.stdout.rindex("loraplex: ") :].splitlines()
    assert "not enough memory on cpu: the weights of Huge-4T take about 16384.0 GiB" in problem
    assert hint.startswith("  hint: choose a smaller model (--model)")
    assert "Traceback" not in done.stdout
