"""Benchmarks are run now and then, by hand: what they take from the project has to be there all the same."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora_tax
from benchmarks.engine import Driver
from service.engine.config import EngineConfig
from service.engine.simulated import Options, build_engine

MODULES = sorted(path.stem for path in (Path(__file__).parent.parent / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_it_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__


def test_a_row_of_fewer_requests_than_streams_leaves_none_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver.__new__(Driver)
    config = EngineConfig(model_path="", blobs_dir="", cache_dir="", socket="", max_sequences=1)
    driver.engine, _ = build_engine(config, driver._receive, Options())
    prompts: list[list[int]] = []
    handle = driver.engine.handle
    monkeypatch.setattr(driver.engine, "handle", lambda *given: prompts.extend(given[1].prompts) or handle(*given))
    for _ in range(2):
        row = driver.row("base", 4, [], requests=2, input_len=8, output_len=3)
        assert row["output_tok_s"] > 0
        assert not driver.engine.busy
        assert len(driver.times) == 4
    assert len({tuple(prompt) for prompt in prompts}) == 8, "none is found in the prefix cache"
    with pytest.raises(ValueError, match="one: there are no adapters"):
        driver.row("one", 4, [], requests=2, input_len=8, output_len=3)


def test_lora_tax_makes_the_adapters_that_it_is_told_to_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, range]] = []
    measured: list[int] = []
    written: list[int] = []

    @contextlib.contextmanager
    def running(*_: Any) -> Iterator[float]:
        yield 0.0

    def measure(*_: Any) -> dict[str, float]:
        measured.append(len(made))
        return {"errors": 0, "output_tok_s": 1.0}

    monkeypatch.setattr(lora_tax, "running", running)
    monkeypatch.setattr(lora_tax, "upload", lambda *_: [])
    monkeypatch.setattr(lora_tax, "make", lambda _url, _model, targets, numbers: made.append((targets, numbers)))
    monkeypatch.setattr(lora_tax, "measure", measure)
    monkeypatch.setattr(lora_tax, "write", lambda _rates, adapters, _args: written.append(adapters))
    given = ["lora_tax", "MODEL", "--adapters", str(tmp_path), "--loadgen", "x", "--make", "all:3", "--turns", "1"]
    monkeypatch.setattr("sys.argv", given)
    lora_tax.main()
    assert made == [("all", range(3))]
    assert measured == [0, 1, 1, 1]
    assert written == [3]
