"""Loads the base model, refuses what cannot be served exactly, and describes it in a manifest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapters.manifest import Manifest, Module
from service.engine import attention
from service.engine.attention import LayerShape
from service.engine.config import EngineConfig
from service.engine.core import is_out_of_memory
from service.engine.errors import CannotStart, UnsupportedModel
from service.engine.fingerprint import fingerprint, former_fingerprints

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBED = 16
"""Tokens of the pass that finds out what a model does; different ones, so that experts would share them out."""
_OWN_ATTENTION = "its attention does not go through transformers' common interface"
ROTARY_BY_LENGTH = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""Rotary scalings whose frequencies depend on the longest sequence of the batch, and the length up to which they
do not."""


@dataclass(slots=True)
class LoadedModel:
    """The frozen base model, still with its own linears (the runner installs the LoRA layers)."""

    model: PreTrainedModel
    manifest: Manifest
    shapes: list[LayerShape]
    attention_modules: list[nn.Module]
    device: torch.device
    dtype: torch.dtype


def load_model(config: EngineConfig) -> LoadedModel:
    """Loads config.model_path onto config.device.

    Raises UnsupportedModel with the reason when the model cannot be served exactly, CannotStart when transformers does
    not load it."""
    device = torch.device(config.device)
    with _said_in_one_line(config):
        hf_config = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    dtype = _dtype(config, hf_config)
    if getattr(hf_config, "quantization_config", None):
        raise UnsupportedModel("quantization_config: quantised checkpoints are not served yet")
    max_positions = _max_positions(config, hf_config)
    attention.register()
    folder = Path(config.model_path)
    # 16,000 reads and 64 MB to hash for 16 GB, which need the interpreter's lock as little as the copying of weights.
    with ThreadPoolExecutor(1) as beside, _said_in_one_line(config):
        identity = beside.submit(lambda: (fingerprint(folder), former_fingerprints(folder)))
        # Said outright: by default transformers asks about code, and takes pickles where it finds nothing else.
        made: Any = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model: PreTrainedModel
    model, found = made
    _check_found(folder.name, sorted(found["missing_keys"]), sorted(found["mismatched_keys"]))
    return describe(model, device, dtype, max_positions, *identity.result())


@contextmanager
def _said_in_one_line(config: EngineConfig) -> Iterator[None]:
    """What transformers does not load, as CannotStart."""
    try:
        yield
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise
        raise UnsupportedModel(f"{Path(config.model_path).name}: {_OWN_ATTENTION}") from error
    except (ValueError, OSError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CannotStart(
            f"{Path(config.model_path).name}: transformers does not load it: {first}",
            "a model is a folder with config.json and *.safetensors of an architecture that transformers itself knows",
        ) from error


def _check_found(name: str, missing: list[str], mismatched: list[tuple[str, Any, Any]]) -> None:
    """transformers makes up what a checkpoint lacks, and says so in passing."""
    hint = "is the checkpoint complete, and are config.json and its weights of the same model?"
    if mismatched:
        key, stored, wanted = mismatched[0]
        problem = f"{key} is {list(stored)} in its files, and {list(wanted)} by config.json"
        raise CannotStart(f"{name}: {problem}", hint)
    if missing:
        raise CannotStart(f"{name}: its files lack {len(missing)} tensors, the first is {missing[0]}", hint)


def describe(
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    max_positions: int,
    identity: str,
    former: tuple[str, ...] = (),
) -> LoadedModel:
    """Freezes and probes a causal language model that is already on its device."""
    model.eval().requires_grad_(False)
    if (experts := _experts(model)) is not None:
        raise UnsupportedModel(f"{type(model).__name__}: a mixture of experts ({experts}) is not served yet")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{type(model).__name__}: forward has no logits_to_keep")
    model.config._attn_implementation = attention.NAME
    calls = _probe(model, device)
    manifest = Manifest(
        fingerprint=identity,
        architecture=type(model).__name__,
        model_type=str(model.config.model_type),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        vocab_size=cast(nn.Embedding, model.get_input_embeddings()).num_embeddings,
        max_positions=max_positions,
        modules=tuple(_modules(model)),
        former=former,
    )
    return LoadedModel(
        model=model,
        manifest=manifest,
        shapes=[shape for _, shape in calls],
        attention_modules=[module for module, _ in calls],
        device=device,
        dtype=dtype,
    )


def _dtype(config: EngineConfig, hf_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if config.device == "cpu":
        return torch.float32
    own = getattr(hf_config, "dtype", None)
    return own if own in (torch.bfloat16, torch.float16) else torch.bfloat16


def _max_positions(config: EngineConfig, hf_config: Any) -> int:
    text = hf_config.get_text_config()
    limit = int(text.max_position_embeddings)
    wanted = config.max_positions or limit
    if wanted > limit:
        raise UnsupportedModel(f"max_positions: {wanted} is more than the model's {limit}")
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        kind = part.get("rope_type")
        if kind in ROTARY_BY_LENGTH:
            key = ROTARY_BY_LENGTH[kind]
            exact = int(part.get(key) or getattr(text, key, None) or limit)
            if wanted > exact:
                raise UnsupportedModel(
                    f"rope_type {kind!r} changes every sequence of a batch once one is longer than {exact}; "
                    f"set LORAPLEX_MAX_POSITIONS={exact} or less to serve this model exactly"
                )
    return wanted


def _probe(model: PreTrainedModel, device: torch.device) -> list[tuple[nn.Module, LayerShape]]:
    """One forward pass over PROBED tokens that notes every attention call, and what the linears see. Refuses what
    cannot be served."""
    text = model.config.get_text_config()
    types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if types - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layer_types: {sorted(types)}, served are full_attention and sliding_attention")
    probe = attention.Probe()
    attention.register(probe)
    try:
        with torch.inference_mode(), _all_tokens_in_every_linear(model):
            positions = torch.arange(PROBED, device=device)[None]
            model(
                input_ids=positions % cast(nn.Embedding, model.get_input_embeddings()).num_embeddings,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=torch.tensor([PROBED - 1], device=device),
            )
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever code of 200 architectures raises that is called in another way than it knows
        if is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UnsupportedModel(f"{type(model).__name__}: {PROBED} tokens do not go through it ({what})") from error
    finally:
        attention.register()
    if not probe.calls:
        raise UnsupportedModel(f"{type(model).__name__}: {_OWN_ATTENTION}")
    modules = [id(module) for module, _ in probe.calls]
    if len(modules) != text.num_hidden_layers or len(set(modules)) != len(modules):
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(modules)} attention calls in {text.num_hidden_layers} layers; "
            "only models whose layers each attend once over their own keys and values are served"
        )
    windows = getattr(text, "layer_types", None)
    if windows is not None:
        for (_, shape), kind in zip(probe.calls, windows, strict=True):
            if (kind == "sliding_attention") != (shape.window is not None):
                raise UnsupportedModel(f"layer {shape.layer}: {kind}, but its attention call has window {shape.window}")
    return probe.calls


@contextmanager
def _all_tokens_in_every_linear(model: PreTrainedModel) -> Iterator[None]:
    """Refuses a forward pass in which a linear sees other rows than the tokens: LoRA's plan is by the step's tokens."""
    output = model.get_output_embeddings()

    def check(name: str, x: Tensor) -> None:
        if x.shape.numel() != PROBED * x.shape[-1]:
            raise UnsupportedModel(
                f"{type(model).__name__}: {name} is called with {list(x.shape)} for {PROBED} tokens; served are only "
                "models whose linears see all tokens of a step"
            )

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: check(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _experts(model: PreTrainedModel) -> str | None:
    """The first parameter that holds the weights of several linears, as transformers keeps those of experts."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    return f"{name}.{leaf} {list(parameter.shape)}"
    return None


def _modules(model: PreTrainedModel) -> list[Module]:
    output = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = "output" if module is output else "linear"
            found.append(Module(name, kind, module.in_features, module.out_features))  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding):
            found.append(Module(name, "embedding", module.num_embeddings, module.embedding_dim))
    return found
