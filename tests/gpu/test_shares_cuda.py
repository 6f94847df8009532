"""What products leave to LoRA is measured, kept, and used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from adapters.kernels import ops, triton_lora
from adapters.kernels.device_plan import DevicePlan
from adapters.kernels.shares import Size, settle
from adapters.kernels.side import Side
from adapters.kernels.tail import with_tail
from adapters.layers import LoraLinear
from tests.kernels.lora_cases import error, expected, make_site, make_table, plan_of

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LAYERS = 4
SIZES = [Size(32, tailed=False), Size(256, tailed=False), Size(512, tailed=True)]


@pytest.fixture
def step() -> Iterator[ops.Step]:
    yield ops.STEP
    ops.STEP.plan = ops.STEP.tables = ops.STEP.side = None


def test_measured_once_and_right_with_every_choice(step: ops.Step, tmp_path: Path) -> None:
    site = make_site(2048, (2048, 512))
    # As in an arena, with a place for each target of all layers.
    table = make_table([[16, 16] * LAYERS] * 8, [(2048, d) for d in site.widths] * LAYERS, torch.bfloat16, DEVICE)
    layers = []
    for _ in range(LAYERS):
        parts = [torch.randn(d, 2048, device=DEVICE, dtype=torch.bfloat16) * 2048**-0.5 for d in site.widths]
        tail = with_tail(parts, None)
        layers.append(LoraLinear(tail.whole[:2560], None, site, None, tail))  # type: ignore[arg-type]
    side, stream = Side(DEVICE), torch.cuda.Stream(DEVICE)
    table.data = torch.cat([table.data, torch.randn(64 << 20, device=DEVICE).bfloat16()])
    settle(side, table, layers, SIZES, stream, tmp_path)
    if not side.choices():
        assert side.measured == {}
        pytest.skip("products leave multiprocessors free on Hopper only")
    rows = layers[0].tail.whole.shape[0]  # type: ignore[union-attr]
    assert set(side.measured) == {(32, 2560, 2048), (256, 2560, 2048), (512, rows, 2048)}
    assert set(side.measured.values()) <= set(side.choices())
    assert torch._C._get_sm_carveout_experimental() is None

    # Another start believes the file, also one that knows of less.
    (path,) = tmp_path.iterdir()
    saved = json.loads(path.read_text())
    saved["left_free"] = [[*key, 24 if key[0] == 256 else free] for *key, free in saved["left_free"][1:]]
    path.write_text(json.dumps(saved))
    again = Side(DEVICE)
    settle(again, table, layers, SIZES, stream, tmp_path)
    assert again.measured[256, 2560, 2048] == 24
    assert set(again.measured) == set(side.measured)
    assert len(json.loads(path.read_text())["left_free"]) == 3

    plan = plan_of([(4, ((i % 8, 1.0),)) for i in range(64)])
    assert plan is not None
    step.tables, step.plan, step.side = table, DevicePlan.from_plan(plan, 16, DEVICE), side
    x = torch.randn(256, 2048, device=DEVICE, dtype=torch.bfloat16)
    weight = layers[0].weight
    assert weight is not None
    wanted = expected(x.double() @ weight.double().t(), x, site, plan, table)
    targets = triton_lora.target_tensor(site.targets, DEVICE)
    for free in side.choices():
        side.measured[256, 2560, 2048] = free
        y, delta = ops.lora_linear(x, weight, None, targets, site.offsets, site.widths)
        assert error(y + delta, wanted) < 1e-2
