"""Hooks for schemathesis (`SCHEMATHESIS_HOOKS`): two of three uploads are adapters that fit, half of all addresses and
models name what is there. Without them hardly a request would get past the first check."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import schemathesis

from tests.service.hostile import CONFIG, Q, weights
from tests.service.inference_helpers import BASE

KNOWN = {
    "name": "pirate",
    "model": "pirate",
    "version": "1",
    "filename": "adapter_config.json",
    "alias": "prod",
    "tenant": "acme",
}
MODELS = (BASE, "pirate", "pirate@1", "headline")
CONTRARY = ("adapters", "best_of", "logit_bias", "stop_token_ids", "stream_options", "min_tokens", "suffix")
"""Fields that others have to agree with."""


def _draw(value: object, count: int) -> int:
    """The same for the same value: hypothesis must be able to repeat what it did."""
    return sum(repr(value).encode()) % count


def _path(context: Any) -> tuple[str, str]:
    operation = context.operation
    return ("", "") if operation is None else (operation.method.upper(), operation.path)


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    method, path = _path(context)
    if not isinstance(body, dict):
        return body
    if path in ("/v1/adapters", "/v1/adapters/{name}") and method in ("POST", "PUT") and _draw(body, 3):
        return _adapter(method, body)
    if path in ("/v1/completions", "/v1/chat/completions") and _draw(body, 2):
        sound = {key: value for key, value in body.items() if key not in CONTRARY}
        return sound | {"model": MODELS[_draw(body, 4)], "max_tokens": 1 + _draw(body, 8)}
    return body


def _adapter(method: str, body: dict[str, Any]) -> dict[str, Any]:
    value = np.float32(1 + _draw(body, 5))  # five different adapters
    tensors = {
        f"{Q}.lora_A.weight": np.full((4, 16), value, "<f4"),
        f"{Q}.lora_B.weight": np.full((16, 4), value, "<f4"),
    }
    form = {"config": json.dumps(CONFIG).encode(), "weights": [weights(tensors)], "labels": '{"by": "fuzz"}'}
    return form | ({"name": f"fuzz-{_draw(body, 20)}"} if method == "POST" else {})


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    if not isinstance(path_parameters, dict) or _draw(path_parameters, 2):
        return path_parameters
    known = KNOWN | ({"name": f"fuzz-{_draw(path_parameters, 20)}"} if _path(context)[0] == "DELETE" else {})
    return {key: known.get(key, value) for key, value in path_parameters.items()}
