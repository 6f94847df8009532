"""What test_hostile_input.py sends: cases, and the adapters and raw requests that they are made of."""

from __future__ import annotations

import io
import json
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .inference_helpers import InferenceServer

PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Answer = tuple[int, dict[str, Any]]
"""Status (0: the connection closed without an answer) and the `error` of the body."""


@dataclass(frozen=True)
class Case:
    """One bad request and what it must be answered with: `said` are all parts of the message."""

    name: str
    send: Callable[[InferenceServer], Answer]
    status: int
    code: str | None
    param: str | None
    said: tuple[str, ...]

    def check(self, server: InferenceServer) -> None:
        status, error = self.send(server)
        assert status == self.status, (status, error)
        assert (error.get("code"), error.get("param")) == (self.code, self.param), error
        missing = [text for text in self.said if text not in error.get("message", "")]
        assert not missing, (missing, error)


# ---------------------------------------------------------------- requests


def call(method: str, path: str, **options: Any) -> Callable[[InferenceServer], Answer]:
    """An ordinary request (httpx's options)."""

    def send(server: InferenceServer) -> Answer:
        answer = server.http.request(method, path, **options)
        return answer.status_code, answer.json()["error"]

    return send


def post_json(path: str, body: Any) -> Callable[[InferenceServer], Answer]:
    """`body` bytes: as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call("POST", path, content=content, headers={"content-type": "application/json"})


def raw(head: str, body: bytes = b"") -> Callable[[InferenceServer], Answer]:
    """Bytes on a socket that stays open: the answer must come, though more may have been announced."""
    request = _request(head) + body

    def send(server: InferenceServer) -> Answer:
        with socket.create_connection(("127.0.0.1", server.settings.port), timeout=30) as connection:
            connection.sendall(request)
            answer = b""
            while not _complete(answer) and (piece := connection.recv(65536)):
                answer += piece
        return _parsed(answer)

    return send


def cut(head: str, body: bytes = b"") -> Callable[[InferenceServer], Answer]:
    """Bytes on a socket that is closed behind them; the answer is what comes until the server closes it too."""
    request = _request(head) + body

    def send(server: InferenceServer) -> Answer:
        with socket.create_connection(("127.0.0.1", server.settings.port), timeout=30) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        return _parsed(answer)

    return send


def _request(head: str) -> bytes:
    return head.replace("\n", "\r\n").encode("latin-1") + b"\r\nHost: test\r\n\r\n"


def _complete(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found) and len(body) >= int(lengths[0])


def _parsed(answer: bytes) -> Answer:
    if not answer:
        return 0, {}
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    try:
        error: dict[str, Any] = json.loads(body)["error"]
    except ValueError:
        error = {"message": body.decode()}  # the HTTP parser's own refusals
    return status, error


# ---------------------------------------------------------------- adapters


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file of this header (bytes: as they are) and data; `length`: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header(**changes: Any) -> dict[str, Any]:
    """Of an adapter that fits (rank 4 on q_proj, 16 to 16), with changes of lora_A's entry."""
    return {f"{Q}.lora_A.weight": entry(0, 256, [4, 16]) | changes, f"{Q}.lora_B.weight": entry(256, 512, [16, 4])}


def weights(tensors: dict[str, np.ndarray] | None = None, **more: np.ndarray) -> bytes:
    """A well-formed file of these tensors; by default those that fit."""
    both = {f"{Q}.lora_A.weight": np.ones((4, 16), "<f4"), f"{Q}.lora_B.weight": np.ones((16, 4), "<f4")}
    tensors = both if tensors is None else tensors
    entries, data = {}, b""
    kinds = {"<f4": "F32", "<f8": "F64", "<i8": "I64", "|i1": "I8"}
    for name, array in {**tensors, **more}.items():
        entries[name] = entry(len(data), len(data) + array.nbytes, list(array.shape), kinds[array.dtype.str])
        data += array.tobytes()
    return safetensors(entries, data)


def changed(place: tuple[int, int], value: float) -> bytes:
    """Weights that fit, but for one value of lora_A."""
    a = np.ones((4, 16), "<f4")
    a[place] = value
    return weights({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": np.ones((16, 4), "<f4")})


def zip_bomb() -> bytes:
    """64 MB of zeros in a few kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_model.safetensors", bytes(64 << 20))
    return buffer.getvalue()


class _Touch:
    """Unpickled, it would call this."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').kill(__import__('os').getppid(), 9)",)


def pickled() -> bytes:
    return pickle.dumps({f"{Q}.lora_A.weight": _Touch()})


def upload(
    config: Any = None,
    model: bytes | None = None,
    name: str | None = "refused",
    more: list[Any] | None = None,
    filename: str = "adapter_model.safetensors",
    **changes: Any,
) -> Callable[[InferenceServer], Answer]:
    """A multipart POST. `config` bytes: as they are, else CONFIG with `changes`."""
    text = config if isinstance(config, bytes) else json.dumps({**CONFIG, **changes}).encode()
    files = [
        ("config", ("adapter_config.json", text)),
        ("weights", (filename, weights() if model is None else model)),
        *(more or []),
    ]
    return call("POST", "/v1/adapters", data={} if name is None else {"name": name}, files=files)
