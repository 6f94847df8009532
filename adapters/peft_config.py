"""adapter_config.json: what each field of PEFT's LoraConfig (0.21) means to a server that only runs the adapter.

Every field stands in FIELDS as honoured, harmless (it only steers training, or PEFT itself ignores it when it loads an
adapter) or refused unless neutral. A field that is not in the table is refused by name, since a future PEFT may give
it any meaning. Defaults of absent fields are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from adapters.errors import shown
from adapters.safetensors_header import load_json

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 512
MAX_LIST = 16384
MAX_REGEX_KEYS = 512
FLOAT32_MAX = 3.4028234663852886e38

PLAIN_INITS = ("eva", "orthogonal")
"""Values of init_lora_weights, beside true, false, gaussian and mica, after which PEFT runs B·A on the base as it is.
pissa, corda, olora, loftq and lora_ga change the base weights, and the adapter fits only that changed base."""


class LoraSettings(msgspec.Struct, frozen=True):
    """The fields that decide which modules are adapted, and how strongly; validated, PEFT's defaults filled in."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: dict[str, int]
    """In the order of the file: PEFT takes the first key that matches."""
    alpha_pattern: dict[str, float]


class Field(NamedTuple):
    """`check` gives None for a value that is served, else what would be accepted instead."""

    role: Literal["honoured", "harmless", "refused"]
    check: Callable[[Any], str | None]


def _any(_: Any) -> None:
    return None


