"""loraplex over plain HTTP: upload an adapter, wait until it is on the device, stream from it, delete it.

python examples/httpx_client.py [URL]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

FOLDER = Path(__file__).parent / "adapters" / "json-extract"
QUESTION = "Extract: Hannah Weber, 41, works as a plumber in Vienna."


def upload(client: httpx.Client, name: str, folder: Path) -> str:
    """What PEFT's save_pretrained wrote, as a new version of `name`; which one, as `name@version`."""
    with (folder / "adapter_config.json").open("rb") as config, (folder / "adapter_model.safetensors").open("rb") as w:
        answer = client.put(f"/v1/adapters/{name}", files={"config": config, "weights": w})
    if answer.status_code == 422:  # it does not fit the base model: every reason is given
        raise SystemExit("\n".join(answer.json()["error"]["reasons"]))
    answer.raise_for_status()
    return f"{name}@{answer.json()['version']}"


def stream(client: httpx.Client, model: str, question: str) -> Iterator[str]:
    """The pieces of the answer as they come, out of server-sent events."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 48,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""


def main(url: str) -> None:
    with httpx.Client(base_url=url, timeout=300) as client:
        version = upload(client, "httpx-demo", FOLDER)
        print("uploaded", version)
        client.post("/v1/adapters/httpx-demo/load", params={"wait": True}).raise_for_status()
        for model in ("SmolLM2-135M-Instruct", version):
            print(f"\n{model}: ", end="")
            for piece in stream(client, model, QUESTION):
                print(piece, end="", flush=True)
        print("\n\ndeleted", client.delete("/v1/adapters/httpx-demo").raise_for_status().json()["id"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
