"""Which modules are compiled. What they then compute: tests/kernels/test_compiled_parity.py, tests/gpu."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from service.engine import compiled
from tests.engine.oracle import ARCHITECTURES, SMALL
from tests.engine.test_architectures import SERVED

EVERY: dict[str, PreTrainedConfig] = {
    **ARCHITECTURES, **{kind: CONFIG_MAPPING[kind](**SMALL | options) for kind, options in SERVED.items()}
}  # fmt: skip


def compiled_ones(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module._compiled_call_impl is not None]


@pytest.mark.parametrize("kind", EVERY)
def test_every_layer_is_compiled_whatever_their_list_is_called(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(EVERY[kind])
    compiled.compile_layers(model, "eager")
    assert len({type(module) for module in compiled_ones(model) if len(list(module.children())) > 1}) == 1
    assert sum(len(list(module.children())) > 1 for module in compiled_ones(model)) == SMALL["num_hidden_layers"]
    compiled.undo(model)
    assert not compiled_ones(model)


def test_a_model_without_a_list_of_layers_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"])
    decoder = model.get_decoder()
    decoder.layers = nn.Sequential(*decoder.layers)
    del decoder.norm
    with caplog.at_level(logging.WARNING):
        compiled.compile_layers(model, "eager")
    assert not compiled_ones(model)
    assert "LlamaModel: no list of layers was found" in caplog.text


def test_layers_that_start_early_are_compiled_twice_and_chosen_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).eval()
    ids = torch.arange(5)[None]
    early, called = [False], []

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(options.get("options"))
            return function(*args, **kwargs)

        return call

    with torch.inference_mode():
        wanted = model(ids).logits
        monkeypatch.setattr(torch, "compile", compile_)
        compiled.compile_layers(model, starts_early=lambda: early[0])
        for early[0] in (False, True, False):
            called.clear()
            torch.testing.assert_close(model(ids).logits, wanted)
            options = {"triton.enable_pdl": True} if early[0] else None
            assert called == [options] * (SMALL["num_hidden_layers"] + 1)
        compiled.undo(model)
        called.clear()
        torch.testing.assert_close(model(ids).logits, wanted)
    assert not called