def _only(*values: Any, why: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        neutral = any(type(value) is type(item) and value == item for item in values)
        return None if neutral else why

    return check


def _rank(value: Any) -> str | None:
    served = type(value) is int and 1 <= value <= MAX_RANK
    return None if served else f"ranks are integers from 1 to {MAX_RANK}"


def _alpha(value: Any) -> str | None:
    # Beyond float32 the scale, which kernels read as float32, would be infinite.
    served = type(value) in (int, float) and abs(value) <= FLOAT32_MAX
    return None if served else "alpha must be a finite number"


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LIST and all(isinstance(item, str) for item in value)


def _target_modules(value: Any) -> str | None:
    served = (isinstance(value, str) and value) or (_names(value) and value)
    return None if served else 'give a list of module names, a regular expression, or "all-linear"'


def _exclude_modules(value: Any) -> str | None:
    served = value is None or isinstance(value, str) or _names(value)
    return None if served else "give a list of module names, a regular expression, or null"


def _layers(value: Any) -> str | None:
    items = value if isinstance(value, list) else [] if value is None else [value]
    served = len(items) <= MAX_LIST and all(type(item) is int for item in items)
    return None if served else "give a layer number, a list of layer numbers, or null"


def _layers_pattern(value: Any) -> str | None:
    served = value is None or isinstance(value, str) or (_names(value) and len(value) <= MAX_REGEX_KEYS)
    return None if served else "give the name of the module list, a list of such names, or null"


def _pattern_of(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def check_all(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > MAX_LIST:
            return "give an object of module names or regular expressions"
        for key, item in value.items():
            fault = check(item)
            if fault:
                return f"{shown(key)}: {shown(item)}: {fault}"
        return None

    return check_all


def _init(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str) and (value in PLAIN_INITS or value.lower() in ("gaussian", "mica")):
        return None
    return (
        "this initialisation changes the base weights, so that the adapter fits only the changed base; convert it with"
        " save_pretrained(..., path_initial_model_for_weight_conversion=...), which sets init_lora_weights to true"
    )


_DORA = "DoRA is not served; merge it or train with use_dora=false"

FIELDS: dict[str, Field] = {
    # What it is
    "peft_type": Field("honoured", _only("LORA", why='only "LORA" is served')),
    "task_type": Field("honoured", _only("CAUSAL_LM", None, why='only "CAUSAL_LM" or null is served')),
    "auto_mapping": Field("harmless", _any),
    "peft_version": Field("harmless", _any),
    "base_model_name_or_path": Field("harmless", _any),
    "revision": Field("harmless", _any),
    "inference_mode": Field("harmless", _any),
    # Which modules, how strongly
    "r": Field("honoured", _rank),
    "lora_alpha": Field("honoured", _alpha),
    "use_rslora": Field("honoured", _only(True, False, why="true or false")),
    "target_modules": Field("honoured", _target_modules),
    "exclude_modules": Field("honoured", _exclude_modules),
    "layers_to_transform": Field("honoured", _layers),
    "layers_pattern": Field("honoured", _layers_pattern),
    "rank_pattern": Field("honoured", _pattern_of(_rank)),
    "alpha_pattern": Field("honoured", _pattern_of(_alpha)),
    # Training only, or ignored by PEFT when it loads an adapter
    "lora_dropout": Field("harmless", _any),
    "init_lora_weights": Field("harmless", _init),
    "fan_in_fan_out": Field("harmless", _any),  # PEFT resets it to false on nn.Linear
    "runtime_config": Field("harmless", _any),  # removed by PEFT's from_json_file
    "eva_config": Field("harmless", _any),  # these three steer an initialisation, which init_lora_weights decides on
    "corda_config": Field("harmless", _any),
    "lora_ga_config": Field("harmless", _any),
    "qalora_group_size": Field("harmless", _any),  # read only with use_qalora
    "megatron_core": Field("harmless", _any),  # read only with megatron_config
    "ensure_weight_tying": Field("harmless", _any),  # concerns embeddings and the LM head, which are refused themselves
    "enable_lora": Field("refused", _only(None, why="only null is served")),  # PEFT 0.1: fused projections
    "merge_weights": Field("harmless", _any),  # PEFT 0.1: whether eval() merges
    # Not served
    "bias": Field("refused", _only("none", why='trained biases are not served, only "none"')),
    "lora_bias": Field("refused", _only(False, None, why="a bias in lora_B is not served; only false")),
    "modules_to_save": Field(
        "refused", _only(None, [], why="fully trained modules are not served; train LoRA alone (null)")
    ),
    "trainable_token_indices": Field("refused", _only(None, why="trained tokens are not served; only null")),
    "target_parameters": Field(
        "refused", _only(None, [], why="LoRA on bare parameters is not served, only on linear modules (null)")
    ),
    "layer_replication": Field("refused", _only(None, [], why="replicated layers are not served; only null")),
    "use_dora": Field("refused", _only(False, None, why=_DORA)),
    "use_qalora": Field("refused", _only(False, None, why="QALoRA is not served; only false")),
    "use_bdlora": Field("refused", _only(None, why="block-diagonal LoRA is not served; only null")),
    "alora_invocation_tokens": Field("refused", _only(None, [], why="activated LoRA is not served; only null")),
    "arrow_config": Field("refused", _only(None, why="Arrow routing is not served; only null")),
    "kasa_config": Field("refused", _only(None, why="KaSA changes the base weights and is not served; only null")),
    "monteclora_config": Field("refused", _only(None, why="MonteCLoRA is not served; only null")),
    "velora_config": Field("refused", _only(None, why="VeLoRA is not served; only null")),
    "loftq_config": Field(
        "refused", _only(None, {}, why="LoftQ adapters fit only the base that LoftQ quantised; only {} is served")
    ),
    "megatron_config": Field("refused", _only(None, {}, why="Megatron layers are not served; only null")),
}


def read_config(data: bytes) -> tuple[LoraSettings | None, list[str]]:
    """The settings in an uploaded adapter_config.json, or None, and every reason why they cannot be served.

    Settings and reasons come together when the fields that choose modules are sound but others are refused, so that
    the tensors can be checked as well."""
    if len(data) > MAX_CONFIG_BYTES:
        return None, [f"{CONFIG_NAME}: {len(data)} bytes; at most {MAX_CONFIG_BYTES} are accepted"]
    try:
        config = load_json(data)
    except ValueError as error:
        return None, [f"{CONFIG_NAME}: not valid JSON: {shown(str(error), 200)}"]
    if not isinstance(config, dict):
        return None, [f"{CONFIG_NAME}: must be a JSON object"]
    faults: dict[str, str] = {}
    if "peft_type" not in config:
        faults["peft_type"] = 'missing; only "LORA" is served'
    if "target_modules" not in config:
        faults["target_modules"] = 'missing; give a list of module names, a regular expression, or "all-linear"'
    for name, value in config.items():
        field = FIELDS.get(name)
        if field is None:
            faults[name] = f"unknown field {shown(name)} = {shown(value)}; remove it if the adapter does not need it"
            continue
        wanted = field.check(value)
        if wanted:
            faults[name] = f"{name} = {shown(value)}: {wanted}"
    for name in ("peft_type", "target_modules"):
        if name not in config:
            faults[name] = f"{name}: {faults[name]}"
    _check_together(config, faults)
    reasons = [f"{CONFIG_NAME}: {fault}" for fault in faults.values()]
    choosing = {name for name, field in FIELDS.items() if field.role == "honoured"}
    if choosing & faults.keys():
        return None, reasons
    return _settings(config), reasons


def _check_together(config: dict[str, Any], faults: dict[str, str]) -> None:
    """What LoraConfig.__post_init__ refuses."""
    by_pattern = isinstance(config.get("target_modules"), str)
    for name in ("layers_to_transform", "layers_pattern"):
        if by_pattern and config.get(name) is not None:
            faults.setdefault(
                name, f"{name} = {shown(config[name])}: PEFT takes it only with a list in target_modules; only null"
            )
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        faults.setdefault("layers_pattern", "layers_pattern needs layers_to_transform beside it, or must be null")


def _settings(config: dict[str, Any]) -> LoraSettings:
    def names(value: Any) -> str | tuple[str, ...]:
        return value if isinstance(value, str) else tuple(value or ())

    layers = config.get("layers_to_transform")
    # An empty list means all layers to PEFT, like null.
    chosen = (layers,) if isinstance(layers, int) else tuple(layers) if layers else None
    pattern = config.get("layers_pattern") or ()
    return LoraSettings(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        use_rslora=config.get("use_rslora", False),
        target_modules=names(config["target_modules"]),
        exclude_modules=names(config.get("exclude_modules")),
        layers_to_transform=chosen,
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """What B·A is multiplied by: alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank
