"""A merged checkpoint of the real base, which is stored in bfloat16: its logits against those of the unmerged adapters.

W0 + Σ w·s·B A is rounded to bfloat16, whose numbers have 8 significant bits: no merge stored in it can be exact. The
measure is PEFT's own merge: computed in float32 and rounded once, as ours is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters.checkpoint import merge_checkpoint
from adapters.checkpoint_layout import SINGLE_FILE
from adapters.merge_request import MergeOptions
from adapters.safetensors_header import read_header
from tests.adapters.conftest import build_manifest
from tests.adapters.merging import merged_by_peft, source_of, with_sources

TEXT = "The lighthouse keeper wrote in his log that evening: wind from the north-west, two ships, no fog."


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.timeout(600)
def test_the_logits_are_as_near_as_bfloat16_allows(
    base_model_dir: Path, example_adapters: Path, tmp_path: Path
) -> None:
    weights = {"pirate": 0.7, "headline": -0.4}
    tokens = AutoTokenizer.from_pretrained(base_model_dir)(TEXT, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> Tensor:
        return model(tokens).logits[0].double()

    base = load(base_model_dir)
    manifest, plain = build_manifest(base), logits(base)
    folders = [example_adapters / name for name in weights]
    peft = with_sources(base, folders)
    merged_by_peft(peft, list(weights.values()), "cat")  # the exact mix
    peft.set_adapter("merged")
    exact = logits(peft.eval())
    by_peft = peft.merge_and_unload()
    for parameter in by_peft.parameters():  # as save_pretrained in bfloat16 and loading it again
        parameter.data = parameter.data.bfloat16().float()
    unavoidable = (logits(by_peft) - exact).norm()

    sources = [source_of(folder, weight) for folder, weight in zip(folders, weights.values(), strict=True)]
    merge_checkpoint(sources, base_model_dir, manifest, tmp_path / "out", MergeOptions())
    stored = read_header(tmp_path / "out" / SINGLE_FILE).tensors.values()
    assert {ref.dtype for ref in stored} == {"BF16"}
    error = (logits(load(tmp_path / "out")) - exact).norm()
    assert unavoidable > 0
    assert error <= 1.5 * unavoidable
    # What the adapters change is far more than what rounding does: a merge that lost them would not pass.
    assert (exact - plain).norm() > 10 * unavoidable
