"""For the tests of the client and of the command line: adapters in folders, a server that misbehaves as told, and one
way to call both clients."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from service.client import AsyncLoraplex, Loraplex


def peft_folder(folder: Path, seed: int, *, shards: int = 1, rank: int = 4) -> Path:
    """What save_pretrained writes, for the base that the simulated engine says it has; in `shards` files with their
    index, where it is more than one."""
    rng = np.random.default_rng(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": rng.standard_normal((rank, 16)).astype(np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((16, rank)).astype(np.float32),
    }
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items(), start=1):
        name = f"adapter_model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({key: tensor}, folder / name)
        weight_map[key] = name
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapter_json(name: str = "a", **more: Any) -> dict[str, Any]:
    """An adapter as GET /v1/adapters/{name} answers."""
    spec = {"rank": 4, "alpha": 8.0, "targets": ["q_proj"], "parameters": 128, "bytes": 900, "sha256": "ab"}
    return {"name": name, "default_version": 1, "versions": [1], "aliases": {}, "spec": spec, "version": 1, **more}


class Both:
    """A client of either kind; its calls, lists and streams are carried out by `do`, `all` and `texts`."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner() if kind == "async" else None
        self.client: Any = AsyncLoraplex(url, **options) if self._runner else Loraplex(url, **options)

    def do(self, result: Any) -> Any:
        return self._run(result) if isinstance(result, Awaitable) else result

    def all(self, items: Any) -> list[Any]:
        if self._runner is None:
            return list(items)
        return self._run(_collected(items))

    def _run(self, work: Any) -> Any:
        if self._runner is None:
            raise TypeError("the client that blocks gave something to wait for")

        async def wait() -> Any:
            return await work

        return self._runner.run(wait())

    def close(self) -> None:
        self.do(self.client.close())
        if self._runner is not None:
            self._runner.close()


async def _collected(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


class Exchange:
    """One request to the scripted server, and the means to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler
        self.method, self.path = handler.command, handler.path
        self.headers = handler.headers

    def body(self) -> bytes:
        return self._handler.rfile.read(int(self.headers.get("content-length", 0)))

    def pieces(self, size: int = 1 << 20) -> Iterator[int]:
        """Reads the body and forgets it; the sizes of its pieces, up to where the client breaks off."""
        left = int(self.headers.get("content-length", 0))
        while left and (got := len(self._handler.rfile.read(min(size, left)))):
            left -= got
            yield got

    def answer(
        self, status: int, body: Any = b"", headers: dict[str, str] | None = None, *, announced: int | None = None
    ) -> None:
        """`announced`: a content-length that is not the body's; the connection is closed then."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._handler.send_response(status)
        for key, value in (headers or {}).items():
            self._handler.send_header(key, value)
        self._handler.send_header("Content-Length", str(len(data) if announced is None else announced))
        self._handler.end_headers()
        self._handler.wfile.write(data)
        if announced is not None:
            self.cut()

    def refuse(self, status: int, headers: dict[str, str] | None = None, **error: Any) -> None:
        self.answer(status, {"error": {"message": "no", "type": "t", "code": None, "param": None, **error}}, headers)

    def cut(self) -> None:
        """No more on this connection."""
        self._handler.close_connection = True


@contextmanager
def scripted(
    script: Callable[[Exchange], None] | Sequence[Callable[[Exchange], None]],
) -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server; its URL, and the "METHOD path" of each request it got. A list of scripts: one for each
    request, the last for all further ones."""
    seen: list[str] = []
    steps = list(script) if isinstance(script, Iterable) else [script]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            step = steps[min(len(seen), len(steps) - 1)]
            seen.append(f"{self.command} {self.path}")
            step(Exchange(self))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that go away are part of the tests

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()
