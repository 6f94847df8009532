"""What is measured for products beside LoRA, and how it is kept (on a GPU: tests/gpu/test_shares_cuda.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.kernels import shares
from adapters.kernels.shares import ADAPTERS, RANK, Factors, Size, choose, plan_of


def test_the_fastest_is_chosen_where_it_is_faster_than_the_rule() -> None:
    assert choose({0: 1.0, 8: 0.8, 16: 0.9}, 16) == 8
    assert choose({0: 0.99, 8: 1.2, 16: 1.0}, 16) == 16
    assert choose({0: 1.0, 8: 0.9}, 16) == 8


@pytest.mark.parametrize("tokens", [16, 63, 64, 100, 1024])
def test_every_token_has_an_adapter_beside_a_whole_step(tokens: int) -> None:
    plan = plan_of(Size(tokens, tailed=False), ADAPTERS)
    assert sorted(plan.tokens) == list(range(tokens))
    assert sorted(plan.seg_row) == list(range(min(ADAPTERS, tokens)))
    assert np.ptp(np.diff(plan.seg_start)) <= 1, "as many tokens each"


def test_what_decodes_beside_tails_has_one_token_each() -> None:
    plan = plan_of(Size(512, tailed=True), ADAPTERS)
    assert sorted(plan.seg_row) == list(range(ADAPTERS))
    assert (np.diff(plan.seg_start) == 1).all()
    assert plan.tokens.max() < ADAPTERS


@pytest.mark.parametrize("elements", [RANK * 96, RANK * 96 + 40, 100_000])
def test_made_up_factors_lie_inside_the_data(elements: int) -> None:
    data = torch.zeros(elements, dtype=torch.bfloat16)
    table = Factors(data, 64, 3, 96, (48, 17))
    ends = table.offsets + RANK * torch.tensor([[96, 48], [96, 17]] * 3)
    assert table.offsets.min() >= 0
    assert ends.max() <= elements
    assert (table.offsets % 8 == 0).all(), "loads of 16 bytes"
    assert table.ranks.shape == table.scales.shape == (64, 6)


def test_what_was_measured_is_kept_for_the_same_machine(tmp_path: Path) -> None:
    data, path = torch.zeros(8, dtype=torch.bfloat16), tmp_path / "compiled" / "shares.json"
    known = {(64, 6144, 4096): 16, (256, 4096, 14336): 0}
    shares._write(path, data, known)
    assert shares._read(path, data) == known
    assert [file.name for file in path.parent.iterdir()] == ["shares.json"]
    assert shares._read(path, data.half()) == {}, "another dtype"
    saved = json.loads(path.read_text())
    saved["machine"]["device"] = "another"
    path.write_text(json.dumps(saved))
    assert shares._read(path, data) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"machine": 1}', '{"left_free": [[1]]}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shares.json"
    path.write_text(text)
    assert shares._read(path, torch.zeros(8)) == {}
    assert shares._read(tmp_path / "none.json", torch.zeros(8)) == {}
    assert shares._read(None, torch.zeros(8)) == {}


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "compiled").write_text("a file where the folder should be")
    shares._write(tmp_path / "compiled" / "shares.json", torch.zeros(8), {(1, 2, 3): 4})
    assert "will be measured again" in caplog.text
