"""What is measured for products beside LoRA, and how it is kept (on a GPU: tests/gpu/test_shares_cuda.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.kernels import shares
from adapters.kernels.shares import ADAPTERS, RANK, Factors, Size, choose, has_room, plan_of
from adapters.layers import LoraLinear
from tests.kernels.lora_cases import make_site, make_table

CHOICES = (0, 8, 16, 24)


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


def test_made_up_factors_lie_inside_the_data() -> None:
    site = make_site(96, (48, 17))
    layer = LoraLinear(torch.zeros(65, 96), None, site, None)  # type: ignore[arg-type]
    size, largest = Size(32, tailed=False), 32 * 3 * RANK * (2 * 96 + 65)
    table = make_table([[1] * 9], [(96, 48)] * 9, torch.float32, torch.device("cpu"))
    for elements in (largest - 1, largest):
        table.data = torch.zeros(elements)
        assert has_room(table.data, [layer] * 3, size) == (elements == largest)
    made = Factors(table, 32, 3, 96, site.widths)
    assert made.ranks.shape == made.scales.shape == (32, 9), "rows as long as the table's"
    begins = made.offsets[:, :6]
    assert begins.min() == 0
    assert len(begins.unique()) == begins.numel(), "each its own"
    assert (begins + RANK * torch.tensor([[96, 48], [96, 17]] * 3)).max() <= largest
    assert (made.offsets % 8 == 0).all(), "loads of 16 bytes"


def test_what_was_measured_is_kept_for_the_same_machine(tmp_path: Path) -> None:
    machine, path = shares._machine(torch.zeros(8)), tmp_path / "compiled" / "shares.json"
    known = {(64, 6144, 4096): 16, (256, 4096, 14336): 0}
    shares._write(path, machine, known)
    assert shares._read(path, machine, CHOICES) == known
    assert shares._read(path, machine, (0, 8)) == {(256, 4096, 14336): 0}, "what is no choice is none"
    assert [file.name for file in path.parent.iterdir()] == ["shares.json"]
    for other in (shares._machine(torch.zeros(8).half()), {**machine, "code": "another"}):
        assert shares._read(path, other, CHOICES) == {}
        assert shares._digest(other) != shares._digest(machine)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"machine": 1}', '{"left_free": [[1]]}', "[" * 100_000, '{"machine": Infinity}']
)
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shares.json"
    path.write_text(text)
    machine = shares._machine(torch.zeros(8))
    assert shares._read(path, machine, CHOICES) == {}
    assert shares._read(tmp_path / "none.json", machine, CHOICES) == {}
    assert shares._read(None, machine, CHOICES) == {}
    for rows in ([[1, 2]], [["a", 1, 2, 8]], [[math.inf, 1, 2, 8]], 5):
        path.write_text(json.dumps({"machine": machine, "left_free": rows}))
        assert shares._read(path, machine, CHOICES) == {}


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "compiled" / "shares.json"
    path.mkdir(parents=True)  # a folder where the file should be
    shares._write(path, {}, {(1, 2, 3): 4})
    assert "will be measured again" in caplog.text
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"
